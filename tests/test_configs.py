"""Laws: every configuration shipped is one that `tuna train` and DeepSpeed take; those that need no GPU train; every
launcher starts the same run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tuna import launching
from tests.tuna.train.zero_cases import EXAMPLES
from tuna.train import deepspeed
from tuna.train.config import TunaConfig
from tuna.train.run_settings import merge_settings

FOLDER = launching.ROOT / "configs"
RUNS = sorted(FOLDER.glob("*.yaml"))
HOLDER = """
import sys, tuna.train.deepspeed as zero
with zero.build_lock(zero.Path(sys.argv[1]), "cpu_adam"):
    print("in", flush=True)
    input()
"""
DEEPSPEED = sorted((FOLDER / "deepspeed").glob("*.yaml"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_runs_are_valid(file: Path) -> None:
    run, settings = merge_settings(file, [], {})
    assert file.read_text().startswith("# ")
    assert settings["output_dir"] == f"runs/{file.stem}" and run.data == "ranked.jsonl"
    assert settings["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    if "deepspeed" in settings:
        assert deepspeed.stage_of(deepspeed.read_settings(settings["deepspeed"])) in (1, 2, 3)
    else:
        assert run.lora_r > 0


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda file: file.stem)
def test_deepspeed_settings_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = deepspeed.read_settings(file)
    assert file.read_text().startswith("# ")
    assert str(deepspeed.stage_of(settings)) in file.stem
    assert settings["gradient_clipping"] == settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"
    known = set(DeepSpeedZeroConfig.model_fields)
    known |= {str(field.alias) for field in DeepSpeedZeroConfig.model_fields.values()}
    assert set(settings["zero_optimization"]) <= known  # DeepSpeed itself takes a mistyped key without a word
    DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert deepspeed.on_nvme(settings) == ("nvme" in file.stem)
    assert deepspeed.needs_cpu_adam(settings) == ("offload" in file.stem or "nvme" in file.stem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 1.0}, "zero_optimization.stage = 0"),
        ({"zero_optimization": {"stage": 2}}, "gradient_clipping is missing"),
        ({"zero_optimization": {"stage": 4}, "gradient_clipping": 0}, "zero_optimization.stage = 4"),
        (
            {"zero_optimization": {"stage": 1}, "gradient_clipping": 0, "train_batch_size": 8},
            "train_batch_size = 8 must be omitted",
        ),
        ([1], "not a list"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, settings: Any, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        deepspeed.read_settings(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such DeepSpeed settings file"):
        deepspeed.read_settings(tmp_path / "none.json")


def test_float16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0, "fp16": {"enabled": True}}
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"fp16.enabled is not supported without a GPU"):
        deepspeed.read_settings(settings)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert deepspeed.read_settings(settings) == settings


@pytest.mark.parametrize("file", DEEPSPEED, ids=lambda file: file.stem)
def test_float16_scales_the_loss(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp16 asked for, DeepSpeed gets dynamic loss scaling out of every file; running it takes a GPU."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.precision_config import get_float16_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = TunaConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args.fp16 = True  # refused where there is no GPU
    settings = HfTrainerDeepSpeedConfig({"train_micro_batch_size_per_gpu": "auto", **deepspeed.read_settings(file)})
    settings.trainer_config_process(args)
    fp16 = get_float16_config(settings.config)
    assert fp16.enabled and fp16.loss_scale == 0  # 0: found by trial, and steps that overflow are skipped
    assert fp16.initial_scale_power == 16
    assert settings.config["bf16"]["enabled"] is False


def test_a_stale_build_lock_is_removed_and_a_killed_holder_gives_way(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    stale = tmp_path / "py" / "cpu_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    start = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(
        start, env=launching.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    assert not stale.exists()
    stale.touch()  # what the builder leaves when it is killed
    holder.kill()
    holder.wait()
    with deepspeed.build_lock(tmp_path, "cpu_adam"):
        assert not stale.exists()


# Real runs


def tiny_words(folder: Path, config: Path) -> list[str]:
    words = f"train --config {config} --model tiny --data {EXAMPLES} --limit 12 --steps 2 --output {folder / 'run'}"
    return [*words.split(), "--template", "none", "--set", "tokens_per_batch=2000", "--set", "eval_fraction=0.2"]


@pytest.mark.slow
@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_runs_train_a_tiny_model(tmp_path: Path, file: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "configs")
    for settings_file in (tmp_path / "configs" / "deepspeed").glob("*.yaml"):
        settings = yaml.safe_load(settings_file.read_text())
        # Not compiled here: two minutes. The optimizer is torch's own then.
        settings["zero_force_ds_cpu_optimizer"] = False
        for part in ("offload_optimizer", "offload_param"):
            settings["zero_optimization"].get(part, {}).pop("pin_memory", None)
        settings_file.write_text(yaml.safe_dump(settings))
    ranks = 2 if yaml.safe_load(file.read_text()).get("deepspeed") else 0
    words = tiny_words(tmp_path, tmp_path / "configs" / file.name)
    launching.run(ranks, "tuna", [*words, "--set", "use_cpu=true"], cwd=tmp_path, timeout=900)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    before, after = (metrics[when]["eval_loss"] for when in ("before", "after"))
    # The first of two steps warms up; an adapter under the frozen random head hardly gets further than noise.
    assert before > after > 0 or (ranks == 0 and before != after > 0)
    assert (tmp_path / "run" / "model.safetensors").exists()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tuna"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29717", "--module", "tuna"],
    "accelerate": [
        *["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29718", "--module", "tuna"],
    ],
}


@pytest.mark.slow
def test_launchers_start_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    losses = {}
    for name, launcher in LAUNCHERS.items():
        folder = tmp_path / name
        folder.mkdir()
        words = tiny_words(folder, FOLDER / "multi_node.yaml")
        launching.run(0, launcher[0], [*launcher[1:], *words], cwd=folder, timeout=900)
        metrics = json.loads((folder / "run" / "metrics.json").read_text())
        losses[name] = [line["loss"] for line in metrics["log"] if "loss" in line] + [metrics["after"]["eval_loss"]]
        assert (folder / "run" / "log.jsonl").exists()
    assert losses["deepspeed"] == losses["torchrun"] == losses["accelerate"]
