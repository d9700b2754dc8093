"""Laws of the two ways through a micro-batch: two phases take the same memory whatever the number of candidates, and
what `ActivationModel` estimates, by which ``memory="auto"`` chooses, is near what the allocator is asked for.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.two_phase_memory import one_group, peaks, small_llama
from tuna.train.memory_mode import ActivationModel
from tuna_kernels import pack_groups


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_against_the_number_of_candidates(checkpointed: bool) -> None:
    model = small_llama(4)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    estimate = ActivationModel.of(model.config, torch.float32, checkpointed=checkpointed, logits_budget=0)
    one, two = [], []
    for k in (4, 16):
        group = one_group(k, prompt=48, response=48)
        tree, found = pack_groups([group]), peaks(model, group, ("one pass", "two phases"))
        one.append(found["one pass"])
        two.append(found["two phases"])
        assert estimate.one_pass(tree) == pytest.approx(one[-1], rel=0.2)
        assert estimate.two_phase(tree, 1) == pytest.approx(two[-1], rel=0.4)
    assert one[1] > 2.5 * one[0]
    assert two[1] < 1.15 * two[0] < one[0]
