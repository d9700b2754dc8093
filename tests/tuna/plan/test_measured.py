"""A plan predicts the memory that a real step on this machine takes, within 15 %."""

from __future__ import annotations

import pytest
import torch

from tests.tuna.plan.models import CONFIGS, WORKLOAD, config_of, real_model
from tuna.compare.memory_meter import allocator_peak
from tuna.plan.cards import find_card
from tuna.plan.planner import Planner
from tuna.plan.settings import PlanRequest, StepSettings
from tuna.plan.simulate import Simulator
from tuna.plan.steps import prepared_step
from tuna.plan.workload import METHODS, Method

LIMIT = 0.15


# Each model both ways takes minutes: by default the second is measured without checkpointing, the others with it.
CASES = [(name, i != 1) for i, name in enumerate(CONFIGS)]
OTHERS = [pytest.param(name, not way, marks=pytest.mark.slow) for name, way in CASES]


@pytest.mark.parametrize(("name", "checkpointing"), [*CASES, *OTHERS])
@pytest.mark.parametrize("method", METHODS)
def test_a_real_step(name: str, method: Method, checkpointing: bool) -> None:
    """Both for what a step takes beyond the model's states, and for everything together."""
    settings = StepSettings(
        method=method,
        dtype=torch.float32,
        checkpointing=checkpointing,
        preset="released",
        attention_backend="auto",
        head_backend="auto",
    )
    groups = 3
    predicted = Planner(Simulator(config_of(name))).plan(PlanRequest(find_card("a100-80"), WORKLOAD, groups, settings))

    model = real_model(name, settings)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # the default of transformers; no temporaries
    optimizer.step()  # makes its states
    step = prepared_step(WORKLOAD.batch(groups, method), settings)

    def call() -> None:
        step(model, None)
        optimizer.step()

    taken = allocator_peak(call)
    tensors = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    states = sum(t.numel() * t.element_size() for t in tensors if t is not None)
    assert predicted.step.peak == pytest.approx(taken, rel=LIMIT)
    assert predicted.states.held + predicted.step.peak == pytest.approx(states + taken, rel=LIMIT)
