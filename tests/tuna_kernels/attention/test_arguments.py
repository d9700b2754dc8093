"""Tree attention: what it refuses, by name; which backend it takes; what its module promises."""

from __future__ import annotations

import functools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tuna_kernels.attention.tree_attention
from tests.tuna_kernels.attention.test_tree_attention import TREE, inputs
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.attention.triton import launches
from tuna_kernels.dispatch import why_not


def _qkv() -> dict[str, Tensor]:
    q, k, v = (x.detach() for x in inputs(TREE))
    return {"q": q, "k": k, "v": v, "subtree_end": TREE.subtree_end}


END = TREE.subtree_end
BAD = {
    "q 3-D": ({"q": torch.zeros(2, 3, 4)}, ValueError, "q has 3 dimensions"),
    "integer k": ({"k": torch.zeros(1, 2, END.numel(), 3, dtype=torch.int64)}, TypeError, "k is torch.int64"),
    "mixed dtypes": ({"v": torch.zeros(1, 2, END.numel(), 3)}, ValueError, "v is torch.float32"),
    "head size": ({"k": torch.zeros(1, 2, END.numel(), 5, dtype=torch.float64)}, ValueError, "head size"),
    "v rows": ({"v": torch.zeros(1, 2, 4, 3, dtype=torch.float64)}, ValueError, "v .* does not fit k"),
    "heads": (
        {"q": torch.zeros(1, 3, END.numel(), 3, dtype=torch.float64)},
        ValueError,
        "not a multiple of the 2",
    ),
    "end length": ({"subtree_end": END[:-1]}, ValueError, "subtree_end has shape"),
    "end dtype": ({"subtree_end": END.int()}, TypeError, "subtree_end is torch.int32"),
    "end too small": (
        {"subtree_end": torch.zeros_like(END)},
        ValueError,
        r"subtree_end\[0\] = 0 is outside \(0, ",
    ),
    "end too large": ({"subtree_end": END + END.numel()}, ValueError, r"subtree_end\[0\]"),
    "few queries": ({"q": torch.zeros(1, 4, 2, 3, dtype=torch.float64)}, ValueError, "as query_rows"),
    "query row": (
        {"q": torch.zeros(1, 4, 2, 3, dtype=torch.float64), "query_rows": torch.tensor([0, END.numel()])},
        IndexError,
        r"query_rows\[1\]",
    ),
    "window 0": ({"window": 0, "position_ids": TREE.position_ids}, ValueError, "window = 0"),
    "window alone": ({"window": 3}, ValueError, "window needs position_ids"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap = 0.0"),
    "backend": ({"backend": "turbo"}, ValueError, "backend = 'turbo'"),
    "native float64": ({"backend": "cpu"}, RuntimeError, "backend = 'cpu' does not support this call"),
    "device": ({"subtree_end": END.to("meta")}, ValueError, "subtree_end is on meta"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bad_arguments_are_named(case: str, backend: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        tree_attention(**{**_qkv(), "backend": backend, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_is_native_code_where_it_serves(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on `cpu`, float64 on `torch`; the environment overrides, and must then be able to serve."""
    qkv = {name: x.to(dtype) for name, x in _qkv().items() if name != "subtree_end"} | {"subtree_end": END}
    serves = not why_not("cpu", END.device, dtype)
    assert torch.equal(tree_attention(**qkv), tree_attention(**qkv, backend="cpu" if serves else "torch"))
    for name in ("torch", "reference"):
        monkeypatch.setenv("TUNA_KERNELS_BACKEND", name)
        assert torch.equal(tree_attention(**qkv), tree_attention(**qkv, backend=name))
    if not serves:
        monkeypatch.setenv("TUNA_KERNELS_BACKEND", "cpu")
        with pytest.raises(RuntimeError, match="TUNA_KERNELS_BACKEND = 'cpu' does not support"):
            tree_attention(**qkv)


def test_auto_on_cuda_is_triton_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: the choice is asked for inputs that only say that they lie on one."""
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    choose = functools.partial(
        tuna_kernels.attention.tree_attention.choose_backend, "auto", on_gpu, on_gpu, on_gpu, None
    )
    for reason, chosen in (("", "triton"), ("no", "torch")):
        monkeypatch.setattr(launches, "why_not", lambda *_, reason=reason: reason)
        monkeypatch.delenv("TUNA_KERNELS_BACKEND", raising=False)
        assert choose() == chosen
        monkeypatch.setenv("TUNA_KERNELS_BACKEND", "reference")
        assert choose() == "reference"
        monkeypatch.setenv("TUNA_KERNELS_BACKEND", "turbo")
        with pytest.raises(ValueError, match="TUNA_KERNELS_BACKEND = 'turbo' is not one of"):
            choose()


def test_without_a_gpu_triton_says_so() -> None:
    with pytest.raises(RuntimeError, match="backend = 'triton' does not support this call: "):
        tree_attention(**_qkv(), backend="triton")


def test_the_library_does_not_import_transformers() -> None:
    code = "import sys, tuna_kernels.attention.tree_attention; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
