"""Laws of sampling: k responses an instruction, drawn again while two are alike, the most diverse try kept; what is
drawn depends on seed and instruction, not on batches or interruptions."""

from __future__ import annotations

import asyncio
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from typer.testing import CliRunner

from tests.tuna.serve.live_server import live_server
from tuna.cli import app
from tuna.data.instructions import Instruction
from tuna.gather.api.journal import Journal
from tuna.gather.diversity import diversity_figures, pair_rouge, worst_pair
from tuna.gather.responses import Response, ResponseSet, read_responses
from tuna.gather.student import Diversity, LocalSampling, diverse, sample_locally
from tuna.models.loading import tiny_model

PROMPTS = [
    "Name a colour.",
    "Why is the sky blue, and why is it red in the evening?",
    "Hello",
    "2+2?",
    "Say something.",
]
WANTED = [Instruction(id=f"q{i}", prompt=text, reference="r") for i, text in enumerate(PROMPTS)]
SMALL = LocalSampling(k=3, max_tokens=8, seed=5, template="chat")


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = tiny_model(seed=3)
    return model.double().eval(), tokenizer


def drawn(tiny: Any, folder: Path, sampling: LocalSampling = SMALL, **more: Any) -> list[ResponseSet]:
    with Journal(folder, "sample", {"seed": sampling.seed}) as journal:
        sets, problems = sample_locally(*tiny, more.pop("wanted", WANTED), sampling, journal, name="tiny", **more)
    assert not problems
    return sets


def texts(sets: list[ResponseSet]) -> list[list[str]]:
    return [[response.text for response in item.responses] for item in sets]


def test_rouge_is_the_librarys_on_english_and_sees_other_scripts() -> None:
    given = ["The cat sat on the mat.", "A cat sat on a mat!", "Dogs run; the cat sat", "THE CAT SAT ON THE MAT"]
    scorer = RougeScorer(["rougeL"])
    wanted = [scorer.score(a, b)["rougeL"].fmeasure for a, b in combinations(given, 2)]
    assert pair_rouge(given) == pytest.approx(wanted)
    assert 0 < worst_pair(["我喜欢猫", "我喜欢狗"]) < 1  # rouge-score alone would find both empty
    assert worst_pair(["Это кошка", "это кошка"]) == 1
    assert worst_pair(["", ""]) == 1 and worst_pair(["one"]) == 0


@pytest.mark.parametrize(
    ("worsts", "kept", "count"),
    [([0.1], 0, 1), ([0.9, 0.7, 0.1], 1, 2), ([1.0, 0.85, 0.9], 1, 3), ([0.8, 0.9, 1.0], 0, 3)],
)
def test_alike_responses_are_drawn_again_and_the_best_try_is_kept(worsts: list[float], kept: int, count: int) -> None:
    """`worsts`: ROUGE-L that the pair of each try is made to have."""
    asked: list[float] = []

    async def draw(temperature: float, number: int) -> list[Response]:
        asked.append(temperature)
        common = round(20 * worsts[number])
        words = [[f"w{i}" if i < common else f"{side}{i}" for i in range(20)] for side in "ab"]
        return [Response(text=" ".join(row)) for row in words]

    best, tries = asyncio.run(diverse(draw, 1.0, Diversity(alike=0.8, step=0.1, tries=3)))
    assert tries == count and asked == [1.0, 1.1, 1.2][:count]
    assert (best.temperature, best.worst) == (asked[kept], pytest.approx(worsts[kept]))


def test_draws_do_not_depend_on_the_batch(tiny: Any, tmp_path: Path) -> None:
    one, many = (drawn(tiny, tmp_path / str(batch), batch=batch) for batch in (1, 4))
    assert texts(one) == texts(many)
    assert [item.id for item in many] == [item.id for item in WANTED]
    for item in many:
        assert len(item.responses) == 3 and item.reference == "r"
        for response in item.responses:
            assert response.tokens is not None and response.logprob_sum is not None
            assert response.logprob_mean == pytest.approx(response.logprob_sum / response.tokens)
            assert response.finish_reason in ("stop", "length")
    other = drawn(tiny, tmp_path / "seed", LocalSampling(k=3, max_tokens=8, seed=6, template="chat"))
    assert texts(other) != texts(one)


