"""Laws of `tuna train` and `tuna score`: a run from files to files on the tiny model; flags win over YAML; what
the user got wrong is one clear message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from tuna.cli import app, main
from tuna.compare.baseline import baseline_step_loss
from tuna.data.records import read_records
from tuna.data.tokenization import tokenize_records
from tuna.models.integrity import CheckpointError
from tuna.models.loading import load_model
from tuna.system.writing import write_json
from tuna.train.curves import plot_log
from tuna.train.progress import log_line
from tuna.train.run_settings import RunSettings, merge_settings
from tuna.train.stopping import Stopped
from tuna.train.trainer import TunaTrainer

EXAMPLES = Path(__file__).resolve().parents[3] / "tuna" / "data" / "examples" / "ranked_demo.jsonl"
SMALL = ["--model", "tiny", "--data", str(EXAMPLES), "--max-length", "128", "--template", "alpaca"]
FAST = ["--limit", "12", "--groups", "2", "--set", "use_cpu=true", "--logging-steps", "1"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def split_examples(folder: Path, train: int, held_out: int) -> tuple[Path, Path]:
    lines = EXAMPLES.read_text().splitlines(keepends=True)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    files[0].write_text("".join(lines[:train]))
    files[1].write_text("".join(lines[train : train + held_out]))
    return files


def test_train_from_files_to_files(tmp_path: Path) -> None:
    data, held_out = split_examples(tmp_path, 9, 4)
    output, report = tmp_path / "out", tmp_path / "report.json"
    reading = ["--max-length", "128", "--template", "alpaca"]
    arguments = ["train", "--model", "tiny", "--data", str(data), *reading, *FAST, "--output", str(output)]
    done = invoke(
        *arguments, "--eval-data", str(held_out), "--steps", "8", "--lr", "3e-3", "--mle-weight", "0.1",
        "--warmup-steps", "0", "--eval-steps", "4",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    # The order of the responses is shown before training starts.
    assert done.output.index("Is the better one really better?") < done.output.index("step  loss")
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == 8
    assert metrics["data"]["groups"] == 9
    assert metrics["before"]["eval_loss"] != metrics["after"]["eval_loss"]
    assert sum("eval_loss" in line for line in metrics["log"]) == 3  # at 4, at 8, and after
    losses = [line["loss"] for line in metrics["log"] if "loss/rank" in line]
    assert len(losses) == 8 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    # The folder is a plain model with its tokenizer, and `tuna score` finds what the run ended with.
    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)
    scored = invoke("score", "--model", str(output), "--data", str(held_out), *reading, "--json", str(report))
    assert scored.exit_code == 0, scored.output
    for name, value in json.loads(report.read_text())["metrics"].items():
        assert metrics["after"][f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    again = invoke(*arguments)
    assert again.exit_code != 0 and "already has a run" in str(again.exception)


def test_score_equals_the_baseline_scores(tmp_path: Path) -> None:
    report, rows = tmp_path / "report.json", tmp_path / "rows.jsonl"
    done = invoke("score", *SMALL, "--limit", "7", "--batch", "300", "--json", str(report), "--per-record", str(rows))
    assert done.exit_code == 0, done.output
    assert "rank/accuracy" in done.output
    model, tokenizer = load_model("tiny")
    groups, _ = tokenize_records(read_records(EXAMPLES).records[:7], tokenizer, template="alpaca", max_length=128)
    baseline = baseline_step_loss(model.eval(), [item.group for item in groups]).scores.tolist()
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["id"] for line in lines] == [item.id for item in groups]
    # float32 through two layers: batches of other shapes round differently
    np.testing.assert_allclose([s for line in lines for s in line["scores"]], baseline, rtol=1e-5)
    summary = json.loads(report.read_text())
    right = pairs = 0
    for line in lines:
        for s, r in zip(line["scores"], line["ranks"], strict=True):
            worse = [t for t, q in zip(line["scores"], line["ranks"], strict=True) if r < q]
            pairs += len(worse)
            right += sum(s > t for t in worse)
    assert summary["metrics"]["rank/accuracy"] == pytest.approx(right / pairs)
    assert summary["tokens"] < summary["unshared_tokens"]


def test_resume_goes_on_where_training_stopped(tmp_path: Path) -> None:
    common = ["train", *SMALL, *FAST, "--lr", "1e-3", "--steps", "6", "--seed", "5"]
    invoke(*common, "--output", str(tmp_path / "a"))
    invoke(*common, "--output", str(tmp_path / "b"), "--save-steps", "2")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    (tmp_path / "b" / "model.safetensors").unlink()
    done = invoke(*common, "--output", str(tmp_path / "b"), "--save-steps", "2", "--resume")
    assert done.exit_code == 0, done.output
    straight, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / x).state_dict() for x in "ab")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_lora_leaves_an_adapter_and_a_merged_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    done = invoke(
        "train", *SMALL, *FAST, "--output", str(tmp_path), "--eval-fraction", "0.25", "--lora-r", "2",
        "--steps", "3", "--lr", "1e-2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["data"]["groups"] == 9  # 3 of 12 held out
    assert metrics["after"]["eval_loss"] != metrics["before"]["eval_loss"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = peft.PeftModel.from_pretrained(load_model("tiny")[0], tmp_path / "adapter")
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)
    assert not torch.equal(merged(ids).logits, load_model("tiny")[0](ids).logits)
    exported = tmp_path / "exported"  # the adapter says what it was trained on
    assert invoke("export", str(tmp_path / "adapter"), str(exported)).exit_code == 0
    plain = AutoModelForCausalLM.from_pretrained(exported)
    torch.testing.assert_close(plain(ids).logits, merged(ids).logits)


def test_flags_win_over_yaml_and_numbers_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    lines = ("model: tiny", "data: a.jsonl", "output_dir: out", "learning_rate: 1e-5", "margin: 1")
    file.write_text("\n".join([*lines, "max_steps: 7", "save_strategy: no"]))
    run, settings = merge_settings(file, ["max-steps=9", "bf16=false"], {"margin": 0.2, "eval_data": None})
    assert run == RunSettings(model="tiny", data="a.jsonl")
    expected = {"output_dir": "out", "learning_rate": 1e-5, "margin": 0.2, "max_steps": 9, "bf16": False}
    expected["save_strategy"] = "no"  # which YAML reads as false
    assert settings == expected
    assert isinstance(settings["learning_rate"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("max_steps: 1.5", "max_steps = 1.5 must be a whole number"),
        ("max_steps: true", "max_steps = True must be a whole number"),
        ("margin: wide", "margin = 'wide' must be a number"),
        ("bf16: 3", "bf16 = 3 must be true or false"),
        ("eval_fraction: 1.5", "eval_fraction = 1.5"),
        ("eval_fraction: 0.1\neval_data: b.jsonl", "both given"),
        ("- a\n- b", "not a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        merge_settings(file, [], {"model": "tiny", "data": "a.jsonl", "output_dir": "out"})
    assert message in str(error.value)


def test_missing_settings_are_named() -> None:
    with pytest.raises(ValueError, match="data is missing"):
        merge_settings(None, [], {"model": "tiny"})
    with pytest.raises(ValueError, match="key=value"):
        merge_settings(None, ["margin"], {})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        merge_settings(Path("nowhere.yaml"), [], {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "OUT", "--preset", "rrhf"], "Invalid value for '--preset'"),
        (["--output", "OUT", "--set", "preset=rrhf"], "preset = 'rrhf' is not one of"),
        (["--output", "OUT", "--set", "eval_strategy=steps"], "eval_strategy needs held-out data"),
        (["--output", "OUT", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ([], "output_dir is missing"),
    ],
)
def test_mistakes_end_in_one_message(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path) if word == "OUT" else word for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *SMALL, *FAST, *words])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_bad_records_are_left_out_or_fatal(tmp_path: Path) -> None:
    rows: list[Any] = [json.loads(line) for line in EXAMPLES.read_text().splitlines()[:4]]
    rows[2].pop("scores")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["score", "--model", "tiny", "--data", str(file)]
    assert "line 3" in str(invoke(*arguments).exception)
    report = tmp_path / "report.json"
    done = invoke(*arguments, "--on-bad", "skip", "--json", str(report))
    assert done.exit_code == 0, done.output
    summary = json.loads(report.read_text())
    assert (summary["groups"], summary["left_out"]) == (3, 1)


def test_log_lines_show_training_and_evaluation_only() -> None:
    assert log_line({"loss": 1.5, "loss/rank": 0.5, "epoch": 1}) == "step  loss 1.5000  rank 0.5000"
    assert log_line({"eval_loss": 1.5, "eval_rank/accuracy": 0.25}) == "eval  loss 1.5000  accuracy 0.250"
    assert log_line({"train_loss": 1.5, "train_runtime": 3}) == ""
    assert log_line({"epoch": 1}) == ""


def test_reports_hold_no_number_json_cannot(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.0, float("inf")], "z": {"w": 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.0, None], "z": {"w": 2}}
    plot_log(tmp_path / "a.png", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "eval_loss": 1.0}])
    plot_log(tmp_path / "empty.png", [])
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "empty.png"]


def test_the_final_model_takes_its_place_whole(tmp_path: Path) -> None:
    words = ["train", *SMALL, *FAST, "--steps", "1", "--output", str(tmp_path / "run")]
    assert invoke(*words).exit_code == 0
    model = tmp_path / "run" / "model.safetensors"
    model.rename(tmp_path / "run" / "model-00001-of-00002.safetensors")  # as of a larger model before this one
    model.mkdir()
    done = invoke(*words, "--overwrite")
    assert isinstance(done.exception, CheckpointError) and f"{model} or what belongs to it" in str(done.exception)
    model.rmdir()
    assert invoke(*words, "--resume").exit_code == 0
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "run" / ".saving").exists()


def test_a_run_written_over_leaves_no_result_of_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *SMALL, *FAST, "--steps", "1", "--output", str(tmp_path / "run")]
    assert invoke(*words).exit_code == 0

    def stopped(*args: object, **kwargs: object) -> None:
        raise Stopped("by a signal")

    monkeypatch.setattr(TunaTrainer, "train", stopped)
    assert invoke(*words, "--resume").exit_code == 3
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert invoke(*words, "--overwrite").exit_code == 3
    assert not list((tmp_path / "run").glob("model*")) and not (tmp_path / "run" / "metrics.json").exists()


def test_a_damaged_checkpoint_is_no_model(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", str(tmp_path / "run" / "checkpoint-1")
    assert invoke("train", *SMALL, *FAST, "--steps", "1", "--output", str(run)).exit_code == 0
    data = SMALL[SMALL.index("--data") + 1]
    score = ["score", "--model", checkpoint, "--data", data, "--limit", "2"]
    train = [*SMALL, *FAST, "--steps", "1", "--output", str(tmp_path / "next")]
    train[train.index("--model") + 1] = checkpoint
    for name, damaged in (("optimizer.pt", False), ("model.safetensors", True)):
        path = Path(checkpoint) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        for words in (score, ["train", *train, "--overwrite"]):
            done = invoke(*words)
            assert isinstance(done.exception, CheckpointError) == damaged, done.output
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(checkpoint)  # so that no command or program takes it


def test_score_refuses_to_run_once_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = invoke("score", "--model", "tiny", "--data", "none.jsonl")
    assert isinstance(done.exception, ValueError)
    assert "without a launcher" in str(done.exception)
