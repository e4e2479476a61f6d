"""What optimum-neuron 0.4.5 can train with tensor parallelism, checked from a config.json before a node is taken.

Each rule says in which of the library's functions it is, or in which of neuronx_distributed 2.26's (NxD). All numbers
of a model come from its config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genvalues.common.errors import UserError
from llama_lora.config import RunConfig

# optimum/neuron/models/training/auto_models.py registers these three for text-generation, by model_type. Llama is all
# of 3, 3.1, 3.2 and 3.3.
MODELS = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "granite": "GraniteForCausalLM"}
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
# What LoRA can be on: linear layers of LlamaAttention and LlamaMLP (models/training/llama/modeling_llama.py), of which
# the other two are made, by the base model's own names: the block a layer is in, and what its weight leads from and to.
# Embeddings and lm_head could be targeted too, but for Granite's; consolidating and merging know linear layers alone.
LINEAR = {
    "q_proj": ("self_attn", "hidden", "query"),
    "k_proj": ("self_attn", "hidden", "key"),
    "v_proj": ("self_attn", "hidden", "key"),
    "o_proj": ("self_attn", "query", "hidden"),
    "gate_proj": ("mlp", "hidden", "intermediate"),
    "up_proj": ("mlp", "hidden", "intermediate"),
    "down_proj": ("mlp", "intermediate", "hidden"),
}
# NxD kernels/flash_attn.py, nki_flash_attn_func: "multiples of 2K"; and the kernel it calls takes heads of up to 128
# (flash_fwd in aws-neuron/nki-samples, src/nki_samples/reference/attention.py: the head is its partition dimension).
FLASH_ROWS = 2048
FLASH_HEAD = 128
TRN1_CORES = 32  # of the largest Trn1: 16 chips of two NeuronCores (AWS Neuron docs, "Trainium Architecture")
MODEL = "the model's config.json"


@dataclass(frozen=True)
class Sizes:
    """What of a model tensor parallelism cuts, and how many positions it knows."""

    model_type: str
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    layers: int
    positions: int

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) features of a linear layer, uncut."""
        features = {
            "hidden": self.hidden,
            "query": self.heads * self.head,
            "key": self.kv_heads * self.head,
            "intermediate": self.intermediate,
        }
        _, inner, outer = LINEAR[name]
        return features[inner], features[outer]


def sizes_of(model_config: Mapping[str, Any]) -> Sizes:
    """Raises UserError for a size that the config does not give."""
    try:
        heads = model_config["num_attention_heads"]
        hidden = model_config["hidden_size"]
        model_type = model_config.get("model_type", "llama")
        # Qwen3Config has 128 where config.json says nothing; LlamaConfig and Granite's attention divide.
        head = model_config.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads)
        return Sizes(
            model_type=model_type,
            hidden=hidden,
            heads=heads,
            kv_heads=model_config.get("num_key_value_heads") or heads,
            head=head,
            intermediate=model_config["intermediate_size"],
            vocabulary=model_config["vocab_size"],
            layers=model_config["num_hidden_layers"],
            positions=model_config["max_position_embeddings"],
        )
    except KeyError as error:
        raise UserError(f"has no {error}", where=MODEL, fix="Use a model of transformers' format.") from None


def target_modules(wished: Sequence[str] | Literal["all-linear"]) -> list[str]:
    """The names to give optimum-neuron, which ends with an AttributeError for "all-linear".

    FusedLinearsSpec.adapt_peft_config (models/training/transformations_utils.py) takes names out of the word.
    """
    return list(LINEAR) if wished == "all-linear" else list(wished)


def check(config: RunConfig, model_config: Mapping[str, Any], platform: str | None = None) -> list[UserError]:
    """Every setting that cannot be trained, with what to write instead.

    ``platform`` is what the workers run on, where it is known; more processes on a node than a Trn1 has cores say trn2.
    """
    if platform is None and config.parallelism.processes_per_node > TRN1_CORES:
        platform = "trn2"
    if refused := list(_check_model(model_config)):
        return refused  # the other rules are those models'
    sizes = sizes_of(model_config)
    return [
        *_check_targets(config, sizes),
        *_check_tensor_parallel(config, sizes, platform),
        *_check_length(config, sizes),
        *_check_processes(config),
    ]


def warnings(config: RunConfig) -> list[str]:
    """What is allowed, but maybe not meant."""
    doubts = []
    if config.training.attention == "flash" and config.training.packing and config.dataset.format != "text":
        doubts.append(
            "training.attention flash: the examples packed into a row see those before them, because flash attention "
            "is causal only. Write eager, or packing: false."
        )
    if config.parallelism.processes_per_node % config.parallelism.tensor_parallel_size:
        doubts.append(
            f"parallelism.tensorParallelSize {config.parallelism.tensor_parallel_size} does not divide the "
            f"{config.parallelism.processes_per_node} processes of a node: some groups are spread over two nodes, and "
            "exchange every layer's activations over the network."
        )
    return doubts


