"""Laws of `TunaTrainer`: a step does not depend on how it is split into micro-batches; it equals the baseline
step; training can be interrupted; what is saved is a plain transformers model; figures logged are true.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.tuna.tiny_gpt2 import tiny_gpt2
from tuna.compare.baseline import baseline_step_loss
from tuna.data.batching import GroupBatchSampler
from tuna.data.tokenization import TokenizedGroup
from tuna.models.loading import tiny_model
from tuna.score.metrics import ScoredGroups, loss_parts, ranking_metrics
from tuna.train.config import TunaConfig
from tuna.train.trainer import TunaTrainer
from tuna_kernels import Group, pack_groups

VOCABULARY = 61


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def ragged(number: int, seed: int = 0) -> list[TokenizedGroup]:
    """Groups of one to four responses of different lengths, with ties."""
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> np.ndarray[Any, Any]:
        return rng.integers(3, VOCABULARY, rng.integers(1, most + 1))

    return [
        TokenizedGroup(
            str(i),
            Group(tokens(6), [tokens(9) for _ in range(1 + i % 4)], scores=rng.integers(0, 3, 1 + i % 4)),
            0,
        )
        for i in range(number)
    ]


def config(folder: Path, **changes: Any) -> TunaConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    return TunaConfig(**{**defaults, **changes})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def figures(trainer: TunaTrainer) -> list[dict[str, float]]:
    """The log without what measures time."""
    timed = ("tokens/s", "runtime", "per_second", "total_flos")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in trainer.state.log_history]


def one_step(folder: Path, groups: list[TokenizedGroup], **changes: Any) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after one step of plain gradient descent with rate 1, and the loss logged.

    With such a step the difference of the weights is the gradient itself.
    """
    model = tiny_gpt2(VOCABULARY)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = TunaTrainer(model, config(folder, max_steps=1, **changes), groups, optimizers=(optimizer, schedule))
    trainer.train()
    return weights(model), trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_splitting_a_step_changes_nothing(tmp_path: Path, preset: str) -> None:
    groups = ragged(4)
    whole, whole_loss = one_step(tmp_path, groups, preset=preset, per_device_train_batch_size=4)
    for micro, steps in ((1, 4), (2, 2), (3, 2)):
        split, split_loss = one_step(
            tmp_path,
            groups,
            preset=preset,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
        )
        # The stock trainer sums the losses of micro-batches in float32.
        assert split_loss == pytest.approx(whole_loss, rel=8 * torch.finfo(torch.float32).eps)
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=0, atol=1e-12, msg=f"{micro}x{steps}: {name}")


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_step_equals_the_baseline_step(tmp_path: Path, preset: str) -> None:
    groups = ragged(5, seed=1)
    settings = {"preset": preset, "margin": 0.3, "length_penalty": 1.1, "mle_weight": 0.7}
    ours, logged = one_step(tmp_path, groups, per_device_train_batch_size=2, gradient_accumulation_steps=3, **settings)
    model = tiny_gpt2(VOCABULARY)
    baseline = baseline_step_loss(model, [item.group for item in groups], **settings)
    baseline.loss.backward()
    # The stock trainer sums the losses of micro-batches in float32.
    assert logged == pytest.approx(baseline.loss.item(), rel=8 * torch.finfo(torch.float32).eps)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # float64 roundings of sums over some hundred terms of order one
        torch.testing.assert_close(ours[name], parameter.detach() - parameter.grad, rtol=0, atol=1e-12, msg=name)


