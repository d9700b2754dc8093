"""`tuna recipe`: several commands as one resumable run, and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app"]

app = typer.Typer(help="Run several commands as the steps of one recipe.", no_args_is_help=True)

SetFlag = Annotated[
    list[str] | None, typer.Option("--set", help="Value of a recipe variable as name=value; may be repeated.")
]
RecipeFile = Annotated[Path, typer.Argument(help="Recipe in YAML; see docs/recipe.md.")]


@app.command()
def run(
    context: typer.Context,
    recipe: RecipeFile,
    set_: SetFlag = None,
    until: Annotated[str | None, typer.Option(help="Name of the last step to run.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Hide the output of the steps.")] = False,
) -> None:
    """Run the steps that are not done, then write the report."""
    from rich.text import Text

    from tuna.console.terminal import Terminal
    from tuna.recipe.report import write_report
    from tuna.recipe.run import run_steps
    from tuna.recipe.steps import PlannedStep, plan, read_recipe

    console = Terminal()
    found = read_recipe(recipe, _variables(set_))
    steps = plan(found, recipe.resolve().parent, context.find_root().command)
    names = [step.step.name for step in steps]
    if until is not None and until not in names:
        raise ValueError(f"until = {until!r} is not a step; the steps are {', '.join(names)}")
    wanted = steps if until is None else steps[: names.index(until) + 1]

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    def on_done(step: PlannedStep, ran: bool, seconds: float) -> None:
        say(f"{step.step.name}: {f'done in {seconds:,.1f} s' if ran else 'already done'}", "green")

    run_steps(
        wanted,
        on_start=lambda step: say(f"{step.step.name}: {step.command_line()}", "bold"),
        on_line=lambda line: None if quiet else say(f"  {line}", "dim"),
        on_done=on_done,
    )
    report = write_report(found, steps, (recipe.resolve().parent / found.folder).resolve())
    say(f"report: {report}")


@app.command()
def show(context: typer.Context, recipe: RecipeFile, set_: SetFlag = None) -> None:
    """List the steps, which of them are done, and their commands, without running any."""
    from rich.table import Table

    from tuna.console.terminal import Terminal
    from tuna.recipe.steps import plan, read_recipe

    steps = plan(read_recipe(recipe, _variables(set_)), recipe.resolve().parent, context.find_root().command)
    table = Table("step", "done", "command", title=str(recipe), title_justify="left")
    for step in steps:
        table.add_row(step.step.name, "yes" if step.done else "no", step.command_line())
    Terminal().print(table)


def _variables(texts: list[str] | None) -> dict[str, Any]:
    """Values as YAML; a path that exists from here is made absolute, since recipes start from their own folder."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, got {text!r}")
        found[name.strip()] = str(Path(value).resolve()) if value and Path(value).exists() else yaml.safe_load(value)
    return found
