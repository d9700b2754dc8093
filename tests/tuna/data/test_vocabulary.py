"""Law of the vocabulary: a token without an embedding is refused before it is computed; both sizes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tuna.cli import main
from tuna.data.records import Record
from tuna.data.tokenization import tokenize_records
from tuna.data.vocabulary import check_vocabulary, vocabulary_of
from tuna.models.loading import tiny_model
from tuna.score.scoring import score_dataset
from tuna.train.config import TunaConfig
from tuna.train.trainer import TunaTrainer

SIZES = r"the tokenizer has 1,025 tokens, the model 1,024 embeddings, none for token 1024 \('<\|new\|>'\)"


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Any, Any, Path]:
    """A model whose tokenizer got a token more, also as a folder."""
    model, tokenizer = tiny_model()
    tokenizer.add_tokens(["<|new|>"])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return model, tokenizer, tmp_path / "model"


def records(*prompts: str) -> list[Record]:
    return [Record(id=f"r{i}", prompt=text, responses=["a", "b"], scores=[1, 0]) for i, text in enumerate(prompts)]


def test_records_with_such_tokens_are_named(grown: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = grown
    fine = records("Say it")
    bad = records("Say it", *["Say <|new|>"] * 5)
    for given, refused in ((fine, False), (bad, True)):
        groups, _ = tokenize_records(given, tokenizer, template="none", max_length=64)
        config = TunaConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", max_length=64)
        if not refused:  # a larger tokenizer alone does no harm
            check_vocabulary(model, groups, tokenizer)
            TunaTrainer(model, config, groups, None, tokenizer)
            continue
        named = SIZES + r".*records 'r1', 'r2', 'r3' and 2 more"
        with pytest.raises(ValueError, match=named):
            TunaTrainer(model, config, given, None, tokenizer)
        with pytest.raises(ValueError, match=named):
            TunaTrainer(model, config, fine, groups, tokenizer)
        with pytest.raises(ValueError, match=r"the model 1,024 embeddings, none for token 1024.*'r1'"):
            score_dataset(model, groups)


def test_embeddings_beyond_the_tokenizer_are_fine_and_the_smaller_layer_counts() -> None:
    model, _ = tiny_model()
    assert vocabulary_of(model) == 1024
    model.resize_token_embeddings(1100)
    assert vocabulary_of(model) == 1100
    model.lm_head = nn.Linear(64, 1050, bias=False)
    assert vocabulary_of(model) == 1050


@pytest.mark.parametrize("command", ["train", "score", "sample"])
def test_the_commands_end_with_2(
    grown: tuple[Any, Any, Path], tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "Say <|new|>", "responses": ["a", "b"], "scores": [1, 0]}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row))
    flags = {
        "train": ["--data", str(data), "--output", str(tmp_path / "out"), "--set", "use_cpu=true"],
        "score": ["--data", str(data)],
        "sample": ["--instructions", str(data), "--output", str(tmp_path / "out")],
    }
    with pytest.raises(SystemExit) as stopped:
        main([command, "--model", str(grown[2]), *flags[command]])
    printed = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "1,025 tokens, the model 1,024 embeddings" in printed
