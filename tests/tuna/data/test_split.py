"""Law of holding out: a prompt stands on one side alone, and one seed and share choose the same prompts everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tuna.cli import app
from tuna.compare.demo import split
from tuna.data.notices import shared_prompts_notice
from tuna.data.records import Record, read_records
from tuna.data.split import hold_out, prompt_key, split_records
from tuna.data.tokenization import TokenizedGroup
from tuna.train.config import TunaConfig
from tuna.train.run import read_data
from tuna.train.run_settings import RunSettings
from tuna_kernels import Group

PAIRS = [{"id": f"r{i}", "prompt": f"Say {i // 6}", "chosen": "a b", "rejected": f"c {i}"} for i in range(48)]


def file_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_three_who_hold_out_choose_alike(tmp_path: Path) -> None:
    data = file_of(tmp_path / "pairs.jsonl", PAIRS)
    config = TunaConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    run = RunSettings(model="tiny", data=str(data), eval_fraction=0.25)
    train, held = read_data(run, config, Console(quiet=True))
    assert len(held) == 12 and len(train) == 36
    assert not {record.prompt for record in train} & {record.prompt for record in held}
    assert (train, held) == split_records(read_records(data).records, 0.25, config.seed)
    done = CliRunner().invoke(app, ["data", "split", str(data), "--output", str(tmp_path), "--fraction", "0.25"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record.id for record in held]


def test_the_choice_is_the_prompts_own() -> None:
    records = read_records(PAIRS).records
    held = {record.prompt for record in split_records(records, 0.25)[1]}
    backwards = [record.model_copy(update={"id": f"x{i}"}) for i, record in enumerate(records[::-1])]
    assert {record.prompt for record in split_records(backwards, 0.25)[1]} == held
    assert {record.prompt for record in split_records(records, 0.25, seed=1)[1]} != held
    with pytest.raises(ValueError, match="at least two distinct ones"):
        split_records(records[:3], 0.5)
    assert len(hold_out(["a", "b", "a"], 0.99)) == 1


def test_prompts_that_say_the_same_are_one() -> None:
    turns = [{"role": "user", "content": "Say IT."}]
    same = [
        "say it.",
        " Say\n it. ",
        turns,
        Record.model_validate({"id": "a", "messages": turns, "responses": ["x"]}).messages,
    ]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    system = [{"role": "system", "content": "s"}, *turns]
    assert prompt_key(system) != prompt_key(turns) != prompt_key("say that.")


def test_a_file_of_another_shape_is_split_like_the_first(tmp_path: Path) -> None:
    data = file_of(tmp_path / "pairs.jsonl", PAIRS)
    other = file_of(tmp_path / "other.jsonl", [{"instruction": f"say  {i}"} for i in range(8)])
    base = ["--output", str(tmp_path / "a"), "--fraction", "0.25"]
    assert CliRunner().invoke(app, ["data", "split", str(data), *base]).exit_code == 0
    like = ["--output", str(tmp_path / "b"), "--like", str(tmp_path / "a" / "held_out.jsonl")]
    assert CliRunner().invoke(app, ["data", "split", str(other), *like]).exit_code == 0
    held = {json.loads(line)["prompt"] for line in (tmp_path / "a" / "held_out.jsonl").open()}
    found = {
        json.loads(line)["instruction"].replace("say  ", "Say ") for line in (tmp_path / "b" / "held_out.jsonl").open()
    }
    assert found == held


def test_groups_of_a_prompt_stay_together_in_the_demo() -> None:
    groups = [TokenizedGroup(str(i), Group([i // 3, 1], [[2]]), 0) for i in range(18)]
    train, held = split(groups, 0)
    assert len(held) == 6 and shared_prompts_notice(train, held) is None


def test_prompts_on_both_sides_are_told() -> None:
    groups = [TokenizedGroup(str(i), Group([i, 1], [[2]]), 0) for i in range(4)]
    assert shared_prompts_notice(groups[:2], groups[2:]) is None
    notice = shared_prompts_notice(groups[:3], groups[2:], "mine")
    assert notice is not None and "1 of the 2 prompts held out of 'mine' are also trained on" in notice
