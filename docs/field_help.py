"""A griffe extension: the ``help`` of a dataclass field's metadata begins its docstring on the page."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Expr, Extension


class FieldHelp(Extension):
    """Reads ``field(metadata={"help": "…"})``, the form that transformers' argument parser reads."""

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        if not isinstance(attr.value, Expr):
            return
        for node in ast.walk(ast.parse(str(attr.value), mode="eval")):
            if isinstance(node, ast.keyword) and node.arg == "metadata":
                texts = [ast.literal_eval(node.value)["help"], *([attr.docstring.value] if attr.docstring else [])]
                attr.docstring = Docstring("\n\n".join(texts), parent=attr)
