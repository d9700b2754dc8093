"""A recipe: `tuna` commands as steps with inputs, outputs and parameters, planned before any of them runs.

A step is a command and its flags. `${name}` in a value is replaced by the product of an earlier step, the address of a
server of the recipe, or one of its variables. A step's key is a hash of its command, its flags, the keys of the
steps it refers to and the bytes of the files it reads; its folder is named by the key. So completed steps are reused,
a changed step gets a new folder, and nothing is overwritten.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuna.gather.api.journal import content_key
from tuna.system.settings_text import read_settings_file
from tuna.system.validation import reason
from tuna.system.writing import content_hash

__all__ = ["KINDS", "Kind", "PlannedServer", "PlannedStep", "Recipe", "Server", "Step", "plan", "read_recipe"]

REFERENCE = re.compile(r"\$\{([^}]*)\}")
NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
# Flags that change the number and the pace of calls, not the answers: with a larger budget, paid answers must be
# reused.
UNKEYED = frozenset(
    {
        "api-key-env", "backoff", "batch", "concurrency", "max-attempts", "max-backoff", "max-calls", "max-cost",
        "price-input", "price-output", "request-timeout", "requests-per-minute", "total-timeout",
    }
)  # fmt: skip
Run: TypeAlias = Literal["generate", "rank", "split", "train", "sample", "judge", "score"]


@dataclass(frozen=True)
class Kind:
    """A command that a step may run.

    Attributes:
        words: the words after `tuna`.
        product: the path that `${step}` refers to, in the step's folder ("": the folder).
        outputs: flags set by the recipe, to paths in the step's folder.
        more: further arguments added by the recipe.
        positional: positional arguments, by their names in `options`.
        set_aside: whether exit code 1 means "done, but some records were set aside".
    """

    words: tuple[str, ...]
    product: str
    outputs: Mapping[str, str]
    more: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    set_aside: bool = False


KINDS: dict[Run, Kind] = {
    "generate": Kind(("generate",), "responses.jsonl", {"output": ""}, set_aside=True),
    "rank": Kind(("rank",), "ranked.jsonl", {"output": "ranked.jsonl", "json": "figures.json"}),
    "split": Kind(("data", "split"), "", {"output": ""}, positional=("source",)),
    "train": Kind(("train",), "", {"output": ""}, ("--yes", "--overwrite")),
    "sample": Kind(("sample",), "responses.jsonl", {"output": ""}, set_aside=True),
    "judge": Kind(("judge",), "records.jsonl", {"output": ""}, set_aside=True),
    "score": Kind(("score",), "score.json", {"json": "score.json", "per-record": "per_record.jsonl"}),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(_Strict):
    """A local model served by `tuna serve`, started for the steps that refer to it; `${name}` is its address.

    Attributes:
        model: the value of `tuna serve --model`; may refer to a training step.
        port: on loopback; fixed, since a paid run records the address of its endpoint.
        options: further flags of `tuna serve`.
    """

    model: str
    port: int = Field(8471, ge=1024, le=65535)
    options: dict[str, Any] = {}


class Step(_Strict):
    """One step.

    Attributes:
        name: the name by which later steps refer to it.
        run: the command: generate, rank, split, train, sample, judge or score.
        title: the title in the report; default: the name.
        options: flags of the command, without the dashes.
    """

    name: str = Field(pattern=NAME)
    run: Run
    title: str | None = None
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _flags(cls, options: dict[str, Any]) -> dict[str, Any]:
        named = {str(key).replace("_", "-"): value for key, value in options.items()}
        if len(named) < len(options):
            raise ValueError("has the same flag twice, with - and with _")
        return named

    @model_validator(mode="after")
    def _outputs_are_ours(self) -> Step:
        taken = sorted(set(self.options) & set(KINDS[self.run].outputs))
        if taken:
            raise ValueError(f"options: {taken[0]} is set by the recipe")
        return self


class Recipe(_Strict):
    """A whole recipe.

    Attributes:
        folder: the output folder, relative to the recipe's file.
        title: of the report.
        variables: values that replace `${name}` everywhere else; `tuna recipe run --set` changes them.
        servers: by name.
        steps: in the order they run; a step may refer to earlier steps only.
    """

    folder: str
    title: str | None = None
    variables: dict[str, str | int | float | bool] = {}
    servers: dict[str, Server] = {}
    steps: list[Step] = Field(min_length=1)

    @model_validator(mode="after")
    def _references(self) -> Recipe:
        ports = [server.port for server in self.servers.values()]
        if len(set(ports)) < len(ports):
            raise ValueError(f"two servers have the same port: {ports}")
        known = set(self.servers)
        for step in self.steps:
            if step.name in known:
                raise ValueError(f"steps: duplicate name {step.name!r}")
            for name in _references(step.options):
                if name not in known:
                    raise ValueError(f"step {step.name!r} refers to ${{{name}}}{_hint(name, known)}")
            known.add(step.name)
        for name, server in self.servers.items():
            steps = {step.name for step in self.steps}
            wrong = [found for found in _references(server.model_dump()) if found not in steps]
            if wrong:
                raise ValueError(f"server {name!r} refers to ${{{wrong[0]}}}{_hint(wrong[0], steps)}")
        return self


def read_recipe(path: Path, variables: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and substitute its variables.

    Args:
        path: a YAML file.
        variables: values that replace those of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: invalid YAML, an invalid recipe (the message names every wrong field), or an unknown variable.
    """
    content = read_settings_file(path, "recipe")
    found = content.get("variables")
    known = dict(found) if isinstance(found, Mapping) else {}
    for name in variables or {}:
        if name not in known:
            raise ValueError(f"{path} has no variable {name!r}{_hint(name, known)}")
    known |= variables or {}
    body = {key: _filled(value, known) for key, value in content.items() if key != "variables"}
    try:
        return Recipe.model_validate(body | ({"variables": known} if "variables" in content else {}))
    except ValidationError as error:
        lines = [_plain(detail, body) for detail in error.errors()]
        raise ValueError("\n".join([f"{path} is not a valid recipe:", *(f"  {line}" for line in lines)])) from None