def test_an_interrupted_run_goes_on_where_it_was(tiny: Any, tmp_path: Path) -> None:
    whole = drawn(tiny, tmp_path / "whole", batch=2)
    count = 0

    def stop_after_three(tokens: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drawn(tiny, tmp_path / "cut", batch=2, on_done=stop_after_three)
    found: list[int] = []
    resumed = drawn(tiny, tmp_path / "cut", batch=2, on_done=found.append)
    assert texts(resumed) == texts(whole)
    assert found.count(0) == 3 and len(found) == len(WANTED)
    again: list[int] = []
    assert drawn(tiny, tmp_path / "cut", on_done=again.append) == resumed
    assert again == [0] * len(WANTED)


def test_a_cold_student_is_heated(tiny: Any, tmp_path: Path) -> None:
    cold = LocalSampling(k=2, max_tokens=6, temperature=0.0, diversity=Diversity(step=0.01, tries=3))
    sets = drawn(tiny, tmp_path, cold, wanted=WANTED[:2])
    for item in sets:
        assert item.sampling is not None
        # Temperature 0 draws the same twice; 0.01 and 0.02 hardly differ from it, so all tries are used.
        assert item.sampling["tries"] == 3 or item.sampling["rouge_worst"] < 0.8
        assert item.sampling["temperature"] in (0.0, 0.01, 0.02)
    hot = drawn(
        tiny, tmp_path / "hot", LocalSampling(k=2, max_tokens=6, temperature=0.0, diversity=Diversity(step=9.0))
    )
    assert all(item.sampling is not None and item.sampling["tries"] == 2 for item in hot)
    figures = diversity_figures(hot)
    assert figures["alike"] == figures["equal"] == 0 and figures["responses"] == 2 * len(WANTED)


def test_prompts_beyond_the_model_are_set_aside(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=40)
    wanted = [*WANTED[:1], Instruction(id="long", prompt="word " * 60)]
    with Journal(tmp_path, "sample", {}) as journal:
        sets, problems = sample_locally(*model, wanted, SMALL, journal, name="tiny")
    assert [item.id for item in sets] == ["q0"]
    assert "'long'" in problems[0] and "40 positions" in problems[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1}, "temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalSampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"alike": 0}, "alike"), ({"step": 0}, "step"), ({"tries": 0}, "tries")]
)
def test_bad_diversity_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diversity(**wrong)


def instructions_file(folder: Path) -> Path:
    path = folder / "instructions.jsonl"
    path.write_text("".join(json.dumps({"id": item.id, "prompt": item.prompt}) + "\n" for item in WANTED))
    return path


def test_the_command_samples_a_local_student_once(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = [
        "sample", "--instructions", str(instructions_file(tmp_path)), "--model", "tiny", "--output", str(output),
        "--k", "2", "--max-tokens", "6", "--template", "chat",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    written = (output / "responses.jsonl").read_bytes()
    assert len(read_responses(output / "responses.jsonl")[0]) == len(WANTED)
    assert json.loads((output / "diversity.json").read_text())["responses"] == 2 * len(WANTED)
    journal = (output / "journal.jsonl").read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (output / "responses.jsonl").read_bytes() == written and (output / "journal.jsonl").read_bytes() == journal
    other = CliRunner().invoke(app, [*arguments, "--top-p", "0.5"])
    assert other.exit_code != 0 and "top_p" in str(other.exception)


def test_the_command_samples_a_student_behind_an_endpoint(tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with live_server(*tiny) as (url, engine):
        arguments = [
            "sample", "--instructions", str(instructions_file(tmp_path)), "--model", "tiny", "--output", str(output),
            "--k", "2", "--max-tokens", "6", "--base-url", url, "--logprobs", "--temperature", "0", "--step", "1.5",
            "--tries", "2",
        ]  # fmt: skip
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        before = engine.batches
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert engine.batches == before  # all answers were in the journal
    sets = read_responses(output / "responses.jsonl")[0]
    assert [item.id for item in sets] == [item.id for item in WANTED]
    for item in sets:
        assert item.sampling is not None
        assert (item.sampling["tries"], item.sampling["temperature"]) == (2, 1.5)  # at 0 both are the same
        assert all(response.logprob_sum is not None for response in item.responses)
