"""What differs between the supported versions of the Hugging Face libraries and PyTorch. Nothing else depends on them.

Two sets are supported (pyproject.toml): [trainer], the current one, and [trainer-xla], which optimum-neuron 0.4.5 pins.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from llama_lora.model_files import read_model_json
from llama_lora.tokenizer_growth import check_growth


def _transformers() -> int:
    """The major version. Not read when this module is imported: the command starts where no library is installed."""
    return int(importlib.metadata.version("transformers").partition(".")[0])


def hub_connection_errors() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub when the Hub cannot be reached: its own, and those of its HTTP client.

    The client is requests in huggingface_hub 0.x, which transformers 4 requires, and httpx or its successor httpx2 in
    1.x and 2.x (https://huggingface.co/docs/huggingface_hub/concepts/migration).
    """
    from huggingface_hub import errors

    client = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    if client.__name__ == "requests":
        names = ("ConnectionError", "Timeout", "TooManyRedirects", "ChunkedEncodingError", "ContentDecodingError")
        return (errors.OfflineModeIsEnabled, *(getattr(client.exceptions, name) for name in names))
    return (errors.OfflineModeIsEnabled, client.RequestError)


@functools.lru_cache(maxsize=1)  # a new factory ends the session of the one before
def limit_hub_waits(seconds: float) -> None:
    """Limit the wait in each request of huggingface_hub that has no time limit.

    In every session that it makes: in a fork, after a connection that failed, and with 0.x in each thread.
    """
    hub: Any = importlib.import_module("huggingface_hub")
    http: Any = importlib.import_module("huggingface_hub.utils._http")

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        if all(value is None for value in limits.values()):
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        made = http.default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    def session() -> Any:
        made = http._default_backend_factory()
        unlimited = made.request

        def request(*arguments: Any, **options: Any) -> Any:
            if options.get("timeout") is None:
                options["timeout"] = seconds
            return unlimited(*arguments, **options)

        made.request = request
        return made

    if hasattr(hub, "set_client_factory"):  # of httpx, in 1.x and 2.x
        hub.set_client_factory(client)
    else:  # of requests
        hub.configure_http_backend(session)


# A model folder may come from a stranger: no network, and no code of its repository (auto_map in its configs).
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_config(folder: Path, **options: Any) -> Any:
    """Load config.json of a folder, which may name code, as one of transformers' own configs."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **LOCAL, **options)


def new_model(config: Any, **options: Any) -> Any:
    """Build a causal language model of a config, with new weights. ``options`` are those of from_config.

    A config can name its attention, which may be code on the Hub, so it is chosen here if ``options`` do not.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        config, trust_remote_code=False, **{"attn_implementation": "eager", **options}
    )


def import_models() -> None:
    """Import what ``load_config`` and ``empty_model`` do, except the module of the model's architecture."""
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401


def empty_model(config: Any) -> Any:
    """Build a causal language model without memory: its parameters are on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with contextlib.suppress(KeyError):  # transformers' own message for a config without a model is raised below
        # Imports the model's module. Within the context below that fails with transformers 4.57 and torch 2.8.
        AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        return new_model(config)


def load_model(folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """Load a causal language model from the safetensors of a folder.

    Returns the model, and the names of its weights that the folder lacks or has in another shape: they are random.
    """
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, **LOCAL, **options
    )
    mismatched = [each if isinstance(each, str) else each[0] for each in found["mismatched_keys"]]
    return model, sorted({*found["missing_keys"], *mismatched})


def import_tokenizers() -> None:
    """Import what ``load_tokenizer`` does; it may run in a thread."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder as its tokenizer.json describes it.

    AutoTokenizer of transformers 5 rebuilds some tokenizers (GPT2Tokenizer, Qwen2Tokenizer) with the pre-tokenizer of
    their class instead of the file's, so that numbers become other tokens. That of 4.57 uses the file for every class.
    Raises OSError or ValueError; UserError if it makes texts much longer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    check_growth(read_model_json(file), str(file))
    # Named, because tokenizer_config.json can name another one, outside the folder, for 4.57.
    options = {**LOCAL, "tokenizer_file": str(file)} if file.is_file() else LOCAL
    own_class = PreTrainedTokenizerFast if _transformers() >= 5 and file.is_file() else AutoTokenizer
    try:
        tokenizer = own_class.from_pretrained(folder, **options)
    except (OSError, ValueError):
        raise
    except Exception as error:  # tokenizers raises Exception itself, and a file of any content makes any line fail
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not file.is_file() and tokenizer.is_fast:  # transformers has made it of another file
        check_growth(json.loads(tokenizer.backend_tokenizer.to_str()), str(folder))
    return tokenizer


def chat_template_environment() -> Any:
    """A new Jinja environment with the sandbox, filters and extensions that transformers gives a chat template.

    transformers offers it only through a compiled template; each source compiled has an environment of its own.
    """
    from transformers.utils import chat_template_utils

    compile_template = chat_template_utils._compile_jinja_template
    return getattr(compile_template, "__wrapped__", compile_template)("").environment


def begin_texts(tokenizer: Any, begin: bool) -> None:
    """Make a tokenizer put its beginning-of-sequence token before a text, or not, also after it is saved and loaded.

    Classes of transformers that have add_bos_token (LlamaTokenizerFast in 4.57) rebuild the post-processor when loaded.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer.init_kwargs["add_bos_token"] = begin
    if hasattr(tokenizer, "add_bos_token"):
        tokenizer.add_bos_token = begin
    bos = tokenizer.bos_token
    start = f"{bos}:0 " if begin else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start}$A:0", pair=f"{start}$A:0 $B:1", special_tokens=[(bos, tokenizer.bos_token_id)] if begin else []
    )


def load_gguf_model(file: Path, dtype: Any) -> Any:
    """Load a GGUF file as a model with plain weights of a torch dtype, which can be saved as safetensors.

    transformers 5 keeps the weights in GGUF's blocks unless it is told otherwise; 4.57 has no such choice
    (https://huggingface.co/docs/transformers/gguf).
    """
    import transformers

    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _transformers() >= 5 else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, **LOCAL, **options
    )