def _filled(value: Any, variables: Mapping[str, Any]) -> Any:
    """`value` with variables substituted; a value that is just one variable keeps the variable's type."""
    if isinstance(value, Mapping):
        return {key: _filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    whole = REFERENCE.fullmatch(value)
    if whole and whole[1] in variables:
        return variables[whole[1]]
    return REFERENCE.sub(lambda found: str(variables.get(found[1], found[0])), value)


@dataclass(frozen=True)
class PlannedServer:
    """A server with all references resolved: its address and the arguments of `tuna`."""

    name: str
    url: str
    arguments: list[str]


@dataclass(frozen=True)
class PlannedStep:
    """A step with all references resolved.

    Attributes:
        step: the step as written.
        key: hash of everything that determines its result.
        folder: the step's folder.
        product: the path of its product.
        arguments: of `tuna`.
        servers: the servers it needs.
    """

    step: Step
    key: str
    folder: Path
    product: Path
    arguments: list[str]
    servers: list[PlannedServer]

    @property
    def kind(self) -> Kind:
        """The kind of its command."""
        return KINDS[self.step.run]

    @property
    def done_file(self) -> Path:
        """Written when the step is done."""
        return self.folder / "done.json"

    @property
    def done(self) -> bool:
        """Whether the step is complete."""
        return self.done_file.is_file() and self.product.exists()

    def command_line(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(["tuna", *self.arguments])


def plan(recipe: Recipe, base: Path, tuna: Any) -> list[PlannedStep]:
    """Plan every step with its key, folder and arguments; nothing is run or written.

    Args:
        recipe: the recipe.
        base: the folder of the recipe's file; relative paths start there.
        tuna: the click command `tuna`, used to check flags and values.

    Raises:
        ValueError: an unknown flag, or a value that the command rejects.
    """
    root = (base / recipe.folder).resolve()
    products: dict[str, Path] = {}
    keys: dict[str, str] = {}
    planned: list[PlannedStep] = []
    for step in recipe.steps:
        servers = {name: recipe.servers[name] for name in _references(step.options) if name in recipe.servers}
        for name, server in servers.items():
            if missing := [x for x in _references(server.model_dump()) if x not in keys]:
                raise ValueError(f"step {step.name!r} needs server {name!r}, whose ${{{missing[0]}}} comes later")
        uses = {name: _server_content(server, base, keys) for name, server in servers.items()}
        inputs = {name: keys[name] for name in _references(step.options) if name in keys}
        content = {
            "run": step.run,
            "options": _content({k: v for k, v in step.options.items() if k not in UNKEYED}, base),
            "inputs": inputs,
            "servers": uses,
        }
        key = content_key(content)
        folder = root / f"{step.name}-{key[:10]}"
        known: dict[str, str] = {name: str(path) for name, path in products.items()}
        running = [_planned_server(name, server, known, base, tuna) for name, server in servers.items()]
        known |= {server.name: server.url for server in running}
        options = {name: _resolved(value, known, base) for name, value in step.options.items()}
        outputs = {name: str(folder / place if place else folder) for name, place in KINDS[step.run].outputs.items()}
        kind = KINDS[step.run]
        source = [str(options.pop(name)) for name in kind.positional if name in options]
        arguments = [
            *kind.words,
            *_arguments(_command(tuna, kind.words), kind.words, options | outputs, step.name),
            *kind.more,
            *source,
        ]
        _check(_command(tuna, kind.words), kind.words, arguments[len(kind.words) :], step.name)
        product = folder / kind.product if kind.product else folder
        planned.append(PlannedStep(step, key, folder, product, arguments, running))
        products[step.name], keys[step.name] = product, key
    return planned


def _planned_server(name: str, server: Server, known: Mapping[str, str], base: Path, tuna: Any) -> PlannedServer:
    options = {key.replace("_", "-"): _resolved(value, known, base) for key, value in server.options.items()}
    fixed = {"model": _resolved(server.model, known, base), "port": server.port}
    command = _command(tuna, ("serve",))
    flags = _arguments(command, ("serve",), options | fixed, f"server {name}")
    _check(command, ("serve",), flags, f"server {name}")
    arguments = ["serve", *flags, "--quiet", "--with-stdin"]
    return PlannedServer(name, f"http://127.0.0.1:{server.port}/v1", arguments)


def _server_content(server: Server, base: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a server that determine its answers; not the port."""
    inputs = {name: keys[name] for name in _references(server.model_dump())}
    return {"model": _content(server.model, base), "options": _content(server.options, base), "inputs": inputs}


def _references(value: Any) -> list[str]:
    if isinstance(value, str):
        return REFERENCE.findall(value)
    if isinstance(value, Mapping):
        return [name for item in value.values() for name in _references(item)]
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    return []


def _resolved(value: Any, known: Mapping[str, str], base: Path) -> Any:
    """Replace references, and make paths that exist relative to the recipe's folder absolute."""
    if isinstance(value, list):
        return [_resolved(item, known, base) for item in value]
    if not isinstance(value, str):
        return value
    if REFERENCE.search(value):
        return REFERENCE.sub(lambda found: known[found[1]], value)
    path = _existing(value, base)
    return value if path is None else str(path)


def _content(value: Any, base: Path) -> Any:
    """`value` with every file it names replaced by a hash of the content."""
    if isinstance(value, Mapping):
        return {str(key): _content(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_content(item, base) for item in value]
    path = _existing(value, base) if isinstance(value, str) and not REFERENCE.search(value) else None
    return value if path is None else {"content": content_hash(path)}


def _existing(value: str, base: Path) -> Path | None:
    """The existing file or folder that a value names; it needs a slash or a suffix, so plain words never match."""
    expanded = os.path.expandvars(value)
    if not re.search(r"/|\.\w+$", expanded) or len(expanded) > 1000 or "\n" in expanded:
        return None
    path = base / Path(expanded).expanduser()
    return path.resolve() if path.exists() else None


def _arguments(command: Any, words: tuple[str, ...], options: Mapping[str, Any], owner: str) -> list[str]:
    """Options as command-line arguments, checked against the command's flags."""
    flags = {flag for item in command.params for flag in (*item.opts, *item.secondary_opts)}
    arguments: list[str] = []
    for name, value in options.items():
        if f"--{name}" not in flags:
            known = sorted(flag.removeprefix("--") for flag in flags if not flag.startswith("--no-"))
            raise ValueError(f"step {owner!r}: tuna {' '.join(words)} has no flag {name!r}{_hint(name, known)}")
        if isinstance(value, bool):
            if value or f"--no-{name}" in flags:
                arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}={item}" for item in value]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def _check(command: Any, words: tuple[str, ...], arguments: Sequence[str], owner: str) -> None:
    """Let the command parse its arguments without running."""
    try:
        command.make_context(" ".join(words), list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of click's errors
            raise
        raise ValueError(f"step {owner!r}: tuna {' '.join(words)}: {error.format_message()}") from error


def _command(tuna: Any, words: tuple[str, ...]) -> Any:
    """The command with these words; raises `ValueError` if there is none."""
    command = tuna
    for word in words:
        command = command.commands.get(word)
        if command is None:
            raise ValueError(f"this installation has no command tuna {' '.join(words)}")
    return command


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known: {', '.join(map(repr, sorted(known)))}" if known and len(list(known)) < 12 else ""


def _plain(detail: Any, content: Mapping[str, Any]) -> str:
    """The text of one of pydantic's errors; a step is called by its name if it has one."""
    place: list[str] = []
    value: Any = content
    for part in detail["loc"]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
        name = value.get("name") if isinstance(value, Mapping) else None
        place.append(f"{part} ({name})" if isinstance(part, int) and isinstance(name, str) else str(part))
    message = reason(detail)
    return f"{'.'.join(place)}: {message}" if place else message
