"""From records to token ids.

Prompt and response are tokenised separately and joined as ids, so the boundary is the same for every candidate and the
prompt can be computed once. Under a chat template, prompt and response are exactly what it renders, up to and including
the end of the turn (`tuna.data.chat`). Otherwise the prompt gets a beginning-of-sequence token if the tokenizer itself
adds one (Llama's does, SmolLM2's, Qwen's and GPT-2's do not), and the end of sequence ends the response. The beginning
of sequence is never doubled. Response text that looks like a special token, such as `</s>` in HTML, is tokenised as
plain text. Only uncut responses get the end token. Truncation cuts responses, never the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tuna.data.chat import Answer, special_text
from tuna.data.problems import OnBad, Problem, settle_problems
from tuna.data.records import Record
from tuna.data.templates import DEFAULT, Renderer, end_token_id
from tuna_kernels.tree import Group, pack_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenStats", "TokenizedGroup", "encode_prompts", "token_stats", "tokenize_records"]

IntArray: TypeAlias = npt.NDArray[np.int64]
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
ANCHORS = ("\n", "|", "a", "0")
CHUNK = 4096  # texts per call of the tokenizer, groups per call of pack_groups: bounds the memory


@dataclass(frozen=True)
class TokenizedGroup:
    """A record in tokens.

    Attributes:
        id: of the record.
        group: prompt and responses as int64 arrays, with the scores or ranks of the record.
        cut_responses: how many responses were cut to the length limit; these have no end token.
    """

    id: str
    group: Group
    cut_responses: int


def tokenize_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    on_bad: OnBad = "fail",
    unended: Mapping[str, Collection[int]] | None = None,
) -> tuple[list[TokenizedGroup], list[Problem]]:
    """Tokenise records.

    Args:
        records: the records.
        tokenizer: any tokenizer of transformers.
        template: "none", "chat", "alpaca" or a text with `{prompt}`; see `tuna.data.templates`.
        max_length: maximum number of tokens of prompt and response together, end token included.
        on_bad: "fail" raises one error that lists the problems, "skip" skips such records and returns the problems.
        unended: indices of the unfinished responses by record id: these get nothing after their text.

    Returns:
        The groups, in the order of the records, and the problems (each names its record).

    Raises:
        BadRecords: with `on_bad="fail"`, a record cannot be rendered, or its prompt leaves no room for one token of a
            response.
        ValueError: an invalid template, `max_length` or `on_bad`; a tokenizer without end of sequence.
    """
    settle_problems((), on_bad)
    if max_length < 2:
        raise ValueError(f"max_length = {max_length} must be at least 2: one token of prompt and one of response")
    renderer = Renderer(template, tokenizer)
    end = end_token_id(tokenizer, template)
    problems: list[Problem] = []
    rendered: list[_Rendered] = []
    for record in records:
        item = _render(renderer, record)
        problems += [item] if isinstance(item, Problem) else []
        rendered += [item] if isinstance(item, _Rendered) else []
    prompts = encode_prompts(tokenizer, [item.prompt for item in rendered], template=template)
    fits = [_room_problem(item.record, len(ids), max_length) for item, ids in zip(rendered, prompts, strict=True)]
    problems += [problem for problem in fits if problem is not None]
    settle_problems(problems, on_bad)
    usable = [(item, ids) for item, ids, bad in zip(rendered, prompts, fits, strict=True) if bad is None]
    answers = iter(_encode_answers(tokenizer, [item for item, _ in usable], end, unended or {}))
    groups = [
        _group(item.record, prompt, list(islice(answers, len(item.answers))), max_length) for item, prompt in usable
    ]
    return groups, problems


@dataclass(frozen=True)
class _Rendered:
    record: Record
    prompt: str
    answers: list[Answer]


def _render(renderer: Renderer, record: Record) -> _Rendered | Problem:
    try:
        prompt = renderer.prompt(record)
        return _Rendered(record, prompt, renderer.answers(record, prompt))
    except ValueError as error:
        return Problem("", None, str(error))


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[_Rendered], end: int, unended: Mapping[str, Collection[int]]
) -> list[list[int]]:
    """Token ids of all responses in order, with the end token where they ended."""
    special = special_text(tokenizer)
    answers = []
    for item in items:
        cut = unended.get(item.record.id, ())
        for number, answer in enumerate(item.answers):
            # An empty response keeps its end token: otherwise it would have no tokens.
            unfinished = number in cut and bool(answer.before or answer.text)
            answers.append(Answer(answer.before, answer.text, "", True) if unfinished else answer)
    plain = [not (answer.before or answer.after) for answer in answers]
    spelled = [bool(special.search(answer.text)) for answer in answers]
    ids: list[list[int]] = [[] for _ in answers]
    # Text of the data stays text, whatever it spells; the template's special tokens are tokens.
    as_text = [i for i, answer in enumerate(answers) if plain[i]]
    in_one = [i for i, answer in enumerate(answers) if not plain[i] and not spelled[i]]
    for i, found in zip(as_text, _encode(tokenizer, [answers[i].text for i in as_text], special=False), strict=True):
        ids[i] = found
    wholes = _encode_after(tokenizer, [answers[i].whole for i in in_one], special=True)
    for i, found in zip(in_one, wholes, strict=True):
        ids[i] = found
    for i, answer in enumerate(answers):
        if not plain[i] and spelled[i]:
            ids[i] = _encode_pieces(tokenizer, answer, special)
    return [found if answer.ended else [*found, end] for found, answer in zip(ids, answers, strict=True)]


def _encode_after(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of texts that follow others, without the space that some tokenizers put before every text."""
    begun, second, both = _encode(tokenizer, ["a\n", "b", "a\nb"], special=special)
    ids: list[list[int]] = _encode(tokenizer, texts, special=special)
    if [*begun, *second] == both:
        return ids
    left = list(range(len(texts)))
    for before in ANCHORS:  # a character that does not merge with the text's first
        (head,) = _encode(tokenizer, [before], special=special)
        found = _encode(tokenizer, [before + texts[i] for i in left], special=special)
        for i, whole in zip(left, found, strict=True):
            if whole[: len(head)] == head:
                ids[i] = whole[len(head) :]
        left = [i for i, whole in zip(left, found, strict=True) if whole[: len(head)] != head]
    return ids


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, answer: Answer, special: re.Pattern[str]) -> list[int]:
    """Token ids of an answer whose own text spells special tokens, which stay text."""
    start = max((found.end() for found in special.finditer(answer.before)), default=0)
    first = special.search(answer.after)
    stop = len(answer.after) if first is None else first.start()
    middle = answer.before[start:] + answer.text + answer.after[:stop]
    head, tail = _encode_after(tokenizer, [answer.before[:start], answer.after[stop:]], special=True)
    return [*head, *_encode_after(tokenizer, [middle], special=False)[0], *tail]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text; with `special`, text that spells a special token becomes that token."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        batch: Any = tokenizer(
            list(texts[start : start + CHUNK]),
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            verbose=False,  # no warning about the model's own limit: texts are cut later
        )
        ids += batch["input_ids"]
    return ids


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, template: str = DEFAULT
) -> list[list[int]]:
    """Token ids of prompts rendered with `template`; text that spells a special token becomes that token.

    A chat template prints the beginning of sequence itself if it wants one; other prompts get the tokenizer's.
    """
    bos = own_bos(tokenizer)
    return [_with_bos(ids, bos, give=template != "chat") for ids in _encode(tokenizer, texts, special=True)]


