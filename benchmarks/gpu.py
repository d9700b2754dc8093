"""`python -m benchmarks.gpu` (`make gpu-bench`): the GPU kernels beside their peers, on the card at hand.

Log-probabilities (forward, forward + backward with trainable and frozen head), the whole ranking loss, and tree
attention; the baseline, torch.compile, Liger, cut-cross-entropy, quack and F.linear_cross_entropy where installed. The
harness is that of the CPU: checked against the float64 oracle before it is timed, interleaved rounds, ratios to bare
cuBLAS multiplies of the inputs' type in the same round, peak memory of the operation alone. Clocks wait for the device,
so both columns of times are wall time.

`--rehearse` runs everything that does not need a GPU: tiny shapes, our kernels in Triton's interpreter.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks import ranking
from benchmarks.arms import DTYPES, MODES, Case, Mode, Shape, logprob_arm, logprob_arms, make_case, oracle, our_logprobs
from benchmarks.arms import tolerance as head_tolerance
from benchmarks.harness import Arm, Clock, Rounds, compare, process_clock
from benchmarks.kernels import bare_multiplies, bounds_of
from benchmarks.record import Bound, Comparison
from benchmarks.report import Progress, Report
from tuna.compare.memory_meter import allocator_peak
from tuna_kernels import PackedTree, pack_groups, tree_attention
from tuna_kernels.attention.reference import visible
from tuna_kernels.gpu import availability
from tuna_kernels.self_check import sample_groups

HEADS = ("8192x4096x32000", "2560x4096x32000", "8192x4096x128256", "1024x4096x128256")
TINY_HEADS = ("32x32x300",)
GROUPS = ((512, 512, 5), (2048, 512, 8), (256, 1024, 16))  # prompt, response, k
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl", "flash-attn")
GPU_MODES: tuple[Mode, ...] = tuple(mode for mode in MODES if mode != "half")
NOT_ON_GPU = ("tuna cpu", "tuna torch", "torch auto")


@dataclass(frozen=True)
class Where:
    """The device, how to read its clock and its memory."""

    device: torch.device
    clock: Clock
    meter: Callable[[Callable[[], object]], int]


def cuda_clock() -> tuple[float, float]:
    """Wall seconds when everything asked of the device so far is done, twice."""
    torch.cuda.synchronize()
    now = time.perf_counter()
    return now, now


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes a call held at once on the device above what was there before; its results count."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def here(*, rehearse: bool) -> Where:
    """The GPU, or for a rehearsal the CPU with Triton's interpreter.

    Raises:
        ValueError: no GPU and no rehearsal, or a rehearsal without the interpreter.
    """
    if rehearse:
        if not availability.is_interpreted():
            raise ValueError("--rehearse needs TRITON_INTERPRET=1 in the environment")
        return Where(torch.device("cpu"), process_clock, allocator_peak)
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device: TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse runs without")
    return Where(torch.device("cuda"), cuda_clock, cuda_peak)


def head_arms() -> list[Arm[Case]]:
    """The arms of the CPU that also run on a GPU, and those that only run there."""
    common = [arm for arm in logprob_arms() if arm.name not in NOT_ON_GPU]
    return [
        *common,
        logprob_arm("CCE", _cce, "impl=cce", package="cut-cross-entropy", refuses=_needs_gpu("cut_cross_entropy")),
        logprob_arm(
            "Liger scaled CE",
            _liger_scaled,
            "fused kernels",
            package="liger-kernel",
            refuses=_needs_gpu("liger_kernel"),
        ),
        logprob_arm(
            "quack",
            _quack,
            "linear_cross_entropy_func, reduction none",
            package="quack-kernels",
            refuses=_needs_gpu("quack"),
        ),
        logprob_arm("tuna triton", our_logprobs("triton"), "linear_logprobs, backend triton", package="triton"),
    ]


def _needs_gpu(module: str) -> Callable[[Case], str]:
    def refuses(case: Case) -> str:
        if case.hidden.device.type != "cuda":
            return "its kernels need a GPU"
        if case.hidden.dtype == torch.float32:
            return "its kernels take 16-bit inputs"
        try:
            __import__(module)
        except Exception as error:  # some of them fail at import on cards they do not know
            return f"not usable: {error}"
        return ""

    return refuses


def _cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce")
    return -loss


def _liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    apply: Any = liger.LigerFusedLinearScaledCrossEntropyFunction.apply
    found = apply(hidden, weight, targets)
    loss: Tensor = found[0] if isinstance(found, tuple) else found
    return -loss


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    loss: Tensor = linear_cross_entropy_func(hidden, weight, targets, reduction="none")
    return -loss


def move(case: Case, device: torch.device) -> Case:
    """The same inputs on a device, still leaves."""
    moved = {name: getattr(case, name).detach().to(device) for name in ("hidden", "weight", "targets", "upstream")}
    moved["hidden"].requires_grad_(case.hidden.requires_grad)
    moved["weight"].requires_grad_(case.weight.requires_grad)
    return replace(case, **moved)


def compare_head(shape: Shape, dtype: str, mode: Mode, where: Where, plan: Rounds, progress: Progress) -> Comparison:
    """One table of log-probs; the oracle is computed on the device too, in float64."""
    case = move(make_case(shape, dtype, mode), where.device)
    return compare(
        f"log-probs, {mode}, {dtype}, N={shape.rows} D={shape.width} V={shape.vocab}",
        head_arms(),
        case,
        oracle=oracle(case),
        tolerance=head_tolerance(dtype, shape.vocab),
        units=bare_multiplies(case.hidden, case.weight, dtype=case.hidden.dtype),
        bounds=bounds_of(shape, dtype, mode),
        plan=plan,
        meter=where.meter,
        setting={"op": "logprobs", "mode": mode, "dtype": dtype, "shape": str(shape), "figure": f"{shape}-{dtype}"},
        progress=progress,
    )


def compare_ranking(shape: Shape, dtype: str, mode: Mode, where: Where, plan: Rounds, progress: Progress) -> Comparison:
    """One table of the whole ranking loss."""
    made = ranking.make_ranking_case(shape, dtype, mode)
    tensors = move(Case(made.hidden, made.weight, made.tree.targets, made.tree.targets.float(), mode), where.device)
    case = ranking.RankingCase(tensors.hidden, tensors.weight, made.tree.to(where.device), mode)
    rows = case.hidden[ranking.scored_rows(case.tree)]
    return compare(
        f"ranking loss, {mode}, {dtype}, {case.tree.num_slots} slots, D={shape.width} V={shape.vocab}",
        ranking.ranking_arms("triton"),
        case,
        oracle=ranking.ranking_oracle(case),
        tolerance=ranking.ranking_tolerance(dtype, shape.vocab),
        units=bare_multiplies(rows, case.weight, dtype=rows.dtype),
        bounds=bounds_of(Shape(len(rows), shape.width, shape.vocab), dtype, mode),
        plan=plan,
        meter=where.meter,
        setting={"op": "ranking", "mode": mode, "dtype": dtype, "shape": str(shape), "figure": f"{shape}-{dtype}"},
        progress=progress,
    )


@dataclass(frozen=True)
class AttentionCase:
    """q [1, Hq, T, d], k and v [1, Hkv, T, d] over a packed tree, upstream [1, Hq, T, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    tree: PackedTree
    upstream: Tensor


def attention_case(tree: PackedTree, dtype: torch.dtype, heads: int, size: int) -> AttentionCase:
    """Random queries, keys and values; no grouped heads, as in LLaMA-7B."""
    maker = torch.Generator().manual_seed(0)
    device = tree.input_ids.device
    q, k, v, g = (torch.randn(1, heads, tree.num_tokens, size, generator=maker).to(device, dtype) for _ in range(4))
    return AttentionCase(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), tree, g)


