"""Laws of recipes: a step runs once for the same flags, inputs and files, and again when one of them changes; a run
that broke off goes on at the step where it did; and what is wrong with a recipe is said before anything runs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from tests.tuna.gather.misbehaving import Misbehaving
from tuna.cli import app
from tuna.data.records import read_records
from tuna.data.split import hold_out
from tuna.gather.responses import Response, ResponseSet, write_responses
from tuna.recipe.run import StepFailed, run_steps
from tuna.recipe.steps import PlannedStep, plan, read_recipe
from tuna.system.writing import content_hash

TUNA = get_command(app)
REPOSITORY = Path(__file__).resolve().parents[3]
RANK: dict[str, Any] = {"name": "ranked", "run": "rank", "options": {"data": "responses.jsonl"}}
SPLIT: dict[str, Any] = {"name": "parts", "run": "split", "options": {"source": "${ranked}", "fraction": "${share}"}}
AGAIN: dict[str, Any] = {
    "name": "again",
    "run": "rank",
    "options": {"data": "responses.jsonl", "reference": False, "length_penalty": 0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sets = [
        ResponseSet(
            id=f"q{i}",
            prompt=f"Why {i}?",
            reference="Because.",
            responses=[
                Response(text=f"{n} words", tokens=n, logprob_sum=-1.0 * i, finish_reason="stop") for n in (1, 2)
            ],
        )
        for i in range(1, 9)
    ]
    write_responses(tmp_path / "responses.jsonl", sets)
    return tmp_path


def written(folder: Path, *steps: dict[str, Any], **more: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"folder": "out", "variables": {"share": 0.25}, "steps": list(steps), **more}))
    return path


def planned(folder: Path, *steps: dict[str, Any], variables: Any = None, **more: Any) -> list[PlannedStep]:
    return plan(read_recipe(written(folder, *steps, **more), variables), folder, TUNA)


def ran(steps: list[PlannedStep]) -> list[str]:
    """Run the steps; the names of those that were not done already."""
    found: list[str] = []
    run_steps(steps, on_done=lambda step, now, seconds: found.append(step.step.name) if now else None)
    return found


def test_steps_run_once_and_what_changes_runs_again(folder: Path) -> None:
    steps = planned(folder, RANK, SPLIT)
    assert ran(steps) == ["ranked", "parts"]
    assert len(read_records(steps[0].product).records) == 8
    parts = [len(read_records(steps[1].product / name).records) for name in ("train.jsonl", "held_out.jsonl")]
    assert parts == [6, 2]
    assert ran(planned(folder, RANK, SPLIT)) == []
    other = planned(folder, RANK, SPLIT, variables={"share": 0.5})
    assert ran(other) == ["parts"]  # the other one's inputs and flags are as they were
    assert other[1].folder != steps[1].folder and steps[1].done  # nothing is written over
    assert ran(planned(folder, RANK, SPLIT)) == []
    with (folder / "responses.jsonl").open("a") as file:
        file.write(
            json.dumps(
                {
                    "id": "new",
                    "prompt": "?",
                    "reference": "r",
                    "responses": [{"text": "t", "tokens": 1, "logprob_sum": -1.0}],
                }
            )
            + "\n"
        )
    assert [step.done for step in planned(folder, RANK, SPLIT)] == [False, False]


def test_a_run_that_broke_off_goes_on_where_it_did(folder: Path) -> None:
    bad: dict[str, Any] = {"name": "again", "run": "rank", "options": {"data": "${ranked}", "min_responses": 9}}
    with pytest.raises(StepFailed, match=r"step 'again' failed with exit code 2.*\n.*log-probabilities"):
        ran(planned(folder, RANK, bad))
    steps = planned(folder, RANK, AGAIN)
    assert [step.done for step in steps] == [True, False]
    assert ran(steps) == ["again"]
    steps[1].product.unlink()  # what a done step made is gone: it is not done
    assert ran(steps) == ["again"]


def test_keys_depend_on_what_decides_the_result_and_on_nothing_else(folder: Path) -> None:
    generate: dict[str, Any] = {
        "name": "made",
        "run": "generate",
        "options": {"instructions": "responses.jsonl", "model": "m", "base_url": "${teacher}", "max_calls": 5},
    }
    servers = {"teacher": {"model": "tiny", "port": 9000}}

    def keys(step: dict[str, Any], servers: Any) -> list[str]:
        rank = {"name": "ranked", "run": "rank", "options": {"data": "${made}"}}
        return [found.key for found in planned(folder, step, rank, servers=servers)]

    def changed(**options: Any) -> dict[str, Any]:
        return {**generate, "options": {**generate["options"], **options}}

    before = keys(generate, servers)
    assert keys(changed(max_calls=500, concurrency=3), servers) == before  # how much and how fast, not what
    assert keys({**generate, "title": "Other words"}, servers) == before
    assert all(a != b for a, b in zip(keys(changed(n=5), servers), before, strict=True))
    other = {"teacher": {"model": "tiny", "port": 9000, "options": {"dtype": "bfloat16"}}}
    assert all(a != b for a, b in zip(keys(generate, other), before, strict=True))
    assert changed(max_tokens=3) != generate and keys(changed(**{"max-tokens": 3}), servers) == keys(
        changed(max_tokens=3), servers
    )


def test_references_become_paths_addresses_and_values(folder: Path) -> None:
    train: dict[str, Any] = {
        "name": "first",
        "run": "train",
        "options": {
            "model": "tiny",
            "data": "${parts}/train.jsonl",
            "eval_first": False,
            "set": ["a=1", "b=2"],
        },
    }
    asked = {"instructions": "responses.jsonl", "model": "m", "base-url": "${student}"}
    made: dict[str, Any] = {"name": "made", "run": "generate", "options": {**asked, "score-with": "${first}"}}
    servers = {"student": {"model": "${first}", "port": 9001}}
    steps = planned(folder, RANK, SPLIT, train, made, servers=servers)
    assert f"--data={steps[1].folder}/train.jsonl" in steps[2].arguments
    assert "--no-eval-first" in steps[2].arguments
    assert [a for a in steps[2].arguments if a.startswith("--set")] == ["--set=a=1", "--set=b=2"]
    assert "--base-url=http://127.0.0.1:9001/v1" in steps[3].arguments
    assert f"--model={steps[2].folder}" in steps[3].servers[0].arguments
    assert "--fraction=0.25" in steps[1].arguments
    with pytest.raises(ValueError, match=r"step 'made' needs server 'student', whose \$\{first\} comes later"):
        planned(folder, {**made, "options": asked}, RANK, SPLIT, train, servers=servers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"folder": "x"}, "steps: is missing"),
        ({"folder": "x", "steps": []}, "steps"),
        ({"folder": "x", "stepz": 1, "steps": [RANK]}, "stepz: is unknown"),
        ({"folder": "x", "steps": [{**RANK, "run": "rnk"}]}, r"steps.0 \(ranked\).run"),
        ({"folder": "x", "steps": [{**RANK, "nmae": "a"}]}, r"steps.0 \(ranked\).nmae: is unknown"),
        ({"folder": "x", "steps": [RANK, RANK]}, "duplicate name 'ranked'"),
        ({"folder": "x", "steps": [SPLIT]}, "step 'parts' refers to"),
        ({"folder": "x", "steps": [{**RANK, "options": {"data": "${rankd}"}}]}, "refers to"),
        ({"folder": "x", "steps": [{**RANK, "options": {"output": "a"}}]}, "output is set by the recipe"),
        ({"folder": "x", "steps": [{**RANK, "options": {"min_tokens": 1, "min-tokens": 2}}]}, "flag twice"),
        ({"folder": "x", "servers": {"a": {"model": "m"}, "b": {"model": "m"}}, "steps": [RANK]}, "same port"),
        ({"folder": "x", "servers": {"a": {"model": "${nope}"}}, "steps": [RANK]}, "server 'a' refers to"),
        ([1], "not a list"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x", "lenght_penalty": 1}, "tuna rank has no flag 'lenght-penalty'; did you mean 'length-penalty'"),
        ({"data": "x", "truncated": "frist"}, "step 'ranked': tuna rank: .*frist"),
        ({"data": "x", "tie": "wide"}, "step 'ranked': tuna rank: .*--tie"),
        ({}, "step 'ranked': tuna rank: .*--data"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_before_anything_runs(folder: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(folder, {**RANK, "options": options})
    with pytest.raises(ValueError, match="no variable 'shre'; did you mean 'share'"):
        planned(folder, RANK, variables={"shre": 1})


def test_the_command_runs_shows_and_reports(folder: Path) -> None:
    path = written(folder, RANK, SPLIT, title="A title")
    shown = CliRunner().invoke(app, ["recipe", "show", str(path)])
    assert shown.exit_code == 0 and "no" in shown.output and not (folder / "out").exists()
    done = CliRunner().invoke(app, ["recipe", "run", str(path), "--until", "ranked", "--quiet"])
    assert done.exit_code == 0 and "ranked: done in" in done.output and "parts" not in done.output
    done = CliRunner().invoke(app, ["recipe", "run", str(path), "--set", "share=0.5"])
    assert done.exit_code == 0 and "ranked: already done" in done.output and "parts: done in" in done.output
    report = (folder / "out" / "report.md").read_text()
    assert report.startswith("# A title") and "| ranked | rank | done |" in report
    assert (folder / "out" / "scores-1.png").read_bytes().startswith(b"\x89PNG")
    assert "| records | 8 |" in report
    unknown = CliRunner().invoke(app, ["recipe", "run", str(path), "--until", "nope"])
    assert unknown.exit_code != 0 and "ranked, parts" in str(unknown.exception)


def test_a_server_that_cannot_start_fails_its_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {
        "name": "made",
        "run": "generate",
        "options": {"instructions": "responses.jsonl", "model": "m", "base_url": "${teacher}"},
    }
    port = free_port()
    steps = planned(folder, RANK, made, servers={"teacher": {"model": "./no_such_model", "port": port}})
    with pytest.raises(StepFailed, match=r"server 'teacher' did not start[\s\S]*no model folder './no_such_model'"):
        ran(steps)
    assert [step.done for step in steps] == [True, False]
    monkeypatch.setattr("tuna.recipe.run.PORT_TIMEOUT", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StepFailed, match=f"port {port} is in use"):
            ran(steps)


def test_every_recipe_of_the_repository_can_be_planned() -> None:
    recipes = sorted((REPOSITORY / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert plan(read_recipe(path), path.parent, TUNA)


def test_held_out_ids_are_chosen_by_themselves() -> None:
    ids = [f"id-{i}" for i in range(40)]
    held = hold_out(ids, 0.25)
    assert len(held) == 10 and held == hold_out(ids[::-1], 0.25) != hold_out(ids, 0.25, seed=1)
    assert len(hold_out(ids[:3], 0.01)) == 1 and len(hold_out(ids[:3], 0.99)) == 2
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match="fraction"):
            hold_out(ids, wrong)
    with pytest.raises(ValueError, match="at least two distinct ones"):
        hold_out(ids[:1], 0.5)


def test_split_copies_rows_and_follows_another_file(tmp_path: Path) -> None:
    rows = [{"id": i if i % 2 else f"{i}", "extra": {"deep": [i]}} for i in range(8)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["data", "split", str(source), "--output"]
    assert CliRunner().invoke(app, [*base, str(tmp_path / "a"), "--fraction", "0.25"]).exit_code == 0
    held = tmp_path / "a" / "held_out.jsonl"
    both = [json.loads(line) for name in ("train", "held_out") for line in (tmp_path / "a" / f"{name}.jsonl").open()]
    assert sorted(both, key=lambda row: int(row["id"])) == rows
    assert CliRunner().invoke(app, [*base, str(tmp_path / "b"), "--like", str(held)]).exit_code == 0
    assert (tmp_path / "b" / "held_out.jsonl").read_bytes() == held.read_bytes()
    assert CliRunner().invoke(app, [*base, str(tmp_path / "c")]).exit_code != 0
    source.write_text('{"id": 1}\n{"id": "1"}\n')
    twice = CliRunner().invoke(app, [*base, str(tmp_path / "c"), "--fraction", "0.5"])
    assert "line 2: duplicate id '1'" in str(twice.exception)


def test_content_is_hashed_by_bytes_and_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text("text")
    assert content_hash(tmp_path / "one") == content_hash(tmp_path / "two")
    (tmp_path / "two" / "deep" / "file").rename(tmp_path / "two" / "file")
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")
    assert content_hash(tmp_path / "two" / "file") == content_hash(tmp_path / "one" / "deep" / "file")


def tiny_recipe(folder: Path, port: int, judge_url: str) -> Path:
    """The paper's recipe on a tiny random model; only the judge is somebody else."""
    instructions = [{"id": f"i{i}", "instruction": f"Name thing {i}.", "output": f"Thing {i}."} for i in range(8)]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions))
    shape = {"template": "chat", "max_length": 256}
    train = {**shape, "lr": 1e-3, "set": ["use_cpu=true"], "logging_steps": 1}
    parts = {"data": "${parts}/train.jsonl", "eval_data": "${parts}/held_out.jsonl"}
    asked = {"instructions": "instructions.jsonl", "max_tokens": 24}
    steps = [
        ("candidates", "generate", {**asked, "base_url": "${local}", "model": "tiny", "n": 3, "seed": 1}),
        ("ranked", "rank", {"data": "${candidates}", "truncated": "keep"}),
        ("parts", "split", {"source": "${ranked}", "fraction": 0.25}),
        ("first", "train", {**train, **parts, "model": "tiny"}),
        ("sampled", "sample", {**asked, "model": "${first}", "k": 3, "template": "chat"}),
        ("judged", "judge", {"data": "${sampled}", "base_url": judge_url, "model": "judge"}),
        ("second", "train", {**train, "model": "${first}", "data": "${judged}"}),
        ("agreement", "score", {**shape, "model": "tiny", "data": "${judged}"}),
    ]
    content = {
        "folder": "out",
        "servers": {"local": {"model": "tiny", "port": port, "options": {"threads": 1}}},
        "steps": [{"name": name, "run": run, "options": options} for name, run, options in steps],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_recipe_runs_and_survives_being_killed(tmp_path: Path) -> None:
    """Killed (kill -9) at several points and started again, it ends with the files of a run left in peace."""
    results = []
    for name, kills in (("peace", 0), ("killed", 3)):
        folder = tmp_path / name
        folder.mkdir()
        with Misbehaving(judge=shortest_first) as judge:
            path = tiny_recipe(folder, free_port(), judge.url)
            for number in range(kills):
                process = start_recipe(path)
                time.sleep(6 + 9 * number)
                process.kill()
                process.communicate()
                time.sleep(4)  # the step it was at goes on by itself for a moment, and so does a server
            process = start_recipe(path)
            output = process.communicate(timeout=800)[0].decode()
            assert process.returncode == 0, output
            assert set(judge.paid.values()) == {1}  # every judgement was paid for once
        found = {step.step.name: step for step in plan(read_recipe(path), folder, TUNA)}
        assert all(step.done for step in found.values())
        results.append([read_records(found[name].product).records for name in ("ranked", "judged")])
        report = (folder / "out" / "report.md").read_text()
        for part in ("## Responses", "## Rankings", "## Agreement and pair accuracy", "## Training"):
            assert part in report
        for picture in ("lengths.png", "scores-1.png", "scores-2.png", "accuracy.png", "training.png"):
            assert (folder / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert results[0] == results[1]


def shortest_first(body: dict[str, Any]) -> str:
    """A judge that prefers short answers."""
    pattern = r'<candidate-([0-9a-f]{12}) number="(\d+)">\n(.*?)\n</candidate-\1>'
    candidates = [found[1:] for found in re.findall(pattern, body["messages"][1]["content"], re.S)]
    order = sorted(candidates, key=lambda one: (len(one[1]), one[1]))
    marks = [{"candidate": int(n), "correctness": 3, "helpfulness": 3, "clarity": 3} for n, _ in candidates]
    ranking = [[int(n)] for n, _ in order]
    return json.dumps({"kind": "open", "reference": "r", "duplicates": [], "scores": marks, "ranking": ranking})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_recipe(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tuna", "recipe", "run", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
