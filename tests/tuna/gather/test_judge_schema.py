"""Laws of the form that `tuna judge` asks for: an answer in it ends, whatever model writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuna.gather.misbehaving import Misbehaving
from tests.tuna.gather.test_judge import honest, responses, run
from tuna.gather.judge import JudgeSettings, _schema
from tuna.models.constrained import json_constraint
from tuna.models.loading import load_tokenizer


def endless(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Parts of a schema that a model could go on with for ever."""
    if schema["type"] == "array" and "maxItems" not in schema:
        yield schema
    if schema["type"] in ("string", "integer") and "maxLength" not in schema and "enum" not in schema:
        yield schema
    for part in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        yield from endless(part)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_answer_ends_even_if_its_model_would_go_on(count: int) -> None:
    """A model that repeats itself wherever it may comes to an end within the tokens of an answer."""
    pytest.importorskip("llguidance")
    tokenizer = load_tokenizer("tiny")
    limit = JudgeSettings(model="judge").max_tokens
    schema = _schema(count, limit)
    assert not list(endless(schema))
    constraint = json_constraint(tokenizer, [tokenizer.eos_token_id], schema)
    closing = {token for token in range(1024) if set(tokenizer.decode([token])) & set('"]}')}
    written: list[int] = []
    while not constraint.complete:
        allowed = constraint.allowed(1024).nonzero()[:, 0].tolist()
        written.append(next((token for token in allowed if token not in closing), allowed[0]))
        constraint.accept(written[-1])
        assert len(written) <= 1.5 * limit  # here a token is a character
    found = json.loads(tokenizer.decode(written, skip_special_tokens=True))
    assert len(found["scores"]) == count and 1 <= len(found["ranking"]) <= count


def test_a_reference_that_was_cut_is_no_candidate(tmp_path: Path) -> None:
    def wordy(*args: Any) -> Any:
        return re.sub('"my own"', json.dumps("x" * 60), honest(*args))

    with Misbehaving(judge=wordy) as server:
        result = run(server, responses(tmp_path, 2), tmp_path / "run", "--reference-candidate", "--max-tokens", "60")
    assert result.exit_code == 1 and "was cut to its limit" in result.output
