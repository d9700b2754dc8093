"""Model states under ZeRO: the arithmetic of DeepSpeed's own estimators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tuna.plan.cards import find_card
from tuna.plan.settings import PlanRequest, Sharding, StepSettings
from tuna.plan.simulate import ModelCounts
from tuna.plan.states import StateMemory, model_states, optimizer_bytes
from tuna.plan.workload import Workload

PARAMETERS = 6_738_415_616
LARGEST = 32000 * 4096
COUNTS = ModelCounts(PARAMETERS, PARAMETERS, LARGEST, 202_383_360, LARGEST)
WHOLE = 1 << 62


def _states(stage: int, gpus: int, offload: str = "none") -> StateMemory:
    sharding = Sharding(gpus, gpus, stage, offload, bucket=0)  # type: ignore[arg-type]
    return model_states(COUNTS, sharding, sub_group=WHOLE)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_agrees_with_deepspeeds_estimators(gpus: int) -> None:
    """Within 1 %, in its convention of 18 bytes a parameter.

    In stage 3 it adds the largest layer, counts gradients in float32 alone and knows no sub-groups.
    """
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    host, theirs = zero2(PARAMETERS, num_gpus_per_node=gpus, cpu_offload=False)
    assert _states(2, gpus).at_update == pytest.approx(theirs, rel=0.01)
    host, theirs = zero2(PARAMETERS, num_gpus_per_node=gpus, cpu_offload=True)
    ours = _states(2, gpus, "optimizer")
    assert ours.at_update == pytest.approx(theirs, rel=0.01)
    if gpus <= 4:  # beyond, it adds a float32 copy of the model for each GPU
        assert ours.host == pytest.approx(host, rel=0.01)

    _, theirs, largest = zero3(PARAMETERS, LARGEST, num_gpus_per_node=gpus, cpu_offload=False)
    ours = _states(3, gpus)
    assert ours.at_update - ours.buffers - ours.gradients + largest == pytest.approx(theirs, rel=0.01)
    host, theirs, largest = zero3(PARAMETERS, LARGEST, num_gpus_per_node=gpus, cpu_offload_params=False)
    ours = _states(3, gpus, "optimizer")
    assert ours.at_update - ours.buffers - ours.gradients + largest == pytest.approx(theirs, rel=0.01)
    assert ours.host == pytest.approx(host, rel=0.01)
    host, theirs, largest = zero3(PARAMETERS, LARGEST, num_gpus_per_node=gpus, cpu_offload_params=True)
    ours = _states(3, gpus, "all")
    assert ours.at_update - ours.buffers - ours.gradients + largest == pytest.approx(theirs, rel=0.01)
    assert ours.host == pytest.approx(host, rel=0.01)


def test_bytes_of_each_optimizer() -> None:
    """Weights and gradients come on top: 16, 10 and 10 bytes a parameter in bfloat16, 16 in float32."""
    assert optimizer_bytes("adamw", torch.bfloat16) == 12
    assert optimizer_bytes("adamw", torch.float32) == 8
    assert optimizer_bytes("kahan", torch.bfloat16) == 6
    assert optimizer_bytes("adamw8bit", torch.bfloat16) == pytest.approx(6.03, abs=0.01)
    with pytest.raises(ValueError, match=r"'kahan' keeps bfloat16 states; weights are torch\.float32"):
        optimizer_bytes("kahan", torch.float32)
    with pytest.raises(ValueError, match="optimizer = 'sgd' is not one of"):
        optimizer_bytes("sgd", torch.bfloat16)  # type: ignore[arg-type]


def test_stages_part_what_they_say() -> None:
    whole, one, two, three = (_states(stage, 4) for stage in range(4))
    assert one.optimizer == whole.optimizer // 4 and one.gradients == whole.gradients
    assert two.gradients == whole.gradients // 4 and two.weights == whole.weights
    assert three.weights == whole.weights // 4


def test_frozen_weights_have_no_states() -> None:
    counts = ModelCounts(PARAMETERS, 10**7, LARGEST, 202_383_360, LARGEST)
    states = model_states(counts, Sharding(), trainable_dtype=torch.float32)
    assert states.weights == 2 * (PARAMETERS - 10**7) + 4 * 10**7
    assert (states.gradients, states.optimizer, states.gradient_copy) == (4 * 10**7, 8 * 10**7, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 0}, "gpus = 0 must be at least 1"),
        ({"stage": 4}, "zero = 4 is not one of"),
        ({"offload": "disk"}, "offload = 'disk' is not one of"),
        ({"offload": "optimizer"}, "offload = 'optimizer' needs zero = 1, 2 or 3"),
        ({"offload": "all", "stage": 2}, r"offload = 'all' needs zero = 3 \(given: 2\)"),
    ],
)
def test_impossible_shardings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sharding(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlanRequest(find_card("v100"), Workload(), host_memory=-1), "host_memory = -1 must be at least 0"),
        (lambda: PlanRequest(find_card("v100"), Workload(), groups=0), "groups = 0 must be at least 1"),
        (lambda: StepSettings(lora_rank=0), "lora_r = 0 must be at least 1"),
        (lambda: StepSettings(candidates_per_pass=0), "candidates_per_pass = 0 must be at least 1"),
    ],
)
def test_impossible_requests_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