def test_the_last_step_of_an_epoch_may_be_short(tmp_path: Path) -> None:
    # 5 groups, 2 micro-batches of 2: the second step has the fifth group alone and must equal a batch of one.
    groups, plan = (
        ragged(5),
        GroupBatchSampler([item.group for item in ragged(5)], groups_per_batch=2, seed=42),
    )
    last = [groups[i] for i in list(plan)[-1]]
    model = tiny_llama()
    settings = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0)
    trainer = TunaTrainer(model, settings, groups)
    trainer.train()
    expected = baseline_step_loss(tiny_llama(), [item.group for item in last], preset="paper").loss.item()
    assert trainer.state.log_history[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_resumed_training_gives_the_same_numbers(tmp_path: Path) -> None:
    groups = ragged(10)
    common = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    straight = TunaTrainer(tiny_llama(), config(tmp_path / "a", **common, **schedule), groups, groups[:4])
    straight.train()
    saving = {**common, **schedule, "save_strategy": "steps", "save_steps": 1}
    TunaTrainer(tiny_llama(), config(tmp_path / "b", **saving), groups, groups[:4]).train()
    # Step 4 is in the middle of the second epoch of three steps; another start shows that weights are loaded.
    second = TunaTrainer(tiny_llama(seed=9), config(tmp_path / "b", **saving), groups, groups[:4])
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert figures(second)[:-1] == figures(straight)[:-1]  # the last line is about the call to train()
    for name, value in weights(straight.model).items():
        assert torch.equal(weights(second.model)[name], value), name


def test_training_learns_the_ranking(tmp_path: Path) -> None:
    groups = [item for item in ragged(12, seed=3) if len(item.group.responses) > 1]
    settings = config(tmp_path, num_train_epochs=20, mle_weight=0.0, tokens_per_batch=120, logging_steps=5)
    trainer = TunaTrainer(tiny_llama(), settings, groups, groups)
    before, _, after = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert before["eval_rank/accuracy"] < 0.8
    assert after["eval_rank/accuracy"] == after["eval_rank/top1"] == 1.0
    assert after["eval_loss"] < 0.1 * before["eval_loss"]
    assert after["eval_loss"] == after["eval_loss/rank"]


def test_groups_of_one_are_supervised_fine_tuning(tmp_path: Path) -> None:
    groups = [TokenizedGroup(str(i), Group([1, 2 + i], [[9, 8, 7 + i]]), 0) for i in range(4)]
    trainer = TunaTrainer(tiny_llama(), config(tmp_path, num_train_epochs=15), groups, groups)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss/mle"] < 0.3 < math.log(VOCABULARY)
    assert "eval_rank/accuracy" not in metrics
    generated = trainer.model.generate(torch.tensor([[1, 3]]), max_new_tokens=3, do_sample=False)
    assert generated[0, 2:].tolist() == [9, 8, 8]


def test_logged_figures_are_those_of_the_data(tmp_path: Path) -> None:
    groups = ragged(6)
    trainer = TunaTrainer(
        tiny_llama(),
        config(tmp_path, per_device_train_batch_size=3, learning_rate=0.0, logging_steps=2),
        groups,
    )
    trainer.train()
    line = trainer.state.log_history[0]
    plain = [item.group for item in groups]
    plan = list(GroupBatchSampler(plain, groups_per_batch=3, seed=42))
    trees = [pack_groups([plain[i] for i in batch]) for batch in plan]
    assert line["tokens/computed"] == sum(tree.num_tokens for tree in trees)
    assert line["tokens/saved"] == sum(tree.unshared_tokens - tree.num_tokens for tree in trees)
    longest = [max(len(plain[i].prompt) + len(y) for i in batch for y in plain[i].responses) for batch in plan]
    padded = [sum(len(plain[i].responses) for i in batch) * n for batch, n in zip(plan, longest, strict=True)]
    assert line["tokens/padded"] == sum(padded)
    baseline = [baseline_step_loss(tiny_llama(), [plain[i] for i in batch], preset="paper") for batch in plan]
    assert line["loss/rank"] == pytest.approx(np.mean([part.ranking.item() for part in baseline]), rel=1e-4)
    assert line["loss/mle"] == pytest.approx(np.mean([part.mle.item() for part in baseline]), rel=1e-4)
    assert line["loss"] == pytest.approx(line["loss/rank"] + line["loss/mle"], rel=1e-6)
    scored = trainer.score(groups)
    for name, value in ranking_metrics(scored).items():
        assert line[name] == pytest.approx(value, rel=1e-4), name
    assert 0 < line["active_share"] <= 1


def test_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    groups = ragged(9)
    results = []
    for changes in (
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 9},
        {"tokens_per_batch": 80},
    ):
        trainer = TunaTrainer(tiny_llama(), config(tmp_path, **changes), eval_dataset=groups)
        results.append(trainer.score(groups))
    for other in results[1:]:
        np.testing.assert_array_equal(other.ranks, results[0].ranks)
        np.testing.assert_array_equal(other.lengths, results[0].lengths)
        np.testing.assert_allclose(other.scores, results[0].scores, rtol=1e-5)
    baseline = baseline_step_loss(tiny_llama(), [item.group for item in groups])
    np.testing.assert_allclose(results[0].scores, baseline.scores.double().numpy(), rtol=1e-5)


