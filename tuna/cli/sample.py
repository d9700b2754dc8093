"""`tuna sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna.cli import paid
from tuna.cli.flags import Flags
from tuna.cli.options import Dtype, Limit, OnBad, Template, at_least
from tuna.console.warnings import given_template, print_problems, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tuna.data.instructions import Instruction
    from tuna.gather.responses import ResponseSet
    from tuna.gather.sampling import Diversity, LocalSampling

__all__ = ["sample"]


def sample(
    context: typer.Context,
    *,
    instructions: Annotated[str, typer.Option(help="Instructions, in any format that tuna generate reads.")],
    model: Annotated[
        str, typer.Option(help="Student: smollm2-135m, a folder, or a name on the Hugging Face hub or at --base-url.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for responses.jsonl, diversity.json and the journal.")],
    draws: Annotated[
        dict[str, Any], Flags("tuna.gather.sampling:LocalSampling", "k max_tokens temperature top_p seed stop")
    ],
    template: Template = None,
    again: Annotated[dict[str, Any], Flags("tuna.gather.sampling:Diversity", "alike step tries")],
    batch: Annotated[int, at_least(1, "Prompts per batch, for a local student.")] = 4,
    dtype: Dtype = "float32",
    limit: Limit = None,
    on_bad: OnBad = "fail",
    base_url: Annotated[
        str | None, typer.Option(help="Endpoint (vLLM, tuna serve) of the student; without it, the student runs here.")
    ] = None,
    asked: Annotated[
        dict[str, Any], Flags("tuna.gather.teacher:Sampling", "api logprobs", defaults={"logprobs": False})
    ],
    extra: paid.Extra = None,
    endpoint: paid.Endpoint,
    limits: paid.Limits,
    prices: paid.Prices,
    dry_run: paid.DryRun = False,
) -> None:
    """Sample diverse responses of the student, for a judge to rank; the same command resumes a run."""
    from tuna.cli.generate import read_wanted
    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.gather.sampling import Diversity, LocalSampling
    from tuna.train.outputs import check_files

    console = Terminal()
    diversity = Diversity(**again)
    if draws["k"] < 1:
        raise ValueError(f"k = {draws['k']} must be at least 1")
    check_files({"output": output / "responses.jsonl"}, {"instructions": instructions})
    wanted = read_wanted(console, instructions, limit, on_bad)
    if base_url is None:
        if dry_run:
            raise ValueError("dry_run needs base_url: a local student costs nothing")
        remote = [*asked, "extra", *endpoint, *limits, *(f"price_{name}" for name in prices)]
        refuse_given(context, "the student runs here, without --base-url", *remote)
        shown = given_template(console, template, model, None)
        sampling = LocalSampling(**draws, template=shown, diversity=diversity)
        _local(console, model, dtype, wanted, sampling, output, batch)
        return
    from tuna.gather.teacher import Sampling

    refuse_given(context, "the student runs at --base-url", "batch", "dtype")
    settings = paid.paid_settings(endpoint, limits, prices, base_url=base_url)
    draws["n"] = draws.pop("k")
    questions = Sampling(model=model, **draws, **asked, template=template or "none", extra=paid.parse_extra(extra))
    _remote(
        paid.PaidRun(console, "sample", output, _parameters(questions, diversity), settings),
        questions,
        wanted,
        diversity,
        dry_run,
    )


def _parameters(sampling: Any, diversity: Diversity) -> dict[str, Any]:
    from dataclasses import asdict

    return {**sampling.parameters(), "diversity": asdict(diversity)}


def _local(
    console: Console,
    model: str,
    dtype: str,
    wanted: Sequence[Instruction],
    sampling: LocalSampling,
    output: Path,
    batch: int,
) -> None:
    from dataclasses import asdict

    import torch
    from transformers.utils.logging import disable_progress_bar

    from tuna.console.bar import progress_bar
    from tuna.console.next import say_next
    from tuna.data.templates import saved_template, unused_chat_template
    from tuna.gather.api.journal import Journal
    from tuna.gather.student import sample_locally
    from tuna.models.loading import load_model, place_for
    from tuna.system.writing import content_hash

    disable_progress_bar()  # type: ignore[no-untyped-call]
    # A student trained again under the same name is another student.
    weights = content_hash(model) if Path(model).is_dir() else model
    parameters = {"model": model, "weights": weights, "dtype": dtype, **asdict(sampling)}
    with Journal(output, "sample", {**parameters, "stop": list(sampling.stop)}) as journal:
        with console.status(f"loading {model} …"):
            network, tokenizer = load_model(model, dtype=getattr(torch, dtype))
            torch.nn.Module.to(network, place_for())
        if saved_template(model) is None:
            warn(console, unused_chat_template(sampling.template, tokenizer))
        with progress_bar(console, "prompts") as bar:
            task = bar.add_task("sample", total=len(wanted))
            sets, problems = sample_locally(
                network,
                tokenizer,
                wanted,
                sampling,
                journal,
                name=model,
                batch=batch,
                on_done=lambda tokens: bar.advance(task),
            )
        print_problems(console, problems)
        _write(console, output, sets, sampling.diversity)
        say_next(console, "judge", data=output / "responses.jsonl", model="JUDGE", output="FOLDER")
    if problems:
        raise typer.Exit(1)


def _remote(
    run: paid.PaidRun, sampling: Any, wanted: Sequence[Instruction], diversity: Diversity, dry_run: bool
) -> None:
    from dataclasses import replace

    from tuna.console.next import next_command
    from tuna.gather.student import sample_from_endpoint

    replace(sampling, temperature=diversity.temperature(sampling.temperature, diversity.tries - 1))  # still in range
    requests = [sampling.request(item) for item in wanted]
    if dry_run:
        run.dry_run(requests, f"a prompt whose responses are too similar takes up to {diversity.tries} calls")
        return
    with run.journal() as journal:
        outcome, figures = run.run(
            journal, wanted, lambda calls, item: sample_from_endpoint(calls, sampling, item, diversity)
        )
        sets = [outcome.results[index] for index in sorted(outcome.results)]
        _write(run.console, run.folder, sets, diversity)
        run.following = next_command("judge", data=run.folder / "responses.jsonl", model="JUDGE", output="FOLDER")
        run.finish(wanted, outcome, figures)


def _write(console: Console, output: Path, sets: list[ResponseSet], diversity: Diversity) -> None:
    """The responses and how diverse they are."""
    from collections import Counter

    from rich.table import Table

    from tuna.gather.diversity import diversity_figures
    from tuna.gather.responses import write_responses
    from tuna.system.writing import write_json

    if not sets:
        return
    write_responses(output / "responses.jsonl", sets)
    tries = Counter(str((item.sampling or {}).get("tries")) for item in sets)
    figures = {**diversity_figures(sets, diversity.alike), "tries": dict(sorted(tries.items()))}
    write_json(output / "diversity.json", figures)
    table = Table(title=f"{output}: diversity", show_header=False, title_justify="left")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