def tensor_parallel_sizes(config: RunConfig, sizes: Sizes, platform: str | None = None) -> list[int]:
    """Those that divide the processes and that this model can be cut into."""
    processes = config.parallelism.nodes * config.parallelism.processes_per_node
    return [
        size
        for size in range(1, processes + 1)
        if processes % size == 0 and not list(_problems_of_size(size, sizes, platform))
    ]


def _check_model(model_config: Mapping[str, Any]) -> Iterator[UserError]:
    model_type, architectures = model_config.get("model_type"), model_config.get("architectures") or []
    known = ", ".join(MODELS.values())
    if model_type not in MODELS or not set(architectures) <= {MODELS[model_type]}:
        named = ", ".join(architectures) or f"model_type {model_type!r}"
        yield UserError(
            f"{named} is none of the models that optimum-neuron 0.4.5 trains with tensor parallelism",
            where="model",
            fix=f"Use one of {known} (Llama 3, 3.1, 3.2, 3.3; Qwen3; Granite).",
        )
        return
    # LlamaAttention and LlamaMLP make every layer with bias=False: the weights of a bias would be left out in silence.
    for key in ("attention_bias", "mlp_bias"):
        if model_config.get(key):
            yield UserError(
                f"{key} is true, but optimum-neuron's {MODELS[model_type]} has no biases and would leave them out",
                where=MODEL,
                fix="Use a model without.",
            )
    # modeling_utils.py, from_pretrained: the code for quantized weights is left out.
    if model_config.get("quantization_config"):
        yield UserError(
            "the weights are quantized, which optimum-neuron does not read for training",
            where=MODEL,
            fix="Use the model's bf16 weights.",
        )
    # Qwen3Model.__init__ raises; Qwen3Config drops a sliding_window that use_sliding_window does not switch on.
    if model_type == "qwen3" and model_config.get("use_sliding_window") and model_config.get("sliding_window"):
        yield UserError(
            f"sliding_window is {model_config['sliding_window']}, which optimum-neuron's Qwen3 does not have",
            where=MODEL,
            fix="Set use_sliding_window to false in it, if the model was not trained with it.",
        )
    sizes = sizes_of(model_config)
    if sizes.hidden % sizes.heads:  # LlamaAttention.__init__
        yield UserError(
            f"hidden_size {sizes.hidden} is not divisible by num_attention_heads {sizes.heads}",
            where=MODEL,
            fix="Use another model.",
        )
    if sizes.heads % sizes.kv_heads:  # LlamaAttention.__init__: num_key_value_groups
        yield UserError(
            f"num_attention_heads {sizes.heads} is not divisible by num_key_value_heads {sizes.kv_heads}",
            where=MODEL,
            fix="Use another model.",
        )


def _check_targets(config: RunConfig, sizes: Sizes) -> Iterator[UserError]:
    wished, where = target_modules(config.lora.target_modules), "lora.targetModules"
    unknown = [name for name in wished if name not in LINEAR]
    if unknown:
        yield UserError(
            f"{', '.join(unknown)}: LoRA cannot be put there",
            where=where,
            fix=f"Use all-linear, or some of {', '.join(LINEAR)}.",
        )
    # FusedLinearsSpec.adapt_peft_config: LlamaMLP has one gate_up_proj for both.
    if missing := _missing(GATE_UP, wished):
        yield UserError(
            f"{missing[0]} is missing: gate_proj and up_proj are one layer on Neuron, and get LoRA together or not",
            where=where,
            fix=f"Add {missing[0]}, or leave both out.",
        )
    # GQAQKVColumnParallelLinearSpec.adapt_peft_config: LlamaAttention has one qkv_proj then.
    tensor = config.parallelism.tensor_parallel_size
    if sizes.kv_heads % tensor and (missing := _missing(QUERY_KEY_VALUE, wished)):
        separate = [str(size) for size in tensor_parallel_sizes(config, sizes) if sizes.kv_heads % size == 0]
        yield UserError(
            f"{' and '.join(missing)} missing: with tensorParallelSize {tensor} and {sizes.kv_heads} key-value heads, "
            "q_proj, k_proj and v_proj are one layer on Neuron, and get LoRA together or not",
            where=where,
            fix=f"Add {' and '.join(missing)}, or use tensorParallelSize {_one_of(separate)}.",
        )


def _missing(together: tuple[str, ...], wished: list[str]) -> list[str]:
    missing = [name for name in together if name not in wished]
    return missing if len(missing) < len(together) else []


def _check_tensor_parallel(config: RunConfig, sizes: Sizes, platform: str | None) -> Iterator[UserError]:
    tensor = config.parallelism.tensor_parallel_size
    possible = [str(size) for size in tensor_parallel_sizes(config, sizes, platform)]
    for problem in _problems_of_size(tensor, sizes, platform):
        yield UserError(f"{tensor} {problem}", where="parallelism.tensorParallelSize", fix=f"Use {_one_of(possible)}.")


