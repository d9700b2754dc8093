"""`tuna sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuna.cli import paid
from tuna.console.warnings import given_template, print_problems, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tuna.data.instructions import Instruction
    from tuna.gather.responses import ResponseSet
    from tuna.gather.student import Diversity, LocalSampling

__all__ = ["sample"]

OF_ENDPOINTS = (
    "api", "logprobs", "extra", "key_variable", "concurrency", "requests_per_minute", "request_timeout",
    "total_timeout", "max_attempts", "backoff", "max_backoff", "max_calls", "max_cost", "price_input", "price_output",
)  # fmt: skip


def sample(
    context: typer.Context,
    instructions: Annotated[str, typer.Option(help="File of instructions, in any shape tuna generate reads.")],
    model: Annotated[
        str, typer.Option(help="The student: smollm2-135m, a folder, a hub name; with --base-url its name there.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run: responses.jsonl, diversity.json, journal.")],
    k: Annotated[int, typer.Option("--k", help="Responses a prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a response.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the first try.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a response; may be repeated.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="none, chat, alpaca or a text with {prompt}. Default: as the student was trained, or none; with "
            "--api chat the endpoint's own."
        ),
    ] = None,
    alike: Annotated[float, typer.Option(help="Draw again where two responses have this ROUGE-L.")] = 0.8,
    step: Annotated[float, typer.Option(help="Temperature added from try to try.")] = 0.1,
    tries: Annotated[int, typer.Option(help="Most draws of a prompt's responses.")] = 3,
    batch: Annotated[int, typer.Option(help="Local: prompts computed together.")] = 4,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Local: of the weights.")
    ] = "float32",
    limit: Annotated[int | None, typer.Option(help="Use the first so many instructions.")] = None,
    on_bad: Annotated[Literal["fail", "skip"], typer.Option(help="An instruction that cannot be used.")] = "fail",
    base_url: Annotated[
        str | None, typer.Option(help="Ask an endpoint (vLLM, tuna serve) instead of running the student here.")
    ] = None,
    api: Annotated[Literal["completions", "chat"], typer.Option(help="Kind of endpoint.")] = "chat",
    logprobs: Annotated[
        bool, typer.Option("--logprobs/--no-logprobs", help="Endpoint: insist on log-probabilities.")
    ] = False,
    extra: paid.Extra = None,
    key_variable: paid.KeyVariable = "OPENAI_API_KEY",
    concurrency: paid.Concurrency = 8,
    requests_per_minute: paid.RequestsPerMinute = None,
    request_timeout: paid.RequestTimeout = 120.0,
    total_timeout: paid.TotalTimeout = 900.0,
    max_attempts: paid.MaxAttempts = 6,
    backoff: paid.Backoff = 1.0,
    max_backoff: paid.MaxBackoff = 60.0,
    max_calls: paid.MaxCalls = None,
    max_cost: paid.MaxCost = None,
    price_input: paid.PriceInput = 0.0,
    price_output: paid.PriceOutput = 0.0,
    dry_run: paid.DryRun = False,
) -> None:
    """Draw the student's own diverse responses, for a judge to rank. Interrupted, it goes on where it was."""
    from tuna.cli.generate import read_wanted
    from tuna.cli.messages import refuse_given
    from tuna.console.terminal import Terminal
    from tuna.gather.student import Diversity, LocalSampling
    from tuna.train.outputs import check_files

    console = Terminal()
    diversity = Diversity(alike=alike, step=step, tries=tries)
    check_files({"output": output / "responses.jsonl"}, {"instructions": instructions})
    wanted = read_wanted(console, instructions, limit, on_bad)
    if base_url is None:
        if dry_run:
            raise ValueError("dry_run is for endpoints: give base_url")
        refuse_given(context, "the student runs here; it is for --base-url", *OF_ENDPOINTS)
        sampling = LocalSampling(
            k=k,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            template=given_template(console, template, model, None),
            diversity=diversity,
        )
        _local(console, model, dtype, wanted, sampling, output, batch)
        return
    from tuna.gather.teacher import Sampling

    refuse_given(context, "the student runs at --base-url", "batch", "dtype")
    settings = paid.paid_settings(
        base_url=base_url,
        key_variable=key_variable,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        request_timeout=request_timeout,
        total_timeout=total_timeout,
        max_attempts=max_attempts,
        backoff=backoff,
        max_backoff=max_backoff,
        max_calls=max_calls,
        max_cost=max_cost,
        price_input=price_input,
        price_output=price_output,
    )
    asked = Sampling(
        model=model,
        api=api,
        n=k,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        template=template or "none",
        logprobs=logprobs,
        extra=paid.parse_extra(extra),
    )
    _remote(
        paid.PaidRun(console, "sample", output, _parameters(asked, diversity), settings),
        asked,
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
        run.dry_run(requests, f"a prompt whose responses are alike takes up to {diversity.tries} calls")
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