def test_named_evaluation_sets(tmp_path: Path) -> None:
    groups = ragged(6)
    trainer = TunaTrainer(tiny_llama(), config(tmp_path), eval_dataset={"a": groups[:3], "b": groups[3:]})
    metrics = trainer.evaluate()
    for name, part in (("a", groups[:3]), ("b", groups[3:])):
        scored: ScoredGroups = trainer.score(part)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss_parts(scored).loss, rel=1e-6)
    assert trainer.evaluate("a", metric_key_prefix="x")["x_loss"] == metrics["eval_a_loss"]


def test_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    groups = ragged(8)
    settings = config(
        tmp_path,
        max_steps=6,
        learning_rate=0.3,  # wild enough that the last weights are not the best
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        load_best_model_at_end=True,
        metric_for_best_model="rank/accuracy",
    )
    trainer = TunaTrainer(tiny_llama(), settings, groups, groups)
    trainer.train()
    seen = [line["eval_rank/accuracy"] for line in trainer.state.log_history if "eval_rank/accuracy" in line]
    assert len(set(seen)) > 1
    assert trainer.state.best_metric == max(seen)
    assert trainer.evaluate()["eval_rank/accuracy"] == max(seen)


def test_saved_model_is_a_plain_one(tmp_path: Path) -> None:
    trainer = TunaTrainer(tiny_llama(), config(tmp_path, max_steps=2), ragged(4))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    assert loaded.config.use_cache
    for name, value in weights(trainer.model).items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    runs = []
    for changes in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer = TunaTrainer(tiny_llama(), config(tmp_path, max_steps=3, **changes), ragged(6))
        trainer.train()
        runs.append((weights(trainer.model), figures(trainer)))
    assert runs[0][1] == runs[1][1]
    for name, value in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], value, msg=name)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora_trains_the_adapter_alone(tmp_path: Path, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    groups = [item for item in ragged(8) if len(item.group.responses) > 1]
    adapter = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), adapter)
    before = weights(model)
    trainer = TunaTrainer(model, config(tmp_path, num_train_epochs=15, mle_weight=0.1), groups, groups)
    start, _, end = trainer.evaluate(), trainer.train(), trainer.evaluate()
    assert end["eval_loss"] < start["eval_loss"]
    changed = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert changed and all("lora_" in name for name in changed)
    assert {target for target in targets if any(target in name for name in changed)} == set(targets)
    # The merged model is a plain one and scores the same.
    scores = trainer.score(groups).scores
    merged = model.merge_and_unload()
    baseline = baseline_step_loss(merged.eval(), [item.group for item in groups])
    np.testing.assert_allclose(baseline.scores.double().numpy(), scores, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "rrhf"}, "preset = 'rrhf'"),
        ({"margin": -0.1}, "margin = -0.1"),
        ({"mle_weight": float("nan")}, "mle_weight = nan"),
        ({"max_length": 1}, "max_length = 1"),
        ({"share": "all"}, "share = 'all'"),
        ({"template": "no place"}, "template = 'no place'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch = 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


HARD: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("eager", {}),  # what is captured, run as it is: seconds
        pytest.param("aot_eager", {**HARD, "memory": "two_phase"}, marks=pytest.mark.slow),
        pytest.param("inductor", {}, marks=pytest.mark.slow),
        pytest.param("inductor", HARD, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_take_the_same_steps(tmp_path: Path, backend: str, changes: dict[str, Any]) -> None:
    torch._dynamo.reset()  # graphs of an earlier case would serve this one, and none be counted
    dynamo = torch._dynamo.utils.counters
    dynamo.clear()
    losses = []
    for compiled in ({}, {"torch_compile_backend": backend}):
        trainer = TunaTrainer(tiny_llama(), config(tmp_path, max_steps=4, **changes, **compiled), ragged(8), ragged(4))
        trainer.train()
        log = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses.append([*log, trainer.evaluate()["eval_loss"]])
        assert bool(dynamo["stats"]["unique_graphs"]) == bool(compiled)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    trainer.save_model(str(tmp_path / "plain"))
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) >= {"model.layers.0.mlp.up_proj.weight"}


def test_compiling_sharded_layers_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    zero3 = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0}
    with pytest.raises(ValueError, match="torch_compile is not supported under ZeRO-3"):
        config(tmp_path, torch_compile=True, deepspeed=zero3)


