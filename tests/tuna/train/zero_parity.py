"""DeepSpeed parity: every case of `tests.tuna.train.zero_cases` on two ranks against one process without DeepSpeed.

    python -m tests.tuna.train.zero_parity --output benchmarks/results

Writes ``zero.json`` and ``zero.md``: the largest difference of a weight after each case's steps, and of a loss. It
measures agreement, not speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tuna.system.writing import write_json

LIMIT = 1e-6


def main() -> None:
    """Run the cases named (default: all) and write the table."""
    from tests.tuna.launching import ROOT, run
    from tests.tuna.train.zero_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("cases", nargs="*", default=list(CASES), help="names of tests.tuna.train.zero_cases.CASES")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for ranks in (0, 2):
            place = Path(scratch) / str(ranks)
            place.mkdir()
            run(
                ranks,
                "tests.tuna.train.zero_cases",
                [str(place), *options.cases],
                cwd=ROOT,
                timeout=60 * len(options.cases) + 120,
            )
            results.append({name: torch.load(place / f"{name}.pt", weights_only=False) for name in options.cases})
    rows = [difference(name, results[0][name], results[1][name]) for name in options.cases]
    write_json(options.output / "zero.json", {"versions": versions(), "limit": LIMIT, "cases": rows})
    (options.output / "zero.md").write_text(table(rows), "utf-8")
    print(table(rows))
    if any(row["weights"] > LIMIT for row in rows):
        raise SystemExit(f"a weight differs by more than {LIMIT}")


def difference(name: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Largest absolute difference over all steps: of a weight, and of a loss."""
    weights = max(
        float((found[key] - value).abs().max())
        for expected, found in zip(one["steps"], two["steps"], strict=True)
        for key, value in expected.items()
    )
    moved = max(float((value - one["start"][key]).abs().max()) for key, value in one["steps"][-1].items())
    losses = [
        abs(expected["loss"] - found["loss"])
        for expected, found in zip(one["log"], two["log"], strict=True)
        if "loss" in expected
    ]
    return {
        "case": name,
        "engine": two["wrapper"],
        "steps": len(one["steps"]),
        "weights": weights,
        "moved": moved,
        "losses": [line["loss"] for line in two["log"] if "loss" in line],
        "loss": max(losses),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | steps | largest weight difference | weights moved by | largest loss difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['steps']} | {row['weights']:.1e} | {row['moved']:.1e} | {row['loss']:.1e} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """What was run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = {name: __import__(name).__version__ for name in ("torch", "transformers", "accelerate", "deepspeed")}
    return {**names, "python": sys.version.split()[0], "commit": commit.stdout.strip()}


if __name__ == "__main__":
    main()
