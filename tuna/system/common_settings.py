"""Settings that several dataclasses and commands have: their help, and the names of dtypes."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["HELP", "Dtype"]

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

HELP = {
    "model": "Model: smollm2-135m, tiny, a folder, or a name on the Hugging Face hub.",
    "data": "Ranked records: .json, .jsonl, .parquet or a dataset folder.",
    "format": "Format of the records; see tuna data convert --help for their names.",
    "limit": "Use only the first N records.",
    "dtype": "Dtype of the weights.",
    "max_length": "Maximum length of prompt plus response, in tokens; cuts responses only.",
}
