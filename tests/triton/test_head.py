"""linear_logprobs on Triton kernels equals the float64 oracle, forward and backward."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.triton.device import DEVICE
from tests.tuna_kernels.bounds import assert_as_good_as_textbook
from tests.tuna_kernels.test_logprobs import VARIANTS, Case, evaluate

HALF = (torch.bfloat16, torch.float16)


def rounded(case: Case) -> torch.dtype:
    """The type in which gradients of logits are multiplied."""
    return case.hidden if case.hidden == case.weight else torch.float32


def check(case: Case) -> None:
    truth = evaluate(case, "reference", torch.float64)
    textbook = evaluate(case, "reference")
    got = evaluate(case, "triton", device=DEVICE)
    assert got.keys() == truth.keys()
    for name in truth:
        of_gradient = rounded(case) if name.startswith("d ") else torch.float32
        assert_as_good_as_textbook(got[name], textbook[name], truth[name], f"{name} of {case}", rounded=of_gradient)


SMALL = Case(slots=40, tokens=23, vocabulary=397, width=40)  # three row blocks, four splits, a tail everywhere


@pytest.mark.parametrize("case", [replace(c, slots=40, tokens=23, vocabulary=397, width=40) for c in VARIANTS], ids=str)
def test_equals_the_oracle(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("hidden,weight", list(itertools.product([torch.float32, *HALF], repeat=2))[1:], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_pair_of_types(hidden: torch.dtype, weight: torch.dtype, frozen: bool) -> None:
    case = replace(SMALL, hidden=hidden, weight=weight, frozen_head=frozen, slots=20, tokens=12, vocabulary=130)
    check(replace(case, bias=True, lora=not frozen, entropy=True, softcap=9.0))
