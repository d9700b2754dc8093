"""Comparison of the methods to compute a step, for one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuna.plan.planner import GIB, LARGEST, Plan, Planner, fewest_gpus, largest_batch
from tuna.plan.settings import PlanRequest
from tuna.plan.workload import Method

__all__ = ["Row", "compare", "plan_rows"]


@dataclass(frozen=True, eq=False)
class Row:
    """The plans of one method for a request.

    Attributes:
        plan: with the request's micro-batch and sharding.
        largest: with the largest micro-batch that fits, up to `most_groups`, or None.
        fewest, fewest_offload: with the fewest GPUs on which the micro-batch fits, without and with offload, or None.
    """

    method: Method
    plan: Plan
    largest: Plan | None
    fewest: Plan | None
    fewest_offload: Plan | None
    most_groups: int = LARGEST

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        others = {"fewest": self.fewest, "fewest_offload": self.fewest_offload}
        return {
            "method": self.method,
            **self.plan.summary(),
            "largest_groups": self.largest.request.groups if self.largest else 0,
            **{name: brief(plan) if plan else None for name, plan in others.items()},
        }


def compare(
    planner: Planner,
    request: PlanRequest,
    methods: Sequence[Method],
    on_method: Callable[[Method], None] = lambda method: None,
    most_groups: int = LARGEST,
) -> list[Row]:
    """A row for each method; `on_method` is called with each method before it is planned."""
    rows = []
    for method in methods:
        on_method(method)
        asked = replace(request, settings=replace(request.settings, method=method))
        rows.append(
            Row(
                method,
                planner.plan(asked),
                largest_batch(planner, asked, most_groups),
                fewest_gpus(planner, asked),
                fewest_gpus(planner, asked, ("optimizer", "all")),
                most_groups,
            )
        )
    return rows


def brief(plan: Plan) -> dict[str, Any]:
    """The figures of a plan shown in tables."""
    sharding = plan.request.sharding
    return {
        "gpus": sharding.gpus,
        "zero": sharding.stage,
        "offload": sharding.offload,
        "peak_gib": round(plan.peak / GIB, 2),
        "peak_at": plan.peak_at,
        "host_gib": round(plan.states.host / GIB, 1),
        "seconds": round(plan.time.total, 3),
    }


def plan_rows(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """The comparison as lines of a table: a label, then one cell per method."""
    parts = list(dict.fromkeys(name for row in rows for name in row.plan.parts()))
    lines = [(name, [_gib(row.plan.parts().get(name)) for row in rows]) for name in parts]
    lines.append(("peak per GPU, GiB", [_gib(row.plan.peak) for row in rows]))
    lines.append(("peak during", [row.plan.peak_at for row in rows]))
    lines.append(("fits", ["yes" if row.plan.fits else "no" for row in rows]))
    lines.append(("host memory per node, GiB", [_gib(row.plan.states.host) for row in rows]))
    lines.append(("tokens through the trunk", [f"{row.plan.step.tokens:,}" for row in rows]))
    lines.append(("products, TFLOP", [f"{row.plan.step.flops / 1e12:.1f}" for row in rows]))
    lines.append(("predicted step, s", [f"{row.plan.time.total:.2f}" for row in rows]))
    lines.append(("largest micro-batch, groups", [_groups(row) for row in rows]))
    lines.append(("fewest GPUs", [_fewest(row.fewest) for row in rows]))
    lines.append(("fewest GPUs, offloading", [_fewest(row.fewest_offload) for row in rows]))
    return lines


def _gib(size: int | None) -> str:
    return "-" if not size else f"{size / GIB:.2f}"


def _groups(row: Row) -> str:
    if row.largest is None:
        return "none"
    groups = row.largest.request.groups
    return f"{groups} or more" if groups == row.most_groups else f"{groups}"


def _fewest(plan: Plan | None) -> str:
    if plan is None:
        return "over 64"
    sharding = plan.request.sharding
    host = f", {plan.states.host / GIB:.0f} GiB host" if plan.states.host else ""
    return f"{sharding.gpus} (ZeRO-{sharding.stage}{host})"
