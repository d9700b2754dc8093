"""Settings from YAML and JSON text: `1e-5` is a number, duplicate keys are errors, errors name the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["parse_yaml", "read_settings_file"]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e-5 without a dot is a number (as in YAML 1.2 and JSON), and duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; keys from a merge (`<<`) may be overridden."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"duplicate key {key.value!r}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text.

    Raises:
        ValueError: invalid YAML; the message begins with `where`.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # an invalid date, a number of thousands of digits
        raise ValueError(f"{where}: not valid YAML: {error}") from error


def read_settings_file(path: Path, what: str) -> dict[str, Any]:
    """Read the mapping of a YAML or JSON file; an empty file is an empty mapping.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, not text, or not a mapping of names to values.
    """
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"no such {what}: {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start + 1})") from error
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be keys and values, not a {type(content).__name__}")
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{path}: the key {wrong[0]!r} is not text")
    return content
