"""Vocabulary-parallel heads: two ranks with a shard each give what one rank with the whole head gives."""

from __future__ import annotations

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.tuna_kernels.bounds import assert_as_good_as_reference
from tuna_kernels import available_backends, linear_logprobs

RANKS, VOCABULARY, PADDED = 2, 97, 130
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 4.0, "logit_scale": 0.8},
    {"bias": True, "lora": True},
    {"frozen": True, "entropy": False},
    {"valid": 60},  # all of the second rank is padding
    {"dtype": torch.bfloat16, "bias": True},
    {"bias": True, "logit_scale": -300.0},
    {"bias": True, "shift": 2e4},
    {"bias": True, "masked": True},  # targets and a whole rank without probability
    {"bias": True, "masked": True, "frozen": True, "entropy": False},
]


def problem(options: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, int]:
    """Leaves of the whole padded head, targets, rows, upstream, and the valid vocabulary."""
    g = torch.Generator().manual_seed(0)
    valid = options.get("valid", VOCABULARY)
    leaves = {"hidden": torch.randn(17, 24, generator=g), "weight": torch.randn(PADDED, 24, generator=g)}
    if options.get("bias"):
        leaves["bias"] = torch.randn(PADDED, generator=g) * 3 - 50 + options.get("shift", 0.0)
    if options.get("masked"):
        leaves["bias"][PADDED // RANKS :] = -torch.inf
        leaves["bias"][1::3] = -torch.inf
    if options.get("lora"):
        leaves |= {"lora_a": torch.randn(3, 24, generator=g), "lora_b": torch.randn(PADDED, 3, generator=g)}
    targets = torch.randint(0, valid, (40,), generator=g)
    targets[:3] = torch.tensor([0, valid - 1, -100])
    rows = torch.randint(0, 17, (40,), generator=g)
    leaves = {k: v.to(options.get("dtype", torch.float32)).to(dtype) for k, v in leaves.items()}
    return leaves, targets, rows, torch.randn(3, 40, generator=g), valid


def evaluate(options: dict[str, Any], leaves: dict[str, Tensor], layout: Any, **keywords: Any) -> dict[str, Tensor]:
    targets, rows, upstream, valid = layout
    leaves = {
        k: v.detach().clone().requires_grad_(k == "hidden" or not options.get("frozen")) for k, v in leaves.items()
    }
    out = linear_logprobs(
        leaves["hidden"],
        leaves["weight"],
        targets,
        rows=rows,
        bias=leaves.get("bias"),
        lora=(leaves["lora_a"], leaves["lora_b"], 0.5) if "lora_a" in leaves else None,
        logit_scale=options.get("logit_scale", 1.0),
        softcap=options.get("softcap"),
        return_lse=True,
        return_entropy=options.get("entropy", True),
        valid_vocab=valid,
        **keywords,
    )
    sum((o * u).sum() for o, u in zip(out, upstream, strict=False)).backward()
    results = dict(zip(("logprobs", "lse", "entropy"), (o.detach() for o in out), strict=False))
    return results | {f"d {k}": v.grad for k, v in leaves.items() if v.grad is not None}


def shards(leaves: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    size = PADDED // RANKS
    part = slice(rank * size, (rank + 1) * size)
    return {k: v if k in ("hidden", "lora_a") else v[part] for k, v in leaves.items()}


def worker(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(minutes=5)
    )
    results = []
    for options in OPTIONS:
        leaves, *layout = problem(options, options.get("dtype", torch.float32))
        # The group itself, or its name.
        group: Any = dist.group.WORLD
        group = group.group_name if options.get("bias") else group
        results.append(evaluate(options, shards(leaves, rank), layout, backend=backend, process_group=group))
    lost = linear_logprobs(
        torch.ones(1, 2), torch.ones(3, 2), torch.tensor([6]), validate=False, backend=backend,
        process_group=dist.group.WORLD,
    )  # fmt: skip
    assert isinstance(lost, Tensor) and lost.isnan().all(), "a target that no rank owns"
    with pytest.raises(IndexError, match="vocabulary of 5"):
        linear_logprobs(
            torch.ones(1, 2), torch.ones(3, 2), torch.tensor([5]), valid_vocab=5, process_group=dist.group.WORLD
        )
    with pytest.raises(ValueError, match="valid_vocab = 7"):
        linear_logprobs(
            torch.ones(1, 2), torch.ones(3, 2), torch.tensor([5]), valid_vocab=7, process_group=dist.group.WORLD
        )
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run_ranks(backend: str) -> list[list[dict[str, Tensor]]]:
    """Results of every option on every rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=worker, args=(rank, folder, backend)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
        assert [process.exitcode for process in ranks] == [0] * RANKS
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


def check_ranks(backend: str) -> None:
    by_rank = run_ranks(backend)
    for i, options in enumerate(OPTIONS):
        dtype = options.get("dtype", torch.float32)
        leaves, *layout = problem(options, dtype)
        reference = evaluate(options, leaves, layout, backend="reference")
        double, *_ = problem(options, torch.float64)
        truth = evaluate(options, double, layout, backend="reference")
        for rank in range(RANKS):
            expected, wanted = (
                {f"d {k}": v for k, v in shards({n[2:]: t for n, t in r.items() if n[0] == "d"}, rank).items()}
                | {n: t for n, t in r.items() if n[0] != "d"}
                for r in (reference, truth)
            )
            got = by_rank[rank][i]
            assert got.keys() == wanted.keys()
            for name in wanted:
                # The hidden gradient is rounded once a rank before it is summed.
                rounded = dtype if name.startswith("d ") else torch.float32
                absent = wanted[name] == -torch.inf
                assert torch.equal(got[name] == -torch.inf, absent), f"{name} {options} rank {rank}"
                values = (x[name].masked_fill(absent, 0) for x in (got, expected, wanted))
                assert_as_good_as_reference(*values, f"{name} {options} rank {rank}", rounded=rounded)


@pytest.mark.parametrize(
    "backend",
    [
        "torch",
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(bool(available_backends()["cpu"]), reason="no native code")),
    ],
)
def test_two_ranks_equal_one(backend: str) -> None:
    check_ranks(backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_padded_vocabulary_on_one_rank(backend: str) -> None:
    leaves, *layout = problem({"bias": True}, torch.float32)
    whole = evaluate({"bias": True}, leaves, layout, backend=backend)
    cut = {k: v[:VOCABULARY] if k in ("weight", "bias") else v for k, v in leaves.items()}
    expected = evaluate({"bias": True}, cut, layout, backend="reference")
    for name, value in expected.items():
        assert not whole[name][value.shape[0] :].any(), "padding has no gradient"
        torch.testing.assert_close(whole[name][: value.shape[0]], value, rtol=1e-4, atol=1e-5)
