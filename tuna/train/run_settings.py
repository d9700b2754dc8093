"""Settings of `tuna train` from a YAML file and from flags: one vocabulary, the field names.

Keys are fields of `RunSettings` or of `TunaConfig`. Flags win over `--set`, which wins over the file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from tuna.system.common_settings import HELP, Dtype
from tuna.system.settings_text import parse_yaml, read_settings_file
from tuna.train.config import TunaConfig


@dataclass(kw_only=True)
class RunSettings:
    """What a run of `tuna train` is about, beyond the trainer's own settings.

    Raises:
        ValueError: a value outside its range, or evaluation data given twice.
    """

    model: str = field(metadata={"help": HELP["model"]})
    data: str = field(metadata={"help": HELP["data"]})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out ranked records."})
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Fraction of the prompts to hold out, instead of a file of them."}
    )
    eval_first: bool = field(default=True, metadata={"help": "Evaluate before training as well."})
    format: str = field(default="auto", metadata={"help": HELP["format"]})
    limit: int | None = field(default=None, metadata={"help": HELP["limit"]})
    dtype: Dtype = field(default="float32", metadata={"help": HELP["dtype"]})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the weights in 4 bits; needs lora_r."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains all weights."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the LoRA adapter times its rank; without it, twice the rank."}
    )
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules that get a LoRA adapter, separated by commas."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the last checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Overwrite an earlier run in the output folder."})
    yes: bool = field(default=False, metadata={"help": "Train without asking whether the order is right."})

    def __post_init__(self) -> None:
        if self.eval_data is not None and self.eval_fraction is not None:
            raise ValueError("eval_data and eval_fraction are both given: hold out a fraction, or give a file")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction = {self.eval_fraction} must be between 0 and 1")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype = {self.dtype!r} is not one of {get_args(Dtype)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} must be at least 1")
        if self.lora_r < 0:
            raise ValueError(f"lora_r = {self.lora_r} must be at least 0 (0: no adapter)")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha = {self.lora_alpha} must be at least 1")
        if self.load_in_4bit and self.lora_r == 0:
            raise ValueError("load_in_4bit trains an adapter on frozen weights: give its rank, lora_r")
        for name, default in (("lora_alpha", None), ("lora_targets", "all-linear")):
            if self.lora_r == 0 and getattr(self, name) != default:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} would have no effect: no adapter is trained (lora_r)"
                )
        if not self.eval_first and not self.holds_out:
            raise ValueError("eval_first = False would have no effect: nothing is held out (eval_data, eval_fraction)")

    @property
    def holds_out(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.eval_data is not None or self.eval_fraction is not None


RUN_FIELDS = {item.name: item for item in fields(RunSettings)}
DEEPSPEED = (
    "zero_optimization",
    "gradient_clipping",
    "zero_allow_untested_optimizer",
    "offload_optimizer",
    "optimizer",
)
TRAINER_FIELDS = {item.name: item for item in fields(TunaConfig) if item.init}


def merge_settings(
    file: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]
) -> tuple[RunSettings, dict[str, Any]]:
    """Settings of the run, and keyword arguments of `TunaConfig`.

    Args:
        file: YAML with one mapping of keys to values, or None.
        overrides: `key=value` texts; a value is read as YAML.
        flags: values of flags by key; None stands for a flag not given.

    Raises:
        ValueError: an unknown key (near matches are named), a value of the wrong kind, a missing one.
        FileNotFoundError: no such file.
    """
    values = read_settings_file(file, "settings file") if file else {}
    if file and isinstance(values.get("deepspeed"), str):
        values["deepspeed"] = str(file.parent / values["deepspeed"])  # named beside the file, wherever one stands
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {text!r}")
        values[key.strip().replace("-", "_")] = parse_yaml(value, f"--set {key}")
    values |= {key: value for key, value in flags.items() if value is not None}
    known = {**TRAINER_FIELDS, **RUN_FIELDS}
    for key in values:
        if key not in known:
            raise ValueError(_unknown(key, list(known)))
    values = {key: _fitted(known[key], value) for key, value in values.items()}
    for key in ("model", "data", "output_dir"):
        if values.get(key) is None:
            raise ValueError(f"{key} is missing: give it as a flag or in the YAML file")
    run = {key: value for key, value in values.items() if key in RUN_FIELDS}
    return RunSettings(**run), {key: value for key, value in values.items() if key not in RUN_FIELDS}


def _unknown(key: str, known: Sequence[str]) -> str:
    if key in DEEPSPEED:
        return f"unknown setting {key!r}: it is DeepSpeed's, give it under 'deepspeed'"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `tuna train --help` lists common ones"
    return f"unknown setting {key!r}{hint}"


def _fitted(field: Field[Any], value: Any) -> Any:
    """`value` as the kind of its field; YAML 1.1 reads no as false."""
    kinds = set(re.findall(r"\w+", str(field.type))) - {"class", "None"}
    if value is None:
        return value
    if kinds == {"bool"}:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{field.name} = {value!r} must be true or false")
    if not kinds <= {"int", "float"}:
        if value is False and field.name.endswith("_strategy"):
            return "no"
        if value is False and field.name == "report_to":
            return "none"
        if kinds == {"str"} and not isinstance(value, str) and not (isinstance(value, bool) and field.name == "fsdp"):
            raise ValueError(f"{field.name} = {value!r} must be text")
        return value
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if "float" in kinds and not math.isnan(number):
        return number
    if number.is_integer():
        return int(number)
    raise ValueError(f"{field.name} = {value!r} must be {'a number' if 'float' in kinds else 'a whole number'}")
