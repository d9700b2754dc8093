"""The self-check of a user's card passes with right kernels, fails with wrong ones, and is asked for once."""

import re
import warnings

import pytest
import torch

from tests.triton.device import DEVICE
from tuna_kernels import self_check
from tuna_kernels.gpu import checked_cards
from tuna_kernels.gpu.availability import is_interpreted


def test_every_kernel_passes() -> None:
    checks = list(self_check.run_checks(DEVICE, small=is_interpreted()))
    assert [check for check in checks if not check.passed] == []
    assert {"float32", "bfloat16", "float16"} == {check.name.rsplit(", ", 1)[1] for check in checks}
    assert len(checks) >= 24 and all(check.error <= check.limit for check in checks)


def test_a_wrong_kernel_fails_and_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check._attention

    def off(device: torch.device, size: int, **settings: object) -> self_check.Run:
        run = right(device, size, **settings)  # type: ignore[arg-type]

        def wrong(dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
            results = run(dtype, backend)
            return results if backend == "reference" else results | {"out": results["out"] * 1.05}

        return wrong

    monkeypatch.setattr(self_check, "_attention", off)
    cases = [case for case in self_check._cases(torch.device(DEVICE), True) if "attention" in case[0]][:2]
    checks = [self_check._check(name, dtype, run, "triton") for name, dtype, run in cases]
    assert all("error of out is" in check.reason for check in checks)


def test_an_unchecked_card_is_mentioned_once_and_a_checked_one_never(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device(DEVICE)
    checked_cards._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="have not been checked on this card"):
        checked_cards.warn_if_unchecked(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_cards.warn_if_unchecked(device)
    checked_cards.remember(device, "triton")
    assert checked_cards.passed(device)
    checked_cards._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_cards.warn_if_unchecked(device)


def test_the_command_shows_every_check_and_says_how_many_passed(capsys: pytest.CaptureFixture[str]) -> None:
    from tuna.cli import main

    with pytest.raises(SystemExit) as end:
        main(["info", "--self-check"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert re.search(r"\b(\d+) of \1 checks passed", shown)
