"""The one way to the terminal: what is not ours (data, file names, an endpoint's words) arrives as plain, visible text.

A response may hold anything: escape sequences that clear the screen, retitle the window or hide text, characters that
turn the reading direction round, mark-up of rich. `Terminal` shows such characters as they would be written in a
program (`\\x1b`, `\\u202e`) and reads no mark-up; `say` and `complain` do the same for single lines, `log_visibly` for
the logs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

__all__ = ["Terminal", "complain", "log_visibly", "say", "say_json", "visible"]

# Control characters but tab and line feed (C0, C1, delete), what changes the direction or hides, half surrogate pairs.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)


def visible(text: str, encoding: str | None = "utf-8") -> str:
    """`text` with every character that a terminal would act on, or cannot show, written out.

    Examples:
        >>> visible("\\x1b[2Jgone \\u202e")
        '\\\\x1b[2Jgone \\\\u202e'
    """
    shown = HIDDEN.sub(lambda found: _written(found[0]), text)
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


class Terminal(Console):
    """A console of rich for text that is not ours: no mark-up, no emoji codes, no control characters.

    Args:
        stderr: write there instead.
        quiet: write nothing.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is shown passes here; rich's own control codes are marked as such."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, self.encoding), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """Also titles and cells, so that widths are counted with what is shown."""
        return super().render_str(visible(text, self.encoding), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Rich would read mark-up in a status."""
        return super().status(Text(visible(status)) if isinstance(status, str) else status, **options)


def say(text: str) -> None:
    """A line on standard output."""
    print(visible(text, sys.stdout.encoding), flush=True)


def say_json(value: Any) -> None:
    """A JSON document on standard output, in ASCII: its strings hold no character that a terminal would act on."""
    print(json.dumps(value), flush=True)


def complain(text: str) -> None:
    """A line on standard error."""
    print(visible(text, sys.stderr.encoding), file=sys.stderr)


class _Visible(logging.Handler):
    """Warnings on standard error, as they would come without a handler, but visible."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            complain(self.format(record))
        except Exception:  # as every handler: a log line must not end the program
            self.handleError(record)


def log_visibly() -> None:
    """Send the warnings of our own modules through `complain`; data stands in them too."""
    logger = logging.getLogger("tuna")
    if not any(isinstance(handler, _Visible) for handler in logger.handlers):
        logger.addHandler(_Visible(logging.WARNING))


def _written(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
