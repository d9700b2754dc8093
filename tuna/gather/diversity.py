"""Similarity of the responses to one instruction: ROUGE-L between pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tuna.gather.responses import ResponseSet

__all__ = ["diversity_figures", "pair_rouge", "worst_pair"]

# Words of any script; every Chinese or Japanese character is a word (rouge-score's own tokenizer keeps only
# a to z and digits, so all other texts would be empty).
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

MOST_WORDS = 2000  # compared per text: the time is quadratic


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text[: 40 * MOST_WORDS].lower())[:MOST_WORDS]


def pair_rouge(texts: Sequence[str]) -> list[float]:
    """ROUGE-L (F-measure, 0 to 1) of every pair, in the order of `itertools.combinations`; 1 for equal texts.

    Only the first `MOST_WORDS` words of a text are compared.

    Examples:
        >>> [round(value, 2) for value in pair_rouge(["the cat sat", "the dog sat", "the cat sat"])]
        [0.67, 1.0, 0.67]
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer: Any = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        1.0 if one.split() == other.split() else float(scorer.score(one, other)["rougeL"].fmeasure)
        for one, other in combinations(texts, 2)
    ]


def worst_pair(texts: Sequence[str]) -> float:
    """ROUGE-L of the most similar pair; 0 for a single text."""
    return max(pair_rouge(texts), default=0.0)


def diversity_figures(sets: Sequence[ResponseSet], limit: float = 0.8) -> dict[str, Any]:
    """Diversity statistics over all instructions, as plain JSON values.

    Returns:
        - `instructions`, `responses`: their numbers.
        - `rouge_mean`, `rouge_worst_mean`: means over the instructions of the mean pair and of the most similar pair.
        - `alike`: instructions whose most similar pair is at `limit` or above.
        - `equal`: responses equal to another response of their instruction.
        - `cut`: responses that were cut (by a limit or a filter).
    """
    pairs = [pair_rouge([response.text for response in item.responses]) for item in sets]
    judged = [values for values in pairs if values]
    return {
        "instructions": len(sets),
        "responses": sum(len(item.responses) for item in sets),
        "rouge_mean": float(np.mean([np.mean(values) for values in judged])) if judged else None,
        "rouge_worst_mean": float(np.mean([max(values) for values in judged])) if judged else None,
        "alike": sum(max(values) >= limit for values in judged),
        "equal": sum(len(item.responses) - len({" ".join(r.text.split()) for r in item.responses}) for item in sets),
        "cut": sum(response.cut for item in sets for response in item.responses),
    }
