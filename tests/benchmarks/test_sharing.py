"""The arms that share a prompt compute one and the same loss; the cases are those asked for."""

import pytest

from benchmarks.harness import check_arm
from benchmarks.sharing import RATIOS, TOLERANCE, cases, made_groups
from benchmarks.sharing_arms import SharingCase, sharing_arms, sharing_oracle, small_llama
from tuna_kernels import Group

RAGGED = [
    Group([1, 2, 3], [[4, 5, 6, 7], [4, 5], [9]], ranks=[0, 1, 2]),
    Group([5], [[6, 7], [8, 9, 10, 11, 12]], ranks=[1, 0]),
]


@pytest.mark.parametrize("groups", [RAGGED, made_groups(2, 3, 7, 5, 50)])
def test_every_arm_computes_the_loss_and_gradients_of_the_baseline(groups: list[Group]) -> None:
    case = SharingCase(small_llama(layers=2, width=64, vocab=50), groups)
    right = sharing_oracle(case)
    reports = [check_arm(arm, case, right, TOLERANCE) for arm in sharing_arms()]
    assert {report.name: report.status for report in reports if report.status != "ok"} == {
        "FlexAttention": "unsupported"
    }
    assert all(report.errors["gradient"].max_rel for report in reports if report.status == "ok")


def test_k_varies_at_one_ratio_and_the_ratio_at_one_k() -> None:
    chosen = cases((2, 4, 8, 16), tuple(RATIOS))
    assert len(chosen) == 7 and len(set(chosen)) == 7
    assert {k for k, ratio in chosen if ratio == "1:1"} == {2, 4, 8, 16}
    assert {ratio for k, ratio in chosen if k == 4} == set(RATIOS)


def test_made_groups_have_the_sizes_asked_for() -> None:
    (group,) = made_groups(1, 16, 40, 80, 1000)
    assert len(group.prompt) == 40 and len(group.responses) == 16
    lengths = [len(response) for response in group.responses]
    assert min(lengths) >= 60 and max(lengths) <= 100 and len(set(lengths)) > 4
