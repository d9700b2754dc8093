"""Flags from dataclasses: a field's name, type, default and `metadata["help"]` make an option of Typer.

A parameter `values: Annotated[dict[str, Any], Flags("package.module:Class", "field other_field")]` of a command stands
for one option per field and receives their values by field. The dataclass is imported when the options of its command
are looked at, so that `tuna --help` imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

__all__ = ["FlagCommand", "Flags"]


@dataclass(frozen=True)
class Flags:
    """Options from fields of a dataclass; several `Flags` on one parameter share its dictionary.

    Attributes:
        source: the dataclass, as `module:name`.
        words: its fields in order; `lr=learning_rate` is `--lr` and `--learning-rate`, `y=yes` is `-y` and `--yes`.
        panel: heading in the help.
        prefix: before the names of the options.
        unset: show the defaults, but leave fields whose option was not given out of the dictionary.
        defaults: where those of the command differ from those of the dataclass.
        variables: environment variables that are read where an option is not given.
    """

    source: str
    words: str
    panel: str | None = None
    prefix: str = ""
    unset: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> Iterator[inspect.Parameter]:
        """The options, as parameters of a Typer command."""
        owner = resolve_name(self.source)
        hints, known = get_type_hints(owner), {item.name: item for item in fields(owner)}
        for *short, name in (word.split("=") for word in self.words.split()):
            item, kind = known[name], _kind(hints[name])
            factory = item.default_factory
            default = self.defaults.get(name, item.default if factory is MISSING else factory())
            flags = [f"--{word}" if len(word) > 1 else f"-{word}" for word in short]
            flags.append(f"--{self.prefix}{name}".replace("_", "-"))
            option = typer.Option(
                None if self.unset else ... if default is MISSING else default,
                *(f"{flag}/--no{flag[1:]}" if kind is bool and flag[1] == "-" else flag for flag in flags),
                help=item.metadata["help"],
                show_default=_shown(default) if self.unset else True,
                envvar=self.variables.get(name),
                rich_help_panel=self.panel,
            )
            yield inspect.Parameter(self.prefix + name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)

    def values(self, options: dict[str, Any]) -> dict[str, Any]:
        """Values by field, taken out of those of the command's options."""
        names = [word.rpartition("=")[2] for word in self.words.split()]
        found = {name: options.pop(self.prefix + name) for name in names}
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return {name: value for name, value in found.items() if value is not None or not self.unset}


def _kind(hint: Any) -> Any:
    """The type of an option for a field's type: without None; text where that is one of several."""
    if get_origin(hint) in (Union, UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return str if str in kinds else _kind(kinds[0])
    return list[str] if get_origin(hint) is tuple else hint


def _shown(default: Any) -> str | bool:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return False if default is None or default is MISSING else str(default)


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command with options in the place of each parameter that is `Flags`."""
    parameters: list[inspect.Parameter] = []
    flags: dict[str, list[Flags]] = {}
    for item in inspect.signature(function, eval_str=True).parameters.values():
        found = [mark for mark in getattr(item.annotation, "__metadata__", ()) if isinstance(mark, Flags)]
        if found:
            flags[item.name] = found
            parameters += [parameter for mark in found for parameter in mark.parameters()]
        else:
            parameters.append(item.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def command(**options: Any) -> None:
        for name, marks in flags.items():
            options[name] = {key: value for mark in marks for key, value in mark.values(options).items()}
        function(**options)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


class FlagCommand(TyperCommand):
    """A command whose options are made when they are first looked at."""

    def __init__(self, function: Callable[..., None], **settings: Any) -> None:
        super().__init__(**{**settings, "help": inspect.getdoc(function)})
        self.function = function
        del self.params, self.callback

    def __getattr__(self, name: str) -> Any:
        if name not in ("params", "callback"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(self.name)(_with_options(self.function))
        made = typer.main.get_command(app)
        self.params, self.callback = made.params, made.callback
        return getattr(self, name)
