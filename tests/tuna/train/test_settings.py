"""Laws of settings: what would do nothing is refused or warned of by name, YAML is read as people write it, and what
the user got wrong ends with one message and 2."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tuna.cli import main
from tuna.cli.messages import install_hint, message
from tuna.console.next import next_command
from tuna.models import hub
from tuna.system.settings_text import parse_yaml, read_settings_file
from tuna.train.config import TunaConfig
from tuna.train.deepspeed import read_settings
from tuna.train.run_settings import merge_settings
from tuna_kernels import tree_attention

ON_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without an accelerator")


def config(**settings: Any) -> TunaConfig:
    return TunaConfig(**{"output_dir": "out", "use_cpu": True, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fp16": True}, "fp16 = True would have no effect: training in float16"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: even_batches"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"use_cache": True}, "use_cache"),
        ({"prediction_loss_only": True}, "prediction_loss_only"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics"),
        ({"label_names": ["a"]}, "label_names"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
        ({"do_predict": True}, "do_predict"),
        ({"eval_steps": 5}, "eval_steps = 5 would have no effect: eval_strategy"),
        ({"eval_delay": 5}, "eval_delay"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps"),
        ({"save_total_limit": 2, "save_strategy": "no"}, "save_total_limit"),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, "logging_steps"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "checkpointing_kwargs"),
        ({"fsdp_config": {"min_num_params": 5}}, "fsdp_config"),
        ({"hub_model_id": "a"}, "hub_model_id = 'a' would have no effect: push_to_hub"),
        ({"hub_token": "secret"}, "hub_token would have no effect"),
        ({"do_eval": True}, "do_eval"),
        ({"log_level": "loud"}, "log_level = 'loud' is not one of"),
        ({"torch_compile_mode": "fast"}, "torch_compile_mode = 'fast' is not one of default"),
        ({"max_steps": 0}, "max_steps = 0 must be at least 1"),
        ({"num_train_epochs": 0.0}, "num_train_epochs = 0.0 must be above 0"),
        ({"save_steps": 0}, "save_steps = 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1.0"),
        ({"save_total_limit": 0}, "save_total_limit = 0"),
        ({"project": "x"}, "project = 'x' would have no effect: report_to"),
        ({"report_to": 5}, "report_to = 5 must be a name"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
        ({"optim_args": "a=b"}, "optim_args"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules"),
        ({"auto_find_batch_size": True, "tokens_per_batch": 9}, "auto_find_batch_size"),
        ({"report_to": "wandb"}, "report_to = 'wandb' needs a package that is missing: pip install wandb"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps = 5 would have no effect: lr_scheduler"),
        ({"torch_empty_cache_steps": 3}, "torch_empty_cache_steps"),
        ({"greater_is_better": True, "eval_strategy": "epoch"}, "greater_is_better"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint = True would have no effect: SIGTERM"),
        ({"local_rank": 2}, "local_rank = 2 would have no effect"),
        ({"ddp_backend": "gloo"}, "ddp_backend = 'gloo' would have no effect: there is one process"),
        ({"debug": "underflow_overflow"}, "debug = "),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate = inf must be a finite number"),
        ({"report_to": "nobody"}, "report_to = 'nobody' is not one of"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        (
            {"lr_scheduler_kwargs": {"bogus": 1}},
            "lr_scheduler_kwargs has 'bogus'; the schedule 'cosine' accepts num_cycles",
        ),
    ],
)
def test_a_setting_without_effect_is_refused_by_its_name(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.get("report_to") == "wandb":
        monkeypatch.setattr("tuna.train.effects.find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        config(**settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_steps": 3, "num_train_epochs": 2.0}, "num_train_epochs"),
        ({"tokens_per_batch": 99, "per_device_train_batch_size": 4}, "per_device_train_batch_size"),
        ({"memory": "one_pass", "candidates_per_pass": 2}, "candidates_per_pass"),
        ({"memory": "one_pass", "skip_inactive": False}, "skip_inactive"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters"),
        ({"run_name": "a"}, "run_name"),
    ],
)
def test_a_setting_that_another_overrides_is_warned_of(
    settings: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tuna.train.effects"):
        config(**settings)
    assert [record.getMessage().partition(" = ")[0] for record in caplog.records] == [name]


def test_what_has_an_effect_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tuna.train.effects"):
        config()
        config(bf16=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
        config(
            eval_strategy="steps", eval_steps=5, metric_for_best_model="loss", memory="two_phase", skip_inactive=False
        )
        config(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}, adam_beta2=0.95)
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: {min_lr: 1e-5}}", {"a": {"min_lr": 1e-5}}),
        ("[1E5, -2e3, +.5e-1, 1.e3, 1.5e-3]", [1e5, -2e3, 0.05, 1e3, 1.5e-3]),
        ("{a: 1e, b: e5, c: 0x1e5, d: 1-e5}", {"a": "1e", "b": "e5", "c": 0x1E5, "d": "1-e5"}),
        ('{"a": "1e-5"}', {"a": "1e-5"}),
        ("{<<: {a: 1}, a: 2}", {"a": 2}),
    ],
)
def test_yaml_numbers_are_numbers_at_any_depth(text: str, value: Any) -> None:
    assert parse_yaml(text, "text") == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed: 1\nseed: 2", "duplicate key"),
        (b"a:\n  b: {c: 1, c: 2}", "duplicate key"),
        (b"a:\n\tb: 1", "not valid YAML"),
        (b"a: \xff", "not UTF-8 text (byte 4)"),
        (b"- 1", "not a list"),
        (b"a: " + b"[" * 3000, "nested too deeply"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"1: 2", "the key 1 is not text"),
    ],
)
def test_a_settings_file_that_cannot_be_read_says_why(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_settings_file(file, "settings file")
    assert words in str(error.value) and str(file) in str(error.value)
    with pytest.raises(ValueError, match="is a folder"):
        read_settings_file(tmp_path, "settings file")


def test_numbers_under_deepspeed_and_in_its_files_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ndata: a\noutput_dir: b\ndeepspeed:\n  zero_optimization: {reduce_bucket_size: 2e8}\n"
    )
    _, settings = merge_settings(tmp_path / "run.yaml", [], {})
    assert settings["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 2e8
    (tmp_path / "zero.yaml").write_text(
        "zero_optimization: {stage: 2, reduce_bucket_size: 2e8}\ngradient_clipping: 1e0\n"
    )
    assert read_settings(tmp_path / "zero.yaml")["gradient_clipping"] == 1.0


@pytest.mark.parametrize("wrong", ["bf16: true", "zero_optimization: 2", "optimizer: adam"])
def test_deepspeed_settings_of_the_wrong_kind_are_named(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "zero.yaml").write_text(f"gradient_clipping: auto\n{wrong}\n")
    with pytest.raises(ValueError, match=rf"{wrong.partition(':')[0]}.* must be keys and values"):
        read_settings(tmp_path / "zero.yaml")


def test_booleans_stay_booleans_and_words_words() -> None:
    base = {"model": "tiny", "data": "a", "output_dir": "b"}
    given = ["fsdp=true", "save_strategy=no", "report_to=no", "bf16=yes"]
    _, settings = merge_settings(None, given, base)
    assert settings["fsdp"] is True and settings["bf16"] is True
    assert (settings["save_strategy"], settings["report_to"]) == ("no", "none")
    for wrong, words in (("template=true", "must be text"), ("zero_optimization={}", "under 'deepspeed'")):
        with pytest.raises(ValueError, match=words):
            merge_settings(None, [wrong], base)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command that fails by a user's error says."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "responses": ["a", "b c"], "scores": [1, 2]} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


@ON_CPU
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "triton"], "backend = 'triton' does not support"),
        (["--set", "tree_attention=flash"], "backend = 'flash' does not support"),
        (["--eval-steps", "1"], "--eval-steps needs held-out data: give --eval-data or --eval-fraction"),
        (["--set", "eval_on_start=true"], "eval_on_start needs held-out data"),
        (["--no-eval-first"], "--eval-first = False"),
        (["--lora-alpha", "4"], "--lora-alpha = 4"),
        (["--set", "disable_tqdm=false"], "disable_tqdm"),
        (["--set", "do_train=false"], "do_train = False would have no effect"),
        (["--resume", "--overwrite"], "resume and overwrite are both given"),
        (["--resume", "--set", "resume_from_checkpoint=a"], "resume_from_checkpoint = a are both given"),
        (["--allow-changes"], "--allow-changes would have no effect: this run goes on from no checkpoint"),
        (["--trust-checkpoint"], "--trust-checkpoint would have no effect"),
        (["--lora-r", "2", "--lora-alpha", "0"], "--lora-alpha = 0 must be at least 1"),
        (["--margin", "nan"], "--margin = nan"),
        (["--margin", "0.3", "--set", "mle_weight=-1"], "mle_weight = -1"),
        (["--set", "accelerator_config=5"], "accelerator_config = 5 must be keys"),
        (["--set", "accelerator_config={bogus: 1}"], "cannot be used"),
        (["--epochs", "0", "--groups", "0"], "--groups = 0 must be"),
    ],
)
def test_errors_of_training_are_one_message(
    arguments: list[str], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "--model", "tiny", "--data", data, "--output", tmp_path / "out", "--yes", "--steps", 1]
    if "--groups" in arguments:
        base = base[:-2]
    assert words in run(capsys, *base, *arguments)


def test_empty_held_out_data_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    said = run(capsys, "train", "--model", "tiny", "--data", data, "--output", tmp_path / "out", "--yes",
               "--eval-data", tmp_path / "empty.jsonl")  # fmt: skip
    assert "--eval-data = " in said and "holds no records" in said


def test_errors_have_the_names_that_were_typed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "train", "--model", "tiny", "--data", data, "--output", data, "--yes")
    assert "--output = " in said and "output_dir" not in said
    (tmp_path / "run.yaml").write_text(f"model: tiny\ndata: {data}\noutput_dir: {data}\n")
    assert "output_dir = " in run(capsys, "train", "--config", tmp_path / "run.yaml")
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    assert "--gpu = 'foo'" in run(capsys, "plan", "--model", "tiny", "--gpu", "foo")
    assert "--json = " in run(capsys, "score", "--model", "tiny", "--data", data, "--json", data)
    assert "--on-bad skip" in run(
        capsys, "score", "--model", "tiny", "--data", tmp_path / "bad.jsonl", "--format", "tuna"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--model", "tiny", "--template", "none"], "--template would have no effect: it needs --data"),
        (["plan", "--model", "tiny", "--data", "a", "-k", "3"], "would have no effect: --data decides it"),
        (["rank", "--data", "a", "--output", "b.jsonl", "--max-length", "9"], "--max-length would have no effect"),
        (
            ["sample", "--instructions", "a", "--model", "tiny", "--output", "b", "--concurrency", "2"],
            "--concurrency would",
        ),
        (["data", "stats", "a", "--max-length", "9"], "--max-length would have no effect"),
        (["data", "split", "a", "--output", "b", "--like", "c", "--seed", "1"], "--seed would have no effect"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    assert words in run(capsys, *(str(data) if word == "a" else word for word in arguments))


def test_a_backend_that_cannot_serve_is_a_wrong_value_too() -> None:
    q = torch.zeros(1, 1, 2, 4)
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="backend = 'flash' does not support this call"):
            tree_attention(q, q, q, torch.tensor([2, 2]), backend="flash")


def test_missing_packages_are_named_with_their_extra() -> None:
    missing = ModuleNotFoundError(name="rouge_score.rouge_scorer")
    assert message(missing, [], None) == "rouge_score is not installed: pip install 'tuna-kernels[gather]'"
    assert install_hint("fastapi") == install_hint("uvicorn") == "pip install 'tuna-kernels[serve]'"
    assert install_hint("rouge_score.rouge_scorer") == "pip install 'tuna-kernels[gather]'"
    assert install_hint("flash_attn") == "pip install 'tuna-kernels[flash]'"
    assert install_hint("yaml") == "pip install 'tuna-kernels[train]'"
    assert install_hint("wandb") == "pip install wandb"


def test_names_on_the_hub_are_answered_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    class Unreachable:
        def model_info(self, name: str, timeout: float) -> None:
            calls.append(name)
            raise ConnectionError("no network")

    monkeypatch.setattr(hub, "HfApi", Unreachable)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(FileNotFoundError, match="did you mean 'smollm2-135m'"):
        hub.hub_model("smollm2-135", ("smollm2-135m", "tiny"))
    assert not calls
    with pytest.raises(FileNotFoundError, match=r"unreachable \(no network\); names that do not need the hub: tiny"):
        hub.hub_model("a/b", ("tiny",))
    assert calls == ["a/b"]
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: str(tmp_path / file))
    assert hub.hub_model("a/b", ()) == str(tmp_path)  # the copy that is kept
    monkeypatch.setattr(Unreachable, "model_info", lambda *args, **kwargs: None)
    assert hub.hub_model("a/b", ()) == "a/b"


def test_the_log_has_lines_in_a_short_run_and_the_end_names_what_follows(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "tiny", "--data", str(data), "--output", str(tmp_path / "out"), "--yes"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in log) >= 5  # of 6 steps
    assert said.strip().splitlines()[-1].startswith("next: tuna score --model ")


def test_a_next_command_can_be_pasted() -> None:
    assert next_command("train", data="a b.jsonl", yes=True, limit=None) == "tuna train --data 'a b.jsonl' --yes"