def own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token if the tokenizer adds it to a text by itself, else None."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and tokenizer("a")["input_ids"][:1] == [bos] else None


def _with_bos(ids: list[int], bos: int | None, *, give: bool) -> list[int]:
    """`ids` with leading beginning-of-sequence tokens reduced to one; if there are none, one is added if `give`."""
    if bos is None or (not give and ids[:1] != [bos]):
        return ids
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return [bos, *ids[start:]]


def _room_problem(record: Record, prompt_tokens: int, max_length: int) -> Problem | None:
    if prompt_tokens == 0:
        reason = "the prompt has no tokens, and the tokenizer adds no beginning-of-sequence token"
        return Problem("", None, f"record {record.id!r}: {reason}")
    if prompt_tokens >= max_length:
        reason = f"the prompt takes {prompt_tokens} tokens and leaves no room for a response in max_length"
        return Problem("", None, f"record {record.id!r}: {reason} = {max_length}")
    return None


def _group(record: Record, prompt: list[int], responses: Sequence[list[int]], max_length: int) -> TokenizedGroup:
    room = max_length - len(prompt)
    # A response that fits only without its end token counts as cut.
    cut = sum(len(response) > room for response in responses)
    group = Group(
        prompt=np.array(prompt, np.int64),
        responses=[np.array(response[:room], np.int64) for response in responses],
        scores=record.scores,
        ranks=record.ranks,
    )
    return TokenizedGroup(record.id, group, cut)