def attention_arms() -> list[Arm[AttentionCase]]:
    """Ours by every route that is there, and SDPA with a dense mask."""
    routes = ("triton", "flex", "flash", "torch")
    ours = [
        Arm(f"tuna {name}", _attend(_tree_route(name)), f"tree_attention, backend {name}", refuses=_route_refuses(name))
        for name in routes
    ]
    return [Arm("SDPA, dense mask", _attend(_dense), "scaled_dot_product_attention with a [T, T] mask"), *ours]


def _attend(call: Callable[[AttentionCase], Tensor]) -> Callable[[AttentionCase], dict[str, Tensor]]:
    def run(case: AttentionCase) -> dict[str, Tensor]:
        out = call(case)
        gradients = torch.autograd.grad(out, [case.q, case.k, case.v], case.upstream.to(out.dtype))
        return {"out": out.detach(), **{f"gradient:{name}": g for name, g in zip("qkv", gradients, strict=True)}}

    return run


def _tree_route(name: str) -> Callable[[AttentionCase], Tensor]:
    def call(case: AttentionCase) -> Tensor:
        return tree_attention(case.q, case.k, case.v, case.tree.subtree_end, backend=name)

    return call


def _route_refuses(name: str) -> Callable[[AttentionCase], str]:
    def refuses(case: AttentionCase) -> str:
        if name == "flex" and case.q.device.type == "cpu":
            return "FlexAttention has no backward on CPU"
        try:
            with torch.no_grad():
                _tree_route(name)(case)
        except (RuntimeError, ValueError) as error:
            return str(error).splitlines()[0]
        return ""

    return refuses


