"""A simulated step: linear in layers, the known point of the baseline, what sharing and the fused head save."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tuna.plan.models import CONFIGS, WORKLOAD, config_of
from tuna.plan.settings import StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.sizes import at_depth, explicit_config, layer_period, model_config
from tuna.plan.tracker import StepTracker
from tuna.plan.workload import METHODS, Method, Workload
from tuna_kernels import Group, linear_logprobs

GIB = 2**30


@pytest.mark.parametrize("lora", [None, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_two_depths_say_what_all_layers_do(method: Method, lora: int | None) -> None:
    """Exact but for a moment between the first and the last layer, which is never the peak."""
    config = at_depth(config_of("deep, tied, grouped"), 6)
    settings, workload = StepSettings(method=method, lora_rank=lora, candidates_per_pass=2), Workload(4, 50, 40)
    quick, whole = (Simulator(config, whole=whole).step(workload, 2, settings) for whole in (False, True))
    assert (quick.peak, quick.peak_at, quick.saved) == (whole.peak, whole.peak_at, whole.saved)
    assert quick.flops == whole.flops
    assert all(whole.moments[name] == value for name, value in quick.moments.items())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_layers_of_llama_7b(method: Method) -> None:
    settings, workload = StepSettings(method=method), Workload(5, 128, 128)
    quick, whole = (
        Simulator(model_config("llama-7b"), whole=whole).step(workload, 2, settings) for whole in (False, True)
    )
    assert (quick.peak, quick.flops) == (whole.peak, whole.flops)


def test_layers_of_two_kinds_repeat() -> None:
    gemma = {"model_type": "gemma2", "num_hidden_layers": 5, "head_dim": 16, "sliding_window": 32}
    config = AutoConfig.for_model(
        **gemma, vocab_size=500, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    assert layer_period(config) == 2
    assert at_depth(config, 3).layer_types == config.layer_types[:3]
    settings = StepSettings()
    quick, whole = (Simulator(config, whole=whole).step(WORKLOAD, 1, settings) for whole in (False, True))
    assert (quick.peak, quick.flops) == (whole.peak, whole.flops)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_right(name: str) -> None:
    model = AutoModelForCausalLM.from_config(config_of(name))
    assert Simulator(config_of(name)).counts().parameters == sum(p.numel() for p in model.parameters())


def test_llama_7b_is_llama_7b() -> None:
    counts = Simulator(model_config("llama-7b")).counts()
    assert counts.parameters == counts.trainable == 6_738_415_616
    assert counts.head == 32000 * 4096
    with_adapters = Simulator(model_config("llama-7b")).counts(lora_rank=8)
    assert with_adapters.trainable == 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_the_baseline_at_its_own_batch() -> None:
    """16 groups of 5 x 512 tokens in fp16: about 33 GiB, of which the layers' inputs are 10."""
    workload, settings = Workload(5, 256, 256), StepSettings("baseline", torch.float16)
    step = Simulator(model_config("llama-7b")).step(workload, 16, settings)
    inputs = 32 * 16 * 5 * 512 * 4096 * 2
    assert step.tokens == 40960 and step.peak_at == "head and loss"
    assert 29 * GIB < step.peak < 35 * GIB
    assert inputs <= step.saved < 1.15 * inputs
    logits = 40960 * 32000
    assert step.peak - step.saved == pytest.approx(16 * logits, rel=0.05)  # 16 bytes a logit: PRIOR_ART's figure


def test_what_sharing_and_the_fused_head_save() -> None:
    simulator, workload = Simulator(model_config("llama-7b")), Workload(5, 256, 256)
    baseline, unshared, shared, phases = (simulator.step(workload, 4, StepSettings(m)) for m in METHODS)
    rho = 5 * 512 / (256 + 5 * 256)
    assert unshared.tokens / shared.tokens == pytest.approx(rho)
    assert unshared.saved / shared.saved == pytest.approx(rho, rel=0.05)
    assert unshared.flops / shared.flops == pytest.approx(rho, rel=0.05)
    assert baseline.peak > unshared.peak > shared.peak > phases.peak
    assert phases.flops / shared.flops == pytest.approx(1.25, rel=0.05)


def test_two_phase_grows_with_candidates_per_pass() -> None:
    simulator, workload = Simulator(config_of("qwen2")), Workload(4, 100, 100)
    settings = StepSettings("two_phase", checkpointing=False)
    peaks = [simulator.step(workload, 1, replace(settings, candidates_per_pass=count)).peak for count in (1, 2, 4)]
    assert peaks == sorted(peaks) and peaks[0] < 0.6 * peaks[-1]


def test_without_checkpointing_every_activation_is_kept() -> None:
    """186 kB a token and layer of LLaMA-7B in half precision (PRIOR_ART: about 5.7 MiB a token)."""
    simulator, workload = Simulator(model_config("llama-7b")), Workload(5, 256, 256)
    step = simulator.step(workload, 1, StepSettings("unshared", checkpointing=False))
    assert step.saved / step.tokens / 2**20 == pytest.approx(5.7, rel=0.1)


def test_real_groups_give_the_heaviest_batch() -> None:
    groups = [Group([1] * n, [[2] * n, [3] * n], ranks=[0, 1]) for n in (3, 50, 4, 5, 6, 7)]
    batch = Workload(groups=tuple(groups)).batch(2, "one_pass")
    assert groups[1] in batch
    with pytest.raises(ValueError, match="groups = 7 is more than the 6 groups of the data"):
        Workload(groups=tuple(groups)).batch(7, "one_pass")


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(FileNotFoundError, match="neither a path nor one of llama-7b"):
        model_config("llama-7c")
    with pytest.raises(ValueError, match="also needs intermediate_size"):
        explicit_config(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="hidden_size = 9 is not a multiple of num_attention_heads = 2"):
        explicit_config(vocab_size=10, hidden_size=9, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="prompt_tokens = 0 must be at least 1"):
        Workload(5, 0, 5)


@pytest.mark.parametrize("frozen", [False, True])
def test_products_of_the_head_are_counted(frozen: bool) -> None:
    """Forward one, backward three: logits again, two gradients. Of a frozen head two in all, its unit gradient kept."""
    hidden, weight = torch.ones(20, 8, requires_grad=True), torch.ones(50, 8, requires_grad=not frozen)
    tracker = StepTracker()
    with tracker:
        linear_logprobs(hidden, weight, torch.zeros(20, dtype=torch.int64), backend="torch").sum().backward()
    assert tracker.flops == (2 if frozen else 4) * 2 * 20 * 50 * 8
