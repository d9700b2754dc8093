"""`python -m benchmarks.sharing`: what is gained by computing a shared prompt once, beside other ways to do it.

One small Llama, forward and backward of the whole loss, for k in {2, 4, 8, 16} responses, for prompts from a quarter of
the response to eight times its length, and for groups drawn from a ranked file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness import Rounds, compare
from benchmarks.record import Bound, Comparison
from benchmarks.report import Progress, Report
from benchmarks.sharing_arms import SharingCase, sharing_arms, sharing_oracle, small_llama
from benchmarks.step import read_batches
from tuna.compare.side_by_side import count_tokens
from tuna.models.loading import SMOLLM2
from tuna_kernels import Group

RATIOS = {"1:4": (64, 256), "1:1": (160, 160), "4:1": (256, 64), "8:1": (320, 40)}
KS = (2, 4, 8, 16)
MIDDLE_K, MIDDLE_RATIO = 4, "1:1"
TOLERANCE = {"loss": 1e-5, "gradient": 1e-3}


def made_groups(count: int, k: int, prompt: int, response: int, vocab: int, seed: int = 0) -> list[Group]:
    """Random groups; lengths of the responses vary by a quarter around `response`, as real ones do at least."""
    maker = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=maker).tolist()

    def length() -> int:
        spread = max(1, response // 4)
        return response - spread + int(torch.randint(2 * spread + 1, (), generator=maker))

    return [
        Group(tokens(prompt), [tokens(max(1, length())) for _ in range(k)], ranks=list(range(k))) for _ in range(count)
    ]


def cases(ks: Sequence[int], ratios: Sequence[str]) -> list[tuple[int, str]]:
    """(k, ratio): all k at the middle ratio, all ratios at the middle k."""
    chosen = [(k, MIDDLE_RATIO) for k in ks] + [(MIDDLE_K, ratio) for ratio in ratios]
    return list(dict.fromkeys(chosen))


def compare_case(
    case: SharingCase, title: str, setting: dict[str, str | int], plan: Rounds, progress: Progress
) -> Comparison:
    """One table: all arms over one batch of groups."""
    tokens = count_tokens(case.groups)
    return compare(
        f"{title}: {tokens.tree:,} tokens in the tree, {tokens.unshared:,} unshared, {tokens.padded:,} padded",
        sharing_arms(),
        case,
        oracle=sharing_oracle(case),
        tolerance=TOLERANCE,
        bounds=[Bound("baseline", {"baseline": 1}), Bound("tuna none", {"tuna none": 1})],
        plan=plan,
        setting={**setting, "tree": tokens.tree, "unshared": tokens.unshared, "padded": tokens.padded},
        progress=progress,
    )


def run(
    ks: Sequence[int],
    ratios: Sequence[str],
    sizes: tuple[int, int, int],
    count: int,
    data: Path | None,
    plan: Rounds,
    progress: Progress,
) -> Iterator[Comparison]:
    """All tables, each when it is finished; `sizes` are layers, width and vocabulary of the model."""
    layers, width, vocab = sizes
    model = small_llama(layers=layers, width=width, vocab=vocab)
    for k, ratio in cases(ks, ratios):
        prompt, response = RATIOS[ratio]
        case = SharingCase(model, made_groups(count, k, prompt, response, vocab))
        title = f"{count} groups, k = {k}, prompt : response = {ratio} ({prompt} : {response})"
        yield compare_case(case, title, {"k": k, "ratio": ratio}, plan, progress)
    if data is not None:
        (batch,) = read_batches(data, SMOLLM2, "chat", 512, [count], 0)
        real = SharingCase(small_llama(layers=layers, width=width, vocab=49152), batch)
        yield compare_case(real, f"{count} groups of {data.name}", {"k": 5, "ratio": "real"}, plan, progress)


def main(
    k: Annotated[list[int] | None, typer.Option("--k", help="Responses a prompt; may be repeated.")] = None,
    ratio: Annotated[list[str] | None, typer.Option(help="1:4, 1:1, 4:1 or 8:1; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="A ranked file whose groups make one more table.")] = None,
    groups: Annotated[int, typer.Option(help="Groups a batch.")] = 2,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    width: Annotated[int, typer.Option(help="Its width, a multiple of 64.")] = 384,
    vocab: Annotated[int, typer.Option(help="Its vocabulary.")] = 8192,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch, OpenMP and BLAS.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for sharing.json, .md and .png.")] = Path("results/local"),
) -> None:
    """Compare ways to share a prompt; write JSON, a Markdown table and a picture."""
    for name, value, least in (
        ("groups", groups, 1),
        ("layers", layers, 1),
        ("threads", threads, 1),
        ("vocab", vocab, 2),
    ):
        if value < least:
            raise typer.BadParameter(f"--{name} {value} must be at least {least}")
    if width < 64 or width % 64:
        raise typer.BadParameter(f"--width {width} must be a multiple of 64")
    if unknown := [one for one in ratio or [] if one not in RATIOS]:
        raise typer.BadParameter(f"--ratio {unknown[0]!r} is not one of {', '.join(RATIOS)}")
    if too_small := [one for one in k or [] if one < 1]:
        raise typer.BadParameter(f"--k {too_small[0]} must be at least 1")
    torch.set_num_threads(threads)
    told = {"groups": groups, "layers": layers, "width": width, "vocab": vocab, "rounds": rounds, "threads": threads}
    options = {name: str(value) for name, value in told.items()} | {"data": data.name if data else ""}
    report = Report("benchmarks.sharing", output, "sharing", ("transformers",), options)
    chosen_k, chosen_ratios = tuple(k or ()), tuple(ratio or ())
    if not k and not ratio:
        chosen_k, chosen_ratios = KS, tuple(RATIOS)
    with Progress() as progress:
        for table in run(chosen_k, chosen_ratios, (layers, width, vocab), groups, data, Rounds(rounds), progress):
            report.add(table)
    report.finish()


if __name__ == "__main__":
    typer.run(main)
