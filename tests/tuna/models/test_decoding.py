"""Laws of `tuna.models.decoding`: each row draws from the model's own distribution with its own settings and random
numbers, whatever its company; log-probabilities are those of the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuna_kernels.integrations.tiny_models import FAMILIES
from tuna.models.decoding import Decoding, Row, end_tokens, generate, position_limit, prompt_logprobs
from tuna.models.loading import tiny_model
from tuna_kernels.integrations.transformers import prepare_model

PROMPTS = ["What is the", "A", "Name three of the best things that one can do on a rainy day in the city"]
NEVER: frozenset[int] = frozenset()


@cache
def tiny() -> tuple[Any, Any]:
    model, tokenizer = tiny_model(seed=3)
    return model.double().eval(), tokenizer


def ids_of(text: str) -> list[int]:
    found: list[int] = tiny()[1](text)["input_ids"]
    return found


def rows_of(prompts: list[str], **sampling: Any) -> list[Row]:
    return [
        Row(ids_of(text), Decoding(**{"max_tokens": 9, "seed": i, **sampling}), NEVER) for i, text in enumerate(prompts)
    ]


def drawn(rows: list[Row]) -> list[list[int]]:
    generate(*tiny(), rows)
    return [row.ids for row in rows]


def reference_logprobs(ids: list[int]) -> torch.Tensor:
    """[T - 1, V] log-probabilities of what follows each token but the last, in float64."""
    with torch.no_grad():
        return tiny()[0](torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_a_batch_draws_what_each_row_draws_alone(temperature: float) -> None:
    together = drawn(rows_of(PROMPTS, temperature=temperature))
    alone = [drawn([row])[0] for row in rows_of(PROMPTS, temperature=temperature)]
    assert together == alone
    assert (len({*map(tuple, drawn(rows_of([PROMPTS[0]] * 4, temperature=temperature)))}) == 1) == (temperature == 0)


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    rows = rows_of(PROMPTS, temperature=2.0, top_p=0.5, top_logprobs=3)
    generate(*tiny(), rows)
    for row in rows:
        wanted = reference_logprobs([*row.prompt, *row.ids])[len(row.prompt) - 1 :]
        of_tokens = wanted.gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs, dtype=torch.float64), of_tokens, rtol=1e-9, atol=1e-9)
        best = wanted.topk(3)
        assert [[token for token, _ in top] for top in row.top] == best.indices.tolist()
        found = torch.tensor([[value for _, value in top] for top in row.top], dtype=torch.float64)
        torch.testing.assert_close(found, best.values, rtol=1e-9, atol=1e-9)


def test_prepared_models_generate_the_same() -> None:
    before = drawn(rows_of(PROMPTS))
    prepare_model(tiny()[0])
    assert drawn(rows_of(PROMPTS)) == before


def test_rows_leave_the_batch_one_by_one() -> None:
    limits = [1, 7, 3]
    rows = [
        Row(ids_of(p), Decoding(max_tokens=m, seed=i), NEVER)
        for i, (p, m) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    whole = drawn(rows_of(PROMPTS))
    assert drawn(rows) == [ids[:limit] for ids, limit in zip(whole, limits, strict=True)]
    assert {row.finish_reason for row in rows} == {"length"}


def test_an_end_token_ends_and_has_a_logprob_but_no_text() -> None:
    model, tokenizer = tiny()
    whole = drawn(rows_of(PROMPTS[:1]))[0]
    row = Row(ids_of(PROMPTS[0]), Decoding(max_tokens=9), frozenset([whole[4]]))
    other = rows_of(PROMPTS[2:])[0]
    generate(model, tokenizer, [row, other])
    end = whole.index(whole[4])
    assert (row.ids, row.finish_reason, len(row.logprobs)) == (whole[: end + 1], "stop", end + 1)
    assert len(other.ids) == 9


def test_stop_texts_cut_text_and_tokens() -> None:
    model, tokenizer = tiny()
    plain = rows_of(PROMPTS[:1], max_tokens=20)[0]
    generate(model, tokenizer, [plain])
    stop = plain.text[9:12]
    row = rows_of(PROMPTS[:1], max_tokens=20, stop=("never there", stop))[0]
    generate(model, tokenizer, [row])
    assert row.finish_reason == "stop"
    assert row.text == plain.text[: plain.text.index(stop)]
    assert row.ids == plain.ids[: len(row.ids)] and len(row.ids) == len(row.logprobs) == len(row.top)
    assert len(tokenizer.decode(row.ids)) >= len(row.text)


def test_a_row_can_be_cancelled() -> None:
    rows = rows_of(PROMPTS)
    generate(*tiny(), rows, lambda row: not (row is rows[1] and len(row.ids) == 2))
    assert [len(row.ids) for row in rows] == [9, 2, 9]
    assert rows[1].finish_reason == "cancelled"


@given(seed=st.integers(0, 2**32), top_p=st.floats(0.01, 1.0), temperature=st.floats(1e-12, 50.0))
@settings(deadline=None, max_examples=20)
def test_top_p_draws_within_the_nucleus(seed: int, top_p: float, temperature: float) -> None:
    row = Row(ids_of(PROMPTS[0]), Decoding(max_tokens=1, seed=seed, top_p=top_p, temperature=temperature), NEVER)
    generate(*tiny(), [row])
    weights = (reference_logprobs([*row.prompt, 0])[-1] / temperature).softmax(-1)
    likelier = weights[weights > weights[row.ids[0]]].sum().item()
    assert likelier < top_p + 1e-9
    assert weights[row.ids[0]] > 0


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 4000 draws over the tempered distribution, the rare tokens pooled."""
    count, temperature = 4000, 0.25
    rows = [Row(ids_of("A"), Decoding(max_tokens=1, seed=i, temperature=temperature), NEVER) for i in range(count)]
    generate(*tiny(), rows)
    expected = (reference_logprobs([*ids_of("A"), 0])[-1] / temperature).softmax(-1) * count
    seen = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=len(expected)).double()
    often = expected >= 10
    groups = [(seen[i], expected[i]) for i in often.nonzero()[:, 0]] + [(seen[~often].sum(), expected[~often].sum())]
    chi2 = sum(float((s - e) ** 2 / e) for s, e in groups)
    freedom = len(groups) - 1
    assert freedom > 20
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "opt", "gpt2"])
def test_other_families_take_the_padding(family: str) -> None:
    torch.manual_seed(0)
    # transformers' softcapped attention computes its softmax in float32, where float64's least number, its mask,
    # is minus infinity: rows of padding would be NaN.
    exact = family != "gemma2"
    model = FAMILIES[family]().to(torch.float64 if exact else torch.float32).eval()
    tokenizer = tiny()[1]
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16]]
    rows = [Row(p, Decoding(max_tokens=6, seed=i), NEVER) for i, p in enumerate(prompts)]
    generate(model, tokenizer, rows)
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt, *row.ids]])).logits[0, len(row.prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        error = 1e-8 if exact else 1e-4
        torch.testing.assert_close(
            torch.tensor(row.logprobs, dtype=torch.float64), wanted.double(), rtol=error, atol=error
        )


@pytest.mark.parametrize("length", [1, 2, 128, 129, 300])
def test_prompt_logprobs_are_the_references_in_any_number_of_chunks(length: int) -> None:
    ids = [int(token) for token in torch.randint(3, 1000, (length,), generator=torch.Generator().manual_seed(0))]
    logprobs, top = prompt_logprobs(tiny()[0], ids, 2)
    assert (logprobs[0], top[0], len(logprobs), len(top)) == (None, None, length, length)
    wanted = reference_logprobs(ids)
    for place in range(1, length):
        assert logprobs[place] == pytest.approx(wanted[place - 1, ids[place]].item(), rel=1e-9)
        assert [token for token, _ in top[place] or ()] == wanted[place - 1].topk(2).indices.tolist()


def test_ends_and_limits_are_the_models() -> None:
    model, tokenizer = tiny()
    assert end_tokens(model, tokenizer, chat=False) == {tokenizer.eos_token_id}
    assert end_tokens(model, tokenizer, chat=True) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|end|>"),
    }
    assert position_limit(model) == 4096
    with pytest.raises(ValueError, match="4096 positions"):
        generate(model, tokenizer, [Row([1], Decoding(max_tokens=4096), NEVER)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"stop": ("",)}, "empty text"),
        ({"top_logprobs": -1}, "top_logprobs = -1"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**wrong)