def _problems_of_size(tensor: int, sizes: Sizes, platform: str | None) -> Iterator[str]:
    """Why a model cannot be cut for so many workers. No layer cuts hidden_size, so it needs no rule."""
    if sizes.heads % tensor:  # LlamaAttention.__init__: neuronx_dist_utils.divide
        yield f"does not divide the model's {sizes.heads} attention heads"
    # LlamaAttention.__init__ copies kv heads for more workers than there are (config.py, auto_kv_size_multiplier: size
    # // kv_heads times), and divides the copies among the workers; so either divides the other.
    if sizes.kv_heads % tensor and tensor % sizes.kv_heads:
        yield f"and the model's {sizes.kv_heads} key-value heads: neither divides the other"
    if sizes.intermediate % tensor:  # LlamaMLP.__init__
        yield f"does not divide the model's intermediate_size {sizes.intermediate}"
    # LlamaModel and Qwen3Model: NxD's ParallelEmbedding (EmbeddingUtility.range_from_global_vocab_size) and lm_head
    # divide. GraniteModel has torch's own embedding and head, whole on every worker.
    if sizes.model_type != "granite" and sizes.vocabulary % tensor:
        yield f"does not divide the model's vocabulary of {sizes.vocabulary}"
    # NxD parallel_state.py, arrange_kv_groups: on Trn2 the gradients of a kv head's copies are summed over neighbouring
    # workers, but optimum-neuron lays copies out as for Trn1 (create_kv_proj_local_weight_from_regular_weight), so that
    # gradients of different heads are added up. With one kv head all workers are one group. Measured on the CPU shim,
    # 2 kv heads on 4 workers, fp32: gradients of k's B off by 0.40 where the largest is 0.32, of the q of the layer
    # below by 0.07 of 0.24; with the shim's platform trn1 by 2e-6. The loss itself is right, so nothing shows.
    if platform == "trn2" and 1 < sizes.kv_heads < tensor:
        yield (
            f"is more than the model's {sizes.kv_heads} key-value heads, for which optimum-neuron 0.4.5 adds up the "
            "wrong gradients on Trn2"
        )


def _check_length(config: RunConfig, sizes: Sizes) -> Iterator[UserError]:
    length, tensor = config.training.max_sequence_length, config.parallelism.tensor_parallel_size
    where = "training.maxSequenceLength"
    flash = config.training.attention == "flash"
    if flash and sizes.head > FLASH_HEAD:
        yield UserError(
            f"flash takes heads of up to {FLASH_HEAD}, the model's have {sizes.head}",
            where="training.attention",
            fix="Write eager.",
        )
    step = math.lcm(tensor, FLASH_ROWS if flash else 1)
    fitting = [size for size in (length // step * step, (length // step + 1) * step) if 0 < size <= sizes.positions]
    if length > sizes.positions:
        fix = (
            f"Set it to {sizes.positions // step * step} or less." if step <= sizes.positions else "Use another model."
        )
        yield UserError(f"{length} is more than the {sizes.positions} positions the model knows", where=where, fix=fix)
        return
    fix = f"Use {_one_of([str(size) for size in fitting])}." if fitting else "Write training.attention: eager."
    if flash and length % FLASH_ROWS:
        yield UserError(
            f"{length} is no multiple of {FLASH_ROWS}, as attention flash needs",
            where=where,
            fix=f"{fix[:-1]}, or training.attention: eager." if fitting else fix,
        )
    elif length % tensor:
        # NxD mappings.py, _split_along_dim: sequence parallelism, always on with tensor parallelism, cuts each row.
        yield UserError(
            f"{length} is not divisible by tensorParallelSize {tensor}: sequence parallelism cuts each row",
            where=where,
            fix=fix,
        )


def _check_processes(config: RunConfig) -> Iterator[UserError]:
    layout = config.parallelism  # NxD parallel_state.py, initialize_model_parallel: the rest is data parallel
    processes = layout.nodes * layout.processes_per_node
    tensor, data = layout.tensor_parallel_size, layout.data_parallel_size
    if tensor * data == processes:
        return
    said = f"{layout.nodes} x {layout.processes_per_node} = {processes} processes are not {tensor} x {data}"
    if processes % tensor:
        yield UserError(
            f"{said}, and {tensor} does not divide them",
            where="parallelism",
            fix="Set tensorParallelSize to a divisor of the processes.",
        )
    else:
        yield UserError(said, where="parallelism.dataParallelSize", fix=f"Set it to {processes // tensor}.")


def _one_of(numbers: list[str]) -> str:
    """1, 2, 4 or 8"""
    return " or ".join([", ".join(numbers[:-1]), numbers[-1]] if len(numbers) > 1 else numbers) or "another model"