@dataclass(frozen=True)
class TokenStats:
    """Sizes of a tokenised dataset, and the tokens to compute in each layout.

    Attributes:
        groups: number of groups.
        candidates: number of responses.
        candidates_per_group: maps k to the number of groups with k responses.
        cut_responses: responses cut to the length limit.
        tied_groups: groups with at least two tied responses (equal scores or ranks, or equal tokens).
        unranked_groups: groups in which all responses are tied, so that no pair is left (including k = 1).
        prompt_tokens: quantiles of prompt lengths; "0%" is the shortest, "100%" the longest.
        response_tokens: the same for responses, end token included.
        padded: tokens to compute as k full copies, padded to the longest of a batch of `batch_groups` groups.
        unpadded: as k full sequences without padding.
        prompt_shared: with the prompt computed once.
        tree: with every common prefix computed once.
        batch_groups: groups per padded batch.
    """

    groups: int
    candidates: int
    candidates_per_group: dict[int, int]
    cut_responses: int
    tied_groups: int
    unranked_groups: int
    prompt_tokens: dict[str, int]
    response_tokens: dict[str, int]
    padded: int
    unpadded: int
    prompt_shared: int
    tree: int
    batch_groups: int


def token_stats(groups: Sequence[TokenizedGroup], *, batch_groups: int = 16) -> TokenStats:
    """Count the tokens of a tokenised dataset; batches of `batch_groups` groups are taken in the order given.

    Raises:
        ValueError: no groups, or `batch_groups` below 1.
    """
    if not groups:
        raise ValueError("groups is empty: there is nothing to count")
    if batch_groups < 1:
        raise ValueError(f"batch_groups = {batch_groups} must be at least 1")
    plain = [item.group for item in groups]
    sizes = np.array([len(group.responses) for group in plain])
    firsts = np.cumsum(sizes) - sizes
    prompts = np.array([len(group.prompt) for group in plain])
    responses = np.array([len(response) for group in plain for response in group.responses])
    longest = prompts + np.maximum.reduceat(responses, firsts)
    batches = np.arange(0, len(plain), batch_groups)
    tree, levels = _tree_tokens_and_levels(plain)
    return TokenStats(
        groups=len(plain),
        candidates=len(responses),
        candidates_per_group=dict(sorted(Counter(sizes.tolist()).items())),
        cut_responses=sum(item.cut_responses for item in groups),
        tied_groups=int((levels < sizes).sum()),
        unranked_groups=int((levels == 1).sum()),
        prompt_tokens=_quantiles(prompts),
        response_tokens=_quantiles(responses),
        padded=int((np.add.reduceat(sizes, batches) * np.maximum.reduceat(longest, batches)).sum()),
        unpadded=int((sizes * prompts).sum() + responses.sum()),
        prompt_shared=int(prompts.sum() + responses.sum()),
        tree=tree,
        batch_groups=batch_groups,
    )


def _tree_tokens_and_levels(groups: Sequence[Group]) -> tuple[int, IntArray]:
    """Packed tokens of all groups, and the number of distinct ranks of each [G], ties by the kernels' rule."""
    tokens, levels = 0, []
    for start in range(0, len(groups), CHUNK):
        tree = pack_groups(groups[start : start + CHUNK])
        tokens += tree.num_tokens
        levels.append(np.maximum.reduceat(tree.ranks_host, tree.group_offsets_host[:-1]) + 1)
    return tokens, np.concatenate(levels)


def _quantiles(values: IntArray) -> dict[str, int]:
    return {f"{q:.0%}": int(np.quantile(values, q, method="nearest")) for q in QUANTILES}
