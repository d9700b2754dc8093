"""The report of a recipe: the results of each step, in Markdown with pictures.

Everything is read from the files of the steps, so a report can be written at any point of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuna.data.files import open_rows
from tuna.gather.responses import ENDS
from tuna.recipe.pictures import accuracy_picture, histogram_picture, training_picture
from tuna.recipe.steps import PlannedStep, Recipe
from tuna.system.writing import replacing

__all__ = ["write_report"]

REPORT = "report.md"
Steps = Sequence[PlannedStep]
SAID = ("data", "records", "responses")  # numbers of a ranking that its table already shows
METRICS = (("rank/accuracy", "pairs right"), ("rank/top1", "top-1"), ("rank/kendall", "Kendall τ"))


def write_report(recipe: Recipe, steps: Steps, folder: Path) -> Path:
    """Write `report.md` and its pictures into `folder`; returns the path of `report.md`.

    Args:
        recipe: the recipe.
        steps: its plan; steps that are not done appear only in the table of steps.
        folder: created if missing.
    """
    done = [step for step in steps if step.done]
    parts = [f"# {recipe.title or 'Recipe'}", _steps_table(steps)]
    parts += [part for part in (_gathered(done, folder), _ranked(done, folder)) if part]
    parts += [part for part in (_scored(done, folder), _trained(done, folder), _commands(done)) if part]
    with replacing(folder / REPORT) as file:
        file.write(("\n\n".join(parts) + "\n").encode())
    return folder / REPORT


def _steps_table(steps: Steps) -> str:
    rows = []
    for step in steps:
        found = _json(step.done_file) if step.done else {}
        state = "done" if step.done else "not yet"
        if found.get("exit_code"):
            state = "done, some records set aside"
        rows.append([step.step.name, step.step.run, state, _number(found.get("seconds"), 1)])
    total = sum(_json(step.done_file)["seconds"] for step in steps if step.done)
    return "\n\n".join(
        ["## Steps", _table(["step", "command", "state", "seconds"], rows), f"Total: {total:,.1f} seconds."]
    )


def _gathered(steps: Steps, folder: Path) -> str:
    """Responses of teacher and student: number, length, similarity and calls."""
    rows, lengths = [], {}
    for step in steps:
        if step.step.run not in ("generate", "sample"):
            continue
        responses = [response for row in _rows(step.product) for response in row["responses"]]
        tokens = [response["tokens"] for response in responses if response.get("tokens")]
        cut = sum((response.get("finish_reason") or "").lower() not in ENDS for response in responses)
        alike = _json(step.folder / "diversity.json")
        calls = _json(step.folder / "summary.json").get("calls of all runs")
        lengths[_title(step)] = tokens
        rows.append(
            [
                _title(step),
                str(len(_rows(step.product))),
                str(len(responses)),
                _number(float(np.mean(tokens)) if tokens else None, 1),
                f"{cut / len(responses):.0%}",
                _number(alike.get("rouge_mean"), 3),
                _number(alike.get("rouge_worst_mean"), 3),
                str(alike.get("alike", "")),
                "" if calls is None else str(calls),
            ]
        )
    if not rows:
        return ""
    heads = ["", "prompts", "responses", "mean tokens", "cut", "mean ROUGE-L", "highest ROUGE-L", "alike", "calls"]
    parts = ["## Responses", _table(heads, rows)]
    if any(lengths.values()):
        parts.append(_picture(folder, "lengths.png", "Lengths of the responses", histogram_picture, lengths, "tokens"))
    return "\n\n".join(parts)


def _ranked(steps: Steps, folder: Path) -> str:
    """Both rankings: number of candidates, what the rules excluded, and the scores."""
    parts, scores = [], {}
    for step in steps:
        if step.step.run not in ("rank", "judge"):
            continue
        rows = _rows(step.product)
        sizes = [len(row["responses"]) for row in rows]
        figures = _json(step.folder / ("figures.json" if step.step.run == "rank" else "summary.json"))
        facts = [["records", str(len(rows))], ["responses", f"{sum(sizes)}, {np.mean(sizes):.2f} per record"]]
        facts += [
            [name.replace("_", " "), shown]
            for name, value in figures.items()
            if (shown := _fact(value)) and name not in SAID
        ]
        parts.append(f"### {_title(step)}\n\n" + _table(["", ""], facts))
        found = [float(one["score"]) for row in rows for one in _candidates(row) if one.get("score") is not None]
        found = found or [float(value) for row in rows for value in row.get("scores") or ()]
        if found:
            scores[_title(step)] = found
    if not parts:
        return ""
    parts = ["## Rankings", *parts]
    for number, (title, values) in enumerate(scores.items()):
        name = f"scores-{number + 1}.png"
        parts.append(_picture(folder, name, f"Scores: {title}", histogram_picture, {title: values}, "score"))
    return "\n\n".join(parts)


def _candidates(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = row.get("candidates")
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _scored(steps: Steps, folder: Path) -> str:
    """How often each model ranks as each dataset does: the training stages, and the agreement of the rankings."""
    rows, bars = [], {}
    for step in steps:
        if step.step.run != "score":
            continue
        summary = _json(step.product)
        metrics = summary.get("metrics", {})
        values = [_number(metrics.get(name), 3) for name, _ in METRICS]
        rows.append([_title(step), str(summary.get("groups", "")), *values])
        if "rank/accuracy" in metrics:
            bars[_title(step)] = float(metrics["rank/accuracy"])
    if not rows:
        return ""
    table = _table(["", "groups", *(label for _, label in METRICS)], rows)
    note = (
        "Kendall τ is the mean over groups of (pairs in the same order - pairs in the opposite order) / pairs, over "
        "pairs that are not tied in the data; chance level is an accuracy of 0.5 and a τ of 0."
    )
    picture = _picture(folder, "accuracy.png", "Pairs ranked as the data does", accuracy_picture, bars) if bars else ""
    return "\n\n".join(part for part in ("## Agreement and pair accuracy", table, note, picture) if part)


def _trained(steps: Steps, folder: Path) -> str:
    """Training runs: results before and after, and the curves."""
    rows, logs = [], {}
    for step in steps:
        if step.step.run != "train":
            continue
        metrics = _json(step.folder / "metrics.json")
        before, after = metrics.get("before") or {}, metrics.get("after") or {}
        logs[_title(step)] = metrics.get("log", [])
        row = [_title(step), str(metrics.get("data", {}).get("groups", "")), str(metrics.get("steps", ""))]
        for name in ("eval_loss", "eval_rank/accuracy"):
            row += [_number(before.get(name), 4), _number(after.get(name), 4)]
        rows.append(row)
    if not rows:
        return ""
    heads = ["", "groups", "steps", "held-out loss before", "after", "held-out pair accuracy before", "after"]
    picture = _picture(folder, "training.png", "Training", training_picture, logs)
    return "\n\n".join(["## Training", _table(heads, rows), picture])


def _commands(steps: Steps) -> str:
    lines = [_json(step.done_file)["command"] for step in steps]
    return "## Commands\n\n```sh\n" + "\n".join(lines) + "\n```" if lines else ""


def _picture(folder: Path, name: str, text: str, draw: Any, *arguments: Any) -> str:
    draw(folder / name, *arguments)
    return f"![{text}]({name})"


def _title(step: PlannedStep) -> str:
    return step.step.title or step.step.name


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in lines
    )


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown}" for name, item in value.items() if (shown := _fact(item)))
    if isinstance(value, bool) or value is None or value == "":
        return ""
    return _number(value, 4) if isinstance(value, int | float) else str(value)


def _number(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in open_rows(path).items if isinstance(row, dict)]


def _json(path: Path) -> dict[str, Any]:
    """The content of the file, or an empty dict if there is no file."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text("utf-8"))
    return found if isinstance(found, dict) else {}
