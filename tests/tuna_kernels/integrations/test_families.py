"""The page of model families is true: what is said to run does, and what is refused is, for the reason given."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.tuna_kernels.integrations.families import PAGE, families, outcome, page
from tests.tuna_kernels.integrations.family_settings import UNTRIED

MAINSTREAM = (
    *(
        "bloom",
        "deepseek_v3",
        "falcon",
        "gemma3_text",
        "gemma3n_text",
        "glm4_moe",
        "gpt_neo",
        "gpt_neox",
        "gpt_oss",
        "gptj",
    ),
    *("granite_swa", "granitemoehybrid", "lfm2", "llama4_text", "ministral3", "mixtral", "mpt", "nemotron", "phimoe"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next", "smollm3", "stablelm"),
)
RUNS, REFUSED = PAGE.read_text().split("## Refused")
ROWS = {m[1]: m[0] for m in re.finditer(r"^\| `([^`]+)` \|.*$", RUNS + REFUSED, re.MULTILINE)}


def of_this_release() -> bool:
    """Whether the page was made with the transformers that is installed."""
    return f"transformers {transformers.__version__} " in RUNS


@pytest.mark.parametrize("family", MAINSTREAM)
def test_what_the_page_says_of_a_family(family: str) -> None:
    """Scores, all gradients, two phases under checkpointing, each within the page's bound (`families.outcome`)."""
    if family not in families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    found = outcome(family)
    if of_this_release():
        assert ROWS[family] in page({family: found})
    else:  # another may have moved a family's attention to the registry
        assert (found.way != "refused") == (ROWS[family] in RUNS)


def test_the_page_leaves_no_family_out() -> None:
    """Of the release it was made with."""
    if not of_this_release():
        pytest.skip(f"the page is of another release than {transformers.__version__}")
    untried = {name for names in UNTRIED.values() for name in names}
    assert ROWS.keys() == set(families())
    assert untried.isdisjoint(ROWS)


@pytest.mark.slow
def test_the_whole_page() -> None:
    if not of_this_release():
        pytest.skip(f"the page is of another release than {transformers.__version__}")
    assert page({name: outcome(name) for name in families()}) == PAGE.read_text()
