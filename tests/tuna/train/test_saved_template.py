"""Law of the template: one default, noted with the run, taken up by what is done with the model; oddities are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner, Result

from tuna.cli import app
from tuna.data.notices import cut_notice, reversed_notice, sample_of
from tuna.data.records import read_records
from tuna.data.templates import save_template, saved_template, unused_chat_template
from tuna.data.tokenization import TokenizedGroup, tokenize_records
from tuna.models.loading import load_model, tiny_model
from tuna.serve import Engine, create_app
from tuna.train.config import TunaConfig
from tuna.train.trainer import TunaTrainer
from tuna_kernels import Group

ROWS = [
    {"id": f"r{i}", "prompt": f"Say {i}", "responses": ["red cat", "old blue dog", "tree"], "scores": [i % 3, 1.5, 0]}
    for i in range(6)
]
RUN = ["--set", "use_cpu=true", "--logging-steps", "1", "--groups", "2", "--lr", "1e-3", "--steps", "3"]
UNUSED = "chat template is not used"


def flat(done: Result) -> str:
    return " ".join((done.output + str(done.exception or "")).split())


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def chat_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the chat template, and a checkpoint of it."""
    output = tmp_path_factory.mktemp("runs") / "chat"
    done = invoke(
        "train", "--model", "tiny", "--data", data, "--output", output, "--template", "chat", "--save-steps", 2, *RUN
    )
    assert done.exit_code == 0, flat(done)
    assert UNUSED not in flat(done)
    return output


def test_the_note_stands_with_the_model_and_its_checkpoints(chat_run: Path, tmp_path: Path) -> None:
    assert saved_template(chat_run) == saved_template(chat_run / "checkpoint-2") == "chat"
    assert json.loads((chat_run / "metrics.json").read_text())["settings"]["template"] == "chat"
    assert saved_template("tiny") is None
    save_template(tmp_path, "Q: {prompt}\nA:")
    assert saved_template(tmp_path) == "Q: {prompt}\nA:"
    for broken in ("", "{}", '{"template": "nope"}', '{"template": 3}'):
        (tmp_path / "tuna.json").write_text(broken)
        with pytest.raises(ValueError, match="does not name a template"):
            saved_template(tmp_path)


def test_generation_of_the_saved_model_ends_where_responses_were_trained_to_end(chat_run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_run)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|end|>")]
    assert sorted(GenerationConfig.from_pretrained(chat_run).eos_token_id) == sorted(ends)


def test_scores_take_up_the_template_of_the_run(chat_run: Path, data: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("taken", "given", "other")}
    done = invoke("score", "--model", chat_run, "--data", data, "--per-record", files["taken"])
    assert done.exit_code == 0 and "template 'chat': what" in flat(done)
    invoke("score", "--model", chat_run, "--data", data, "--template", "chat", "--per-record", files["given"])
    other = invoke("score", "--model", chat_run, "--data", data, "--template", "none", "--per-record", files["other"])
    assert "was trained with template = 'chat', not 'none'" in flat(other)
    assert files["taken"].read_bytes() == files["given"].read_bytes() != files["other"].read_bytes()


