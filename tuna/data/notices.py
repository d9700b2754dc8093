"""Warnings about data before training or evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tuna.data.templates import unused_chat_template
from tuna.data.tokenization import TokenizedGroup

__all__ = ["cut_notice", "data_notices", "reversed_notice", "sample_of", "shared_prompts_notice"]

CUT = 0.1
"""Fraction of responses cut to max_length above which a warning is given."""
SAMPLED, SAMPLED_TOKENS = 32, 8192
"""Upper limits of groups, and of their tokens, scored to detect reversed ranks."""


def data_notices(
    train: Sequence[TokenizedGroup] | None,
    evaluation: Mapping[str, Sequence[TokenizedGroup]],
    *,
    template: str,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[str]:
    """The warnings about the data of a training run."""
    found = [unused_chat_template(template, tokenizer), cut_notice(train or (), max_length)]
    found += [shared_prompts_notice(train or (), groups, name) for name, groups in evaluation.items()]
    yield from filter(None, found)


def cut_notice(groups: Sequence[TokenizedGroup], max_length: int) -> str | None:
    """A warning if more than a tenth of the responses are cut."""
    count = sum(len(item.group.responses) for item in groups)
    cut = sum(item.cut_responses for item in groups)
    if cut <= CUT * count:
        return None
    return (
        f"{cut:,} of {count:,} responses ({cut / count:.0%}) are cut to max_length = {max_length} tokens of prompt and "
        "response; the model does not learn where cut ones end: raise max_length"
    )


def shared_prompts_notice(
    train: Sequence[TokenizedGroup], held_out: Sequence[TokenizedGroup], name: str = ""
) -> str | None:
    """A warning if prompts of the evaluation data are also trained on."""
    trained = {_key(item) for item in train}
    prompts = {_key(item) for item in held_out}
    both = len(prompts & trained)
    if both == 0:
        return None
    which = f" of {name!r}" if name else ""
    return (
        f"{both:,} of the {len(prompts):,} prompts held out{which} are also trained on, so evaluation results are "
        "too optimistic: split the data by prompt (tuna data split, eval_fraction)"
    )


def sample_of(groups: Sequence[TokenizedGroup]) -> list[TokenizedGroup]:
    """A few groups with at least one pair, spread over the data and cheap to score."""
    ordered = [item for item in groups if _has_pair(item)]
    places = np.linspace(0, len(ordered) - 1, min(SAMPLED, len(ordered))).round().astype(int)
    chosen: list[TokenizedGroup] = []
    tokens = 0
    for place in dict.fromkeys(places.tolist()):
        item = ordered[place]
        tokens += len(item.group.prompt) + sum(map(len, item.group.responses))
        if chosen and tokens > SAMPLED_TOKENS:
            break
        chosen.append(item)
    return chosen


def reversed_notice(accuracy: float | None) -> str | None:
    """A warning if the model, before training, ranks fewer than half of the pairs as the data does."""
    if accuracy is None or not accuracy < 0.5:
        return None
    return (
        f"before training the model ranks {accuracy:.0%} of the pairs as the data does, fewer than half: is the "
        "order reversed (scores: higher is better; ranks: 0 or 1 is best)?"
    )


def _key(item: TokenizedGroup) -> bytes:
    return np.asarray(item.group.prompt, np.int64).tobytes()


def _has_pair(item: TokenizedGroup) -> bool:
    values: Any = item.group.scores if item.group.scores is not None else item.group.ranks
    return values is not None and len(set(values)) > 1
