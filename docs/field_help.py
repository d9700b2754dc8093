"""A griffe extension: the `help` of a dataclass field's metadata begins its docstring on the page."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Expr, Extension

from tuna.system.common_settings import HELP


class FieldHelp(Extension):
    """Reads `field(metadata={"help": …})`, as transformers' argument parser does: a text, or `HELP["…"]`."""

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        if not isinstance(attr.value, Expr):
            return
        for node in ast.walk(ast.parse(str(attr.value), mode="eval")):
            if isinstance(node, ast.keyword) and node.arg == "metadata":
                texts = [_help(node.value), *([attr.docstring.value] if attr.docstring else [])]
                attr.docstring = Docstring("\n\n".join(texts), parent=attr)


def _help(metadata: ast.expr) -> str:
    assert isinstance(metadata, ast.Dict)
    text = metadata.values[[ast.literal_eval(key) for key in metadata.keys if key].index("help")]
    return HELP[ast.literal_eval(text.slice)] if isinstance(text, ast.Subscript) else ast.literal_eval(text)
