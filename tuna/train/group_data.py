"""A trainer's datasets as tokenised groups, and their checks before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from tuna.data.notices import data_notices
from tuna.data.problems import problem_lines
from tuna.data.records import Record, RecordSet, read_records
from tuna.data.templates import end_generation_at
from tuna.data.tokenization import TokenizedGroup, tokenize_records
from tuna.data.vocabulary import check_vocabulary
from tuna.train.config import TunaConfig

__all__ = ["GroupData", "check_data", "tokenized"]

logger = logging.getLogger(__name__)
GroupData = Sequence[TokenizedGroup] | Sequence[Record] | Sequence[Mapping[str, Any]]


def tokenized(dataset: GroupData, args: TunaConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[TokenizedGroup]:
    """`dataset` as tokenised groups; records, and rows of records, are tokenised with the settings in `args`.

    Raises:
        TypeError: elements of another type.
        ValueError: records without a tokenizer, no usable record, or several splits of a dataset.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"train_dataset has several splits, pass one of them: {', '.join(map(str, dataset))}")
    items: list[Any] = list(dataset)
    if all(isinstance(item, TokenizedGroup) for item in items):
        return items
    wrong = next((item for item in items if not isinstance(item, Record | Mapping)), None)
    if wrong is not None or len({isinstance(item, Record) for item in items}) > 1:
        odd = type(wrong).__name__ if wrong is not None else "a mixture"
        raise TypeError(f"a dataset must have TokenizedGroup, Record or rows of records, all of one kind, not {odd}")
    if tokenizer is None:
        raise ValueError("records need a tokenizer: pass processing_class=tokenizer")
    rows = items and isinstance(items[0], Mapping)
    found = read_records(items, on_bad=args.on_bad) if rows else RecordSet(items, [])
    groups, problems = tokenize_records(
        found.records, tokenizer, template=args.template, max_length=args.max_length, on_bad=args.on_bad
    )
    problems = [*found.problems, *problems]
    for line in problem_lines(problems):
        logger.warning("%s", line)
    if not groups:
        raise ValueError(f"none of the {len(items)} records can be used; first problem: {problems[0]}")
    return groups


def check_data(
    model: nn.Module, train: Any, evaluation: Any, args: TunaConfig, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Reject tokens without an embedding, log warnings, and set the end token in the model's generation config."""
    sets = dict(evaluation) if isinstance(evaluation, Mapping) else {"": evaluation} if evaluation else {}
    for groups in (train or (), *sets.values()):
        check_vocabulary(model, groups, tokenizer)
    facts: Any = {"template": args.template, "max_length": args.max_length, "tokenizer": tokenizer}
    for notice in data_notices(train, sets, **facts) if args.process_index == 0 else ():
        logger.warning("%s", notice)
    if tokenizer is not None:
        end_generation_at(model, tokenizer, args.template)
