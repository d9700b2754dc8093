"""Laws of the flags: those of a dataclass are its fields, with its defaults; each help is one sentence; a number
outside its range is refused by name before any work."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name, walk_packages
from typing import Any

import pytest
import typer
from transformers import HfArgumentParser

import tuna
from tuna.cli import COMMANDS, app, main
from tuna.cli.flags import Flags

ROOT: Any = typer.main.get_command(app)
PAID = ("generate", "judge", "sample")
BLOCK = (
    "key_variable", "requests_per_minute", "request_timeout", "total_timeout", "max_attempts", "backoff",
    "max_backoff", "concurrency", "max_calls", "max_cost", "price_input", "price_output",
)  # fmt: skip
SOURCES = (
    "tuna.train.config:TunaConfig",
    "tuna.train.run_settings:RunSettings",
    "tuna.gather.api.settings:EndpointSettings",
    "tuna.gather.api.budget:Prices",
    "tuna.gather.likelihood:RankingRules",
    "tuna.gather.sampling:Diversity",
    "tuna.plan.settings:Sharding",
    "tuna.compare.demo:DemoSettings",
)


def walk(command: Any = ROOT, name: str = "") -> Iterator[tuple[str, Any]]:
    for word, child in getattr(command, "commands", {}).items():
        yield from walk(child, f"{name} {word}".strip())
    if not hasattr(command, "commands"):
        yield name, command


COMMAND = dict(walk())
OPTIONS = [(name, item) for name, command in COMMAND.items() for item in command.params]


def flags_of(name: str) -> list[Flags]:
    function = resolve_name(f"tuna.cli.{name}:{name}")
    hints = [item.annotation for item in inspect.signature(function, eval_str=True).parameters.values()]
    return [mark for hint in hints for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Flags)]


FIELDS = [(name, flags, word) for name in COMMANDS for flags in flags_of(name) for word in flags.words.split()]


@pytest.mark.parametrize(("name", "flags", "word"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_flag_is_its_field(name: str, flags: Flags, word: str) -> None:
    *short, field = word.split("=")
    owner = resolve_name(flags.source)
    known = {item.name: item for item in fields(owner)}[field]
    default = known.default if known.default_factory is MISSING else known.default_factory()
    option = next(item for item in COMMAND[name].params if item.name == flags.prefix + field)
    assert option.help == known.metadata["help"]
    assert f"--{flags.prefix}{field}".replace("_", "-") in option.opts
    assert {flag.lstrip("-") for flag in option.opts} >= set(short)
    assert option.required == (default is MISSING and not flags.unset)
    if flags.unset:
        plain = {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)
        assert option.default is None and option.show_default == (False if default in (None, MISSING) else plain)
    elif default is not MISSING and field not in flags.defaults:
        assert option.default == default or (option.default, default) == ([], ())


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_a_help_is_one_sentence_without_the_default(name: str, option: Any) -> None:
    text = option.help
    assert text and "\n" not in text and text.endswith(".") and text[0].isupper(), (name, text)
    assert "default" not in text.lower()
    assert len(text) <= 120 or (name, option.name) == ("data convert", "format")


def test_paid_commands_have_the_same_flags() -> None:
    def shown(name: str) -> dict[str, Any]:
        options = {item.name: item for item in COMMAND[name].params}
        return {field: (options[field].default, options[field].help, tuple(options[field].opts)) for field in BLOCK}

    assert shown("generate") == shown("judge") == shown("sample")
    addresses = [next(item for item in COMMAND[name].params if item.name == "base_url") for name in PAID]
    assert addresses[0].default == addresses[1].default == "https://api.openai.com/v1"
    assert [item.envvar for item in addresses] == ["OPENAI_BASE_URL", "OPENAI_BASE_URL", None]
    assert addresses[2].default is None  # the student runs here


def test_a_flag_given_its_default_wins_over_set_and_one_not_given_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr("tuna.train.run.run_training", lambda run, settings, console: seen.append((run, settings)))
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny\ndata: a.jsonl\noutput_dir: out\nmargin: 0.3\nresume: true\nseed: 7\n")
    words = f"train --config {file} --set mle_weight=2 --set max_length=64 --margin 0.1 --mle-weight 1 --no-resume"
    with pytest.raises(SystemExit):
        main(words.split())
    ((run, settings),) = seen
    assert not run.resume
    assert settings == {"output_dir": "out", "margin": 0.1, "mle_weight": 1.0, "max_length": 64, "seed": 7}


@pytest.mark.parametrize("source", SOURCES)
def test_transformers_parser_takes_the_dataclasses(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = resolve_name(source)
    for item in fields(owner):
        monkeypatch.setattr(item, "type", item.type)  # which that parser writes over
    needed = [item for item in fields(owner) if item.default is MISSING and item.default_factory is MISSING]
    words = [word for item in needed for word in (f"--{item.name}", "x")]
    if source.endswith("TunaConfig"):
        words += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--share", "prompt", "--learning_rate", "3e-6"]
    (made,) = HfArgumentParser(owner).parse_args_into_dataclasses(words)
    if source.endswith("TunaConfig"):
        assert (made.share, made.learning_rate, made.max_length) == ("prompt", 3e-6, 512)
    else:
        assert made == owner(**{item.name: "x" for item in needed})


def test_listing_commands_imports_no_torch() -> None:
    code = (
        "import sys\nfrom tuna.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic', 'tuna.gather', 'tuna.train'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    heavy = "{'torch', 'transformers', 'pydantic', 'tuna.gather', 'tuna.train'}"
    assert heavy in code
    light = code.replace("['--help']", "['generate', '--help']").replace(heavy, "{'torch', 'transformers'}")
    subprocess.run([sys.executable, "-c", light], check=True, capture_output=True)


# Numbers that a flag takes though most do not, and why. A name alone is of every command.
NEGATIVE = {
    "length_penalty": "an exponent of either sign",
    "max_steps": "transformers' word for no limit",
    "generate seed": "the endpoint's to judge",
    "sample seed": "the endpoint's to judge; a local student refuses it",
    "judge seed": "text that a hash is made of",
    "data split seed": "text that a hash is made of",
}
ZERO = {
    **NEGATIVE,
    "seed": "a seed like any other",
    "margin": "ties are enough",
    "mle_weight": "ranking alone",
    "learning_rate": "steps that change nothing",
    "lora_r": "all weights are trained",
    "warmup_steps": "no warm-up",
    "temperature": "greedy",
    "backoff": "no wait",
    "max_backoff": "no wait",
    "max_calls": "the journal alone",
    "max_cost": "the journal alone",
    "price_input": "free",
    "price_output": "free",
    "tie": "equal scores alone",
    "port": "a free one",
    "show": "no groups",
    "stage": "no ZeRO",
    "host_memory": "no offload fits",
}
BASE = {
    "generate": "--instructions {prompts} --model m --output {out} --base-url http://localhost:9/v1 --dry-run "
    "--price-input 1 --price-output 1",
    "judge": "--data {data} --model m --output {out} --base-url http://localhost:9/v1 --dry-run "
    "--price-input 1 --price-output 1",
    "sample": "--instructions {prompts} --model m --output {out} --base-url http://localhost:9/v1 --dry-run "
    "--price-input 1 --price-output 1",
    "rank": "--data {data} --output {out}",
    "train": "--model tiny --data {data} --output {out} --eval-fraction 0.5 --lora-r 2 --yes",
    "score": "--model tiny --data {data}",
    "serve": "--model tiny",
    "plan": "--model llama-7b",
    "demo": "--tiny --output {out}",
    "data validate": "{data}",
    "data stats": "{data} --model tiny",
    "data split": "{data} --output {out}",
}


def numeric(allowed: dict[str, str]) -> list[tuple[str, str]]:
    found = [(name, item) for name, item in OPTIONS if is_number(item)]
    return [(n, i.opts[-1]) for n, i in found if i.name not in allowed and f"{n} {i.name}" not in allowed]


def is_number(option: Any) -> bool:
    described = getattr(option, "type_descriptor", None)  # of later versions of Typer
    return described.annotation in (int, float) if described else option.type.name.split()[0] in ("integer", "float")


@pytest.fixture(scope="module")
def everything_imported() -> None:
    """So that no module is first imported while a stand-in is in place, and keeps it."""
    for module in walk_packages(tuna.__path__, "tuna."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


@pytest.fixture
def nothing_runs(everything_imported: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the number was taken: work begins")

    for place in ("tuna.models.loading", "tuna.train.run", "tuna.compare.demo"):
        monkeypatch.setattr(f"{place}.load_model", reached)
    monkeypatch.setattr("tuna.plan.simulate.Simulator", reached)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("name", "flag", "number"),
    [(*case, -1) for case in numeric(NEGATIVE)] + [(*case, 0) for case in numeric(ZERO)],
)
def test_a_number_outside_of_its_range_is_refused(
    name: str, flag: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / f"{name}.jsonl" for name in ("data", "prompts")} | {"out": tmp_path / "out"}
    rows = [{"id": str(i), "prompt": f"p{i}", "responses": ["a", "b"], "scores": [1, 0]} for i in range(4)]
    places["data"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    places["prompts"].write_text('{"id": "a", "prompt": "Hi."}\n')
    words = [*name.split(), *BASE[name].format(**places).split(), flag, str(number)]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert flag in said and str(number) in said.replace(flag, ""), said


def test_the_lists_name_flags_that_there_are() -> None:
    known = {item.name for _, item in OPTIONS} | {f"{name} {item.name}" for name, item in OPTIONS}
    assert set(ZERO) <= known