def test_a_resumed_run_keeps_its_template(chat_run: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    shutil.copytree(chat_run, output)
    base = ["train", "--model", "tiny", "--data", data, "--output", output, "--resume", "--save-steps", 2, *RUN]
    other = invoke(*base, "--template", "alpaca")
    assert other.exit_code != 0 and "template = 'alpaca', but" in flat(other) and "'chat'" in flat(other)
    done = invoke(*base)
    assert done.exit_code == 0, flat(done)
    assert "template 'chat': that of the run resumed" in flat(done)
    assert saved_template(output) == "chat"


def test_training_goes_on_and_tokens_are_counted_with_the_template_of_the_model(
    chat_run: Path, data: Path, tmp_path: Path
) -> None:
    done = invoke("train", "--model", chat_run, "--data", data, "--output", tmp_path / "next", *RUN)
    assert done.exit_code == 0 and saved_template(tmp_path / "next") == "chat", flat(done)
    taken, given = (
        json.loads(
            CliRunner().invoke(app, ["data", "stats", str(data), "--model", str(chat_run), "--json", *more]).stdout
        )
        for more in ([], ["--template", "chat"])
    )
    assert taken == given


@pytest.mark.parametrize("lora", [[], ["--lora-r", "2"]], ids=["full", "lora"])
def test_an_exported_checkpoint_brings_its_template_and_its_end(data: Path, tmp_path: Path, lora: list[str]) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    done = invoke(
        "train",
        "--model",
        "tiny",
        "--data",
        data,
        "--output",
        folder,
        "--template",
        "chat",
        "--save-steps",
        2,
        *RUN,
        *lora,
    )
    assert done.exit_code == 0, flat(done)
    exported = invoke("export", folder, tmp_path / "plain", *(["--model", "tiny"] if lora else []))
    assert exported.exit_code == 0, flat(exported)
    end = AutoTokenizer.from_pretrained(tmp_path / "plain").convert_tokens_to_ids("<|end|>")
    for place in (folder, tmp_path / "plain"):
        assert saved_template(place) == "chat"
        assert end in GenerationConfig.from_pretrained(place).eos_token_id


def test_one_default_and_a_warning_where_a_chat_template_is_not_used(data: Path, tmp_path: Path) -> None:
    for command in (
        ["score", "--model", "tiny", "--data", data],
        ["data", "stats", data, "--model", "tiny"],
    ):
        plain, none = invoke(*command), invoke(*command, "--template", "none")
        assert plain.exit_code == none.exit_code == 0
        assert UNUSED in flat(plain) and UNUSED not in flat(invoke(*command, "--template", "chat"))
    stats = [
        json.loads(CliRunner().invoke(app, ["data", "stats", str(data), "--model", "tiny", "--json", *more]).stdout)
        for more in ([], ["--template", "none"])
    ]
    assert stats[0] == stats[1]


def test_the_trainer_warns_and_takes_rows_and_datasets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model()
    config: Any = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    by_records = TunaTrainer(model, TunaConfig(**config), read_records(ROWS).records, None, tokenizer)
    assert UNUSED in caplog.text
    caplog.clear()
    dataset = datasets.Dataset.from_list(ROWS)
    for given in (dataset, ROWS):
        trainer = TunaTrainer(model, TunaConfig(**config, template="chat"), given, dataset, tokenizer)  # type: ignore[arg-type]
        assert [item.id for item in trainer.train_dataset] == [item.id for item in by_records.train_dataset]  # type: ignore[union-attr, attr-defined]
    assert UNUSED not in caplog.text and "6 of the 6 prompts held out are also trained on" in caplog.text
    with pytest.raises(ValueError, match="several splits, pass one of them: train, test"):
        TunaTrainer(model, TunaConfig(**config), datasets.DatasetDict(train=dataset, test=dataset), None, tokenizer)  # type: ignore[arg-type]


def test_ranks_that_are_reversed_are_told_before_training(data: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored.jsonl"
    assert invoke("score", "--model", "tiny", "--data", data, "--per-record", scored).exit_code == 0
    own = {row["id"]: row["scores"] for row in map(json.loads, scored.read_text().splitlines())}
    for name, sign, told in (("right", 1, False), ("reversed", -1, True)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{**row, "scores": [sign * score for score in own[str(row["id"])]]} for row in ROWS]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for more in ([], ["--eval-fraction", "0.4"]):
            done = invoke(
                "train", "--model", "tiny", "--data", file, "--output", tmp_path / f"{name}{len(more)}", *RUN, *more
            )
            assert done.exit_code == 0, flat(done)
            assert ("ranks 0% of the pairs as the data does" in flat(done)) is told


def test_reversed_is_below_a_half() -> None:
    assert reversed_notice(None) is reversed_notice(0.5) is reversed_notice(float("nan")) is None
    assert "49%" in str(reversed_notice(0.49))


def test_the_sample_is_small_and_has_pairs() -> None:
    groups = [TokenizedGroup(str(i), Group([1] * 100, [[2], [3]], scores=[i % 2, 0]), 0) for i in range(400)]
    chosen = sample_of(groups)
    assert 1 < len(chosen) <= 32 and {int(item.id) % 2 for item in chosen} == {1}
    assert int(chosen[-1].id) > 300, "from all over the data"
    assert sample_of(groups[:1]) == []


def test_a_limit_that_cuts_more_than_a_tenth_is_named(data: Path, tmp_path: Path) -> None:
    records = read_records(ROWS).records
    tokenizer = tiny_model()[1]
    for limit, told in ((7, True), (64, False)):
        groups, _ = tokenize_records(records, tokenizer, template="none", max_length=limit, on_bad="skip")
        assert (cut_notice(groups, limit) is not None) is told
    done = invoke("score", "--model", "tiny", "--data", data, "--max-length", 7)
    assert "are cut to max_length = 7 tokens" in flat(done)
    prompt = invoke("score", "--model", "tiny", "--data", data, "--max-length", 2)
    assert "leaves no room for a response in max_length = 2" in flat(prompt)


def test_the_server_ranks_as_the_run_was_trained(chat_run: Path) -> None:
    model, tokenizer = load_model(chat_run)
    engine = Engine(model, tokenizer)
    body = {"prompt": "Say 1", "responses": ["red cat", "tree"]}
    with TestClient(create_app(engine, "m", template="chat"), base_url="http://localhost") as client:
        taken = client.post("/v1/rank", json=body).json()["results"]
        given = client.post("/v1/rank", json={**body, "template": "chat"}).json()["results"]
        plain = client.post("/v1/rank", json={**body, "template": "none"}).json()["results"]
    assert taken == given != plain


def test_a_model_without_a_chat_template_needs_no_warning() -> None:
    tokenizer = tiny_model()[1]
    assert unused_chat_template("none", tokenizer) is not None and unused_chat_template("chat", tokenizer) is None
    tokenizer.chat_template = None
    assert unused_chat_template("none", tokenizer) is None is unused_chat_template("none", None)