def _dense(case: AttentionCase) -> Tensor:
    sees = visible(case.tree.subtree_end)
    return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=sees)


def attention_oracle(case: AttentionCase) -> dict[str, Tensor]:
    """float64, a head at a time: the [T, T] scores of one head are all that is held."""
    parts = []
    for head in range(case.q.shape[1]):
        q, k, v = (x.detach()[:, head : head + 1].double().requires_grad_() for x in (case.q, case.k, case.v))
        one = AttentionCase(q, k, v, case.tree, case.upstream[:, head : head + 1].double())
        parts.append(_attend(_dense)(one))
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def compare_attention(
    tree: PackedTree, title: str, dtype: str, sizes: tuple[int, int], where: Where, plan: Rounds, progress: Progress
) -> Comparison:
    """One table of tree attention, forward and backward."""
    case = attention_case(tree.to(where.device), DTYPES[dtype], *sizes)
    eps = torch.finfo(DTYPES[dtype]).eps
    return compare(
        f"tree attention, forward + backward, {dtype}, {title}, T={tree.num_tokens}, {sizes[0]} heads of {sizes[1]}",
        attention_arms(),
        case,
        oracle=attention_oracle(case),
        tolerance={"out": 8 * eps + 1e-5, "gradient": 16 * eps + 1e-4},
        bounds=[Bound("SDPA, dense mask", {"SDPA, dense mask": 1})],
        plan=plan,
        meter=where.meter,
        setting={"op": "attention", "dtype": dtype, "groups": title, "figure": f"attention-{dtype}"},
        progress=progress,
    )


def run(where: Where, plan: Rounds, dtypes: list[str], *, rehearse: bool, progress: Progress) -> Iterator[Comparison]:
    """All tables, each when it is finished."""
    from benchmarks.sharing import made_groups

    for name in TINY_HEADS if rehearse else HEADS:
        shape = Shape.parse(name)
        for dtype in dtypes:
            for mode in GPU_MODES:
                yield compare_head(shape, dtype, mode, where, plan, progress)
            for mode in ranking.RANKING_MODES:
                yield compare_ranking(shape, dtype, mode, where, plan, progress)
    for dtype in dtypes:
        if rehearse:
            yield compare_attention(pack_groups(sample_groups(12)), "tiny", dtype, (2, 16), where, plan, progress)
            continue
        for prompt, response, k in GROUPS:
            tree = pack_groups(made_groups(1, k, prompt, response, 32000))
            yield compare_attention(tree, f"P {prompt}, R {response}, k {k}", dtype, (32, 128), where, plan, progress)


def main(
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float16 or float32; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 20,
    budget: Annotated[float, typer.Option(help="Seconds after which a slow arm skips rounds beyond the third.")] = 5,
    rehearse: Annotated[bool, typer.Option(help="No GPU: tiny shapes in Triton's interpreter.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for gpu.json, .md and pictures.")] = Path("results/local"),
) -> None:
    """Compare the GPU kernels with their peers; write JSON, a Markdown table and pictures."""
    where = here(rehearse=rehearse)
    dtypes = dtype or (["float32", "bfloat16"] if rehearse else ["bfloat16"])
    if unknown := [one for one in dtypes if one not in DTYPES]:
        raise typer.BadParameter(f"--dtype {unknown[0]!r} is not one of {', '.join(DTYPES)}")
    plan = Rounds(rounds=2 if rehearse else rounds, budget=budget, least=2 if rehearse else 3, clock=where.clock)
    name = torch.cuda.get_device_name() if where.device.type == "cuda" else "interpreter"
    told = {"device": name, "rounds": str(plan.rounds), "budget": str(budget), "rehearse": str(rehearse)}
    report = Report("benchmarks.gpu", output, "gpu", PACKAGES, told)
    with Progress() as progress:
        for comparison in run(where, plan, dtypes, rehearse=rehearse, progress=progress):
            report.add(comparison)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
