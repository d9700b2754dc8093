"""Log-probabilities of gathered responses under a local model, for endpoints that return none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuna.data.records import Record
from tuna.data.tokenization import tokenize_records
from tuna.gather.responses import ResponseSet
from tuna.score.scoring import score_dataset

__all__ = ["score_responses"]


def score_responses(
    sets: Sequence[ResponseSet],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    template: str,
    max_length: int = 2048,
    tokens_per_batch: int = 4096,
    backend: str = "auto",
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> list[ResponseSet]:
    """The response sets with `tokens`, `logprob_sum` and `logprob_mean` of a local model, k responses per pass.

    The end token is scored for a response that ended, but not for one that was cut (by a limit or a filter).

    Args:
        sets: the response sets.
        model, tokenizer: from `tuna.models.loading.load_model`; `name` is recorded in `scored_by`.
        template: the template of the prompt; see `tuna.data.templates`.
        max_length: maximum number of tokens of prompt and response; tokens beyond it are not scored.
        tokens_per_batch, backend, on_batch: as in `tuna.score.scoring.score_dataset`.

    Raises:
        BadRecords: a prompt cannot be rendered or leaves no room.
    """
    if not sets:
        return []
    records = [
        Record(
            id=item.id,
            prompt=item.prompt,
            messages=item.messages,
            responses=[response.text for response in item.responses],
            scores=[0.0] * len(item.responses),
        )
        for item in sets
    ]
    unended = {item.id: [i for i, response in enumerate(item.responses) if response.cut] for item in sets}
    groups, _ = tokenize_records(records, tokenizer, template=template, max_length=max_length, unended=unended)
    report = score_dataset(
        model, groups, tokens_per_batch=tokens_per_batch, backend=backend, on_batch=on_batch, tokenizer=tokenizer
    )
    sums, lengths = report.scored.logprob_sums, report.scored.lengths
    scored = []
    for item, (first, last) in zip(sets, pairwise(report.scored.group_offsets), strict=True):
        responses = [
            response.model_copy(
                update={
                    "tokens": int(lengths[place]),
                    "logprob_sum": float(sums[place]),
                    "logprob_mean": float(sums[place] / lengths[place]),
                    "logprobs": None,
                }
            )
            for response, place in zip(item.responses, range(first, last), strict=True)
        ]
        scored.append(item.model_copy(update={"responses": responses, "scored_by": name}))
    return scored
