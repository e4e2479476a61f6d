"""A causal language model in less memory than its weights: one decoder layer at a time is read from the files.

All rows pass through a layer before the next one is read, so a pass reads each weight once. What a model computes
around its decoder layers (masks, position embeddings, last norm, logits) is computed by its own forward() in
transformers, with layers that record how they are called and return their input.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genvalues.accelerators.cpu_memory import HIDDEN_STATES, LOGITS
from genvalues.common.errors import UserError
from llama_lora import library_versions
from llama_lora.adapter import PREFIX, WEIGHTS, read_adapter_config
from llama_lora.bf16 import speed_up_linear_layers
from llama_lora.data.batches import Batch
from llama_lora.data.tokens import IGNORED
from llama_lora.model_files import COMPLETE, check_folder, regular_file
from llama_lora.safetensors_files import DTYPES, StoredTensor, read_header, read_into, stored_tensors


class Source(NamedTuple):
    """Where a parameter is stored, and the dtype that it has in memory."""

    file: Path
    tensor: StoredTensor
    dtype: torch.dtype


@dataclass
class Rows:
    """A batch between two layers: hidden states [rows, tokens, features], and what each layer is called with."""

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class StreamedModel:
    """A model folder, optionally with a LoRA adapter, to compute losses on the CPU.

    Dtypes, attention and adapter are those of ``from_pretrained(folder, dtype="auto")``, and of PEFT with an adapter in
    the dtype in which it was trained. Raises UserError unless all weights are in the folder's safetensors.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        check_folder(folder)
        stored = stored_tensors(folder)
        config = library_versions.load_config(folder)
        dtype = weights_dtype(config, stored)
        self.seconds_reading = 0.0
        self._lm = meta_model(config, dtype, adapter).eval()
        speed_up_linear_layers(self._lm)
        self._layers = list(self._lm.model.layers)
        self._returns_tuple = False
        shards = {shard: regular_file(folder, shard) for shard in {each.shard for each in stored.values()}}
        of_adapter = read_header(adapter / WEIGHTS).tensors if adapter else {}
        # Factors round as in training: those in fp32 stay so, others have the dtype of the base model, as with PEFT.
        factor_dtype = torch.float32 if all(each.dtype == "F32" for each in of_adapter.values()) else dtype
        self._sources: dict[int, Source] = {}
        for name, parameter in self._lm.named_parameters():
            if adapter and ".lora_" in name:
                file, tensor = adapter / WEIGHTS, of_adapter.get(PREFIX + name.replace(".default.", "."))
            else:
                tensor = stored.get(name.replace(".base_layer.", "."))
                file = shards[tensor.shard] if tensor else folder
            if tensor is None or tensor.shape != list(parameter.shape) or tensor.dtype not in DTYPES:
                raise UserError(
                    f"lacks the weights of {name} in its shape, in {', '.join(DTYPES)}", where=str(file), fix=COMPLETE
                )
            self._sources[id(parameter)] = Source(file, tensor, factor_dtype if ".lora_" in name else dtype)

    @property
    def layer_count(self) -> int:
        """The number of decoder layers."""
        return len(self._layers)

    def passes(self, shapes: Iterable[tuple[int, int]]) -> list[list[int]]:
        """Divide batches of these (rows, tokens) into passes over the weights: the numbers of the batches in each.

        What a pass keeps between two layers is bounded.
        """
        found: list[list[int]] = []
        used = 0
        for number, (rows, tokens) in enumerate(shapes):
            size = kept_bytes(rows, tokens, self._lm.config, self._lm.dtype.itemsize)
            if not found or used + size > HIDDEN_STATES:
                found.append([])
                used = 0
            found[-1].append(number)
            used += size
        return found

    @torch.no_grad()
    def row_losses(self, batches: Sequence[Batch], layer_done: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
        """Sum the cross entropy (nats) over the trained tokens of each row: fp64 [rows] for each batch, in one pass.

        ``layer_done`` is called after each decoder layer.
        """
        lm = self._lm
        with self._read(lm.model.embed_tokens):
            states = [Rows(lm.model.embed_tokens(batch.input_ids)) for batch in batches]
        with self._read(lm.model.norm):
            for number, layer in enumerate(self._layers):
                with self._read(layer):
                    for rows, batch in zip(states, batches, strict=True):
                        if number == 0:
                            self._first_layer(rows, batch)
                        else:
                            arguments, keywords = rows.calls[number]
                            rows.hidden = self._hidden(layer(rows.hidden, *arguments, **keywords))
                layer_done()
            with self._read(lm.lm_head):
                return [self._losses(rows.hidden, batch.labels) for rows, batch in zip(states, batches, strict=True)]

    def _first_layer(self, rows: Rows, batch: Batch) -> None:
        """Call the model: its first layer computes, the others only record their arguments, which are kept."""
        first = self._layers[0]
        compute = type(first).forward.__get__(first)

        def record(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            rows.calls.append((arguments, keywords))
            if len(rows.calls) == 1:
                returned = compute(hidden, *arguments, **keywords)
                self._returns_tuple = isinstance(returned, tuple)
                rows.hidden = self._hidden(returned)
            return self._returned(rows.hidden)

        with self._forward(record):
            self._lm.model(
                inputs_embeds=rows.hidden,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The last norm, the logits of a chunk of trained tokens at a time, and their losses, summed for each row."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        trained = (targets != IGNORED).nonzero()
        sums = torch.zeros(len(hidden), dtype=torch.float64)
        size = LOGITS // (self._lm.config.vocab_size * (self._lm.dtype.itemsize + 8))
        for rows, positions in (chunk.unbind(1) for chunk in trained.split(max(1, size))):
            part = hidden[rows, positions][None]
            with self._forward(lambda *_, part=part, **__: self._returned(part)):
                logits = self._lm(inputs_embeds=part, use_cache=False).logits[0]
            losses = F.cross_entropy(logits.float(), targets[rows, positions], reduction="none")
            sums.index_add_(0, rows, losses.double())
        return sums

    def _hidden(self, returned: Any) -> torch.Tensor:
        hidden: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        return hidden

    def _returned(self, hidden: torch.Tensor) -> Any:
        """As a layer of this model returns it: some of transformers 4.57 return a tuple."""
        return (hidden,) if self._returns_tuple else hidden

    @contextlib.contextmanager
    def _forward(self, instead: Callable[..., Any]) -> Iterator[None]:
        """Call a function instead of the forward() of every decoder layer."""
        for layer in self._layers:
            layer.forward = instead
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    @contextlib.contextmanager
    def _read(self, root: nn.Module) -> Iterator[None]:
        """Have the weights of a module in memory within the block."""
        began = time.monotonic()
        with contextlib.ExitStack() as replaced:
            for module in root.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        source = self._sources[id(parameter)]
                        values = torch.empty(parameter.shape, dtype=source.dtype)
                        read_into(values, source.file, source.tensor)
                        module._parameters[name] = nn.Parameter(values, requires_grad=False)
                        replaced.callback(module._parameters.__setitem__, name, parameter)
            self.seconds_reading += time.monotonic() - began
            yield


def kept_bytes(rows: int, tokens: int, config: Any, itemsize: int) -> int:
    """Bytes of a batch between two layers: hidden states, the position embeddings' cosine and sine, and the mask."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return rows * tokens * ((config.hidden_size + 2 * head) * itemsize + tokens)


def weights_dtype(config: Any, stored: dict[str, StoredTensor]) -> torch.dtype:
    """What transformers takes for dtype="auto": that of the config, else that of the first weight."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    dtypes = (DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in DTYPES)
    dtype: torch.dtype = getattr(torch, next(dtypes, "float32"))
    return dtype


def meta_model(config: Any, dtype: torch.dtype, adapter: Path | None) -> Any:
    """Build the model, with PEFT's layers for an adapter. Parameters are meta tensors, buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = library_versions.new_model(config, attn_implementation="sdpa", dtype=dtype)
        if adapter:
            from peft import LoraConfig, get_peft_model

            read = read_adapter_config(adapter)  # of plain LoRA: these keys say all that it computes
            keys = ("r", "lora_alpha", "target_modules", "use_rslora")
            lora = LoraConfig(task_type="CAUSAL_LM", **{key: read[key] for key in keys if key in read})
            model = get_peft_model(model, lora, low_cpu_mem_usage=True).get_base_model()
    model.tie_weights()  # not within init_empty_weights, which makes a parameter of its own of each that is assigned
    return model
