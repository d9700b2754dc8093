"""``python -m tests.fuzz``: see the package."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.runner import fuzzers, run


def main() -> int:
    known = fuzzers()
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Run random cases; exit code 1 if any breaks a law.",
        epilog="fuzzers: " + "; ".join(f"{name} ({what})" for name, what in known.items()),
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="when to stop (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    parser.add_argument("--cases", type=int, help="at most so many of each fuzzer")
    parser.add_argument("--only", action="append", choices=sorted(known), help="this fuzzer; may be given again")
    asked = parser.parse_args()

    def report(name: str, seed: int, fault: str) -> None:
        print(f"{name}, seed {seed}: {fault}\n  again: python -m tests.fuzz --only {name} --seed {seed} --cases 1\n")
        sys.stdout.flush()

    names = asked.only or known
    tallies = run(names, seed=asked.seed, seconds=asked.seconds, cases=asked.cases, report=report)
    print(f"{'fuzzer':<16}{'cases':>8}{'seconds':>10}{'failed':>8}  first seeds that failed")
    for t in tallies:
        seeds = ", ".join(map(str, t.failed_seeds[:5]))
        print(f"{t.name:<16}{t.cases:>8}{t.seconds:>10.1f}{len(t.failed_seeds):>8}  {seeds}")
    return int(any(t.failed_seeds for t in tallies))


if __name__ == "__main__":
    sys.exit(main())