def test_bad_datasets_are_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    for wrong in ([3], [{"prompt": "a"}, ragged(1)[0]], [{"prompt": "a"}, 3]):
        with pytest.raises(TypeError, match="TokenizedGroup, Record or rows of records"):
            TunaTrainer(tiny_llama(), settings, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="records need a tokenizer"):
        TunaTrainer(tiny_llama(), settings, [{"prompt": "a", "responses": ["b"]}])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        TunaTrainer(tiny_llama(), settings).train()
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        TunaTrainer(tiny_llama(), settings).evaluate()
    with pytest.raises(ValueError, match="tokens_per_batch = 3 is too small"):
        TunaTrainer(tiny_llama(), config(tmp_path, tokens_per_batch=3), ragged(4)).train()


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings._n_gpu = 2  # what two GPUs in one process look like
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*torchrun"):
        TunaTrainer(tiny_llama(), settings, ragged(2))


def test_attention_dropout_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        TunaTrainer(model, config(tmp_path), ragged(2)).train()


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_two_phases_take_the_same_step(tmp_path: Path, preset: str) -> None:
    """Accumulated, several groups a micro-batch, two candidates a pass; and the log says so."""
    groups = ragged(5, seed=1)
    shape = {"preset": preset, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    whole, whole_loss = one_step(tmp_path, groups, memory="one_pass", **shape)
    split, split_loss = one_step(tmp_path, groups, memory="two_phase", candidates_per_pass=2, **shape)
    assert split_loss == pytest.approx(whole_loss, rel=8 * torch.finfo(torch.float32).eps)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-12, msg=name)


def test_auto_takes_two_phases_where_one_pass_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the two estimates of the largest micro-batch: it goes in two phases, smaller ones in one pass."""
    groups = ragged(4, seed=1)
    for free, two_phase in ((0, True), (1 << 50, False)):
        monkeypatch.setattr("tuna.train.memory_mode.free_bytes", lambda device, free=free: free)
        trainer = TunaTrainer(tiny_llama(), config(tmp_path, max_steps=1), groups)
        with caplog.at_level("INFO", logger="tuna.train.memory_mode"):
            trainer.train()
        assert ("memory/two_phase" in trainer.state.log_history[0]) is two_phase
        assert f"memory: {'two_phase' if two_phase else 'one_pass'} for a micro-batch" in caplog.text


def test_two_phases_and_dropout_exclude_each_other(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, attn_pdrop=0))
    with pytest.raises(ValueError, match=r"memory = 'two_phase': dropout = 0\.1"):
        TunaTrainer(model, config(tmp_path, memory="two_phase"), ragged(2))
    TunaTrainer(model, config(tmp_path), ragged(2))  # auto stays with one pass


def test_optimizers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().to(torch.bfloat16)
    before = weights(model)
    trainer = TunaTrainer(model, config(tmp_path, optim="adamw_kahan", max_steps=1), ragged(2))
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "AdamWKahan"  # type: ignore[union-attr]
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="pip install bitsandbytes"):
        patched.setattr("tuna.train.config.find_spec", lambda name: None)
        config(tmp_path, optim="paged_adamw_8bit")
    with pytest.raises(ValueError, match="one_pass"):
        config(tmp_path, optim="galore_adamw_layerwise")


@pytest.mark.parametrize("data", [torch.zeros(3), np.zeros(3)])
def test_data_without_a_truth_value_are_named_too(data: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(seed=1)
    config = TunaConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for sets in ({"train_dataset": data}, {"eval_dataset": data}):
        with pytest.raises(TypeError, match="all of one kind, not"):
            TunaTrainer(model, config, processing_class=tokenizer, **sets)
