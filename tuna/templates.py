"""Prompt templates: how a record's prompt becomes the text the model sees before its answer.

| template | the prompt becomes |
|---|---|
| `none` | itself: the data is templated already |
| `chat` | the tokenizer's chat template, up to where the assistant's turn begins |
| `alpaca` | the Alpaca instruction template without input (Taori et al., 2023) |
| any text with `{prompt}` | that text with the prompt in its place |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuna.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA", "check_template", "end_token_id", "render_prompt"]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
PLACE = "{prompt}"


def check_template(template: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a template that no record could be rendered with; without a tokenizer "chat" is one.

    Raises:
        ValueError: neither a known name nor a text with `{prompt}`; "chat", but the tokenizer has no chat
            template.
    """
    if template == "chat":
        if tokenizer is None or tokenizer.chat_template is None:
            name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
            others = f"use 'alpaca', 'none' or a text with {PLACE}"
            raise ValueError(f"template = 'chat', but {name} has no chat template; {others}")
    elif template not in ("none", "alpaca") and PLACE not in template:
        raise ValueError(f"template = {template!r} is none of 'none', 'chat', 'alpaca' and has no {PLACE} in it")


def render_prompt(record: Record, template: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text that stands before the response.

    Args:
        record: a record with a prompt or messages.
        template: "none", "chat", "alpaca" or any text that contains `{prompt}` (other braces are just text).
        tokenizer: needed by "chat" only; a plain prompt is then the one turn of a user.

    Raises:
        ValueError: a bad template, messages without "chat", a prompt that ends as the template does (it would
            be applied twice), a chat template that refuses the messages.
    """
    check_template(template, tokenizer)
    if template == "chat" and tokenizer is not None:
        return _render_chat(_turns(record), tokenizer, f"record {record.id!r}")
    if record.prompt is None:
        raise ValueError(f"record {record.id!r} has messages; they need template = 'chat', not {template!r}")
    if template == "none":
        return record.prompt
    text = ALPACA if template == "alpaca" else template
    ending = text.rsplit(PLACE, 1)[1].strip()
    if ending and record.prompt.rstrip().endswith(ending):
        raise ValueError(
            f"record {record.id!r}: the prompt ends with {ending!r} as the template does; "
            "data that is templated already takes template = 'none'"
        )
    return text.replace(PLACE, record.prompt)


def end_token_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The token that ends an uncut response: end of turn under "chat", else end of sequence.

    The end of a turn is read off the chat template: the first special token after the assistant's text. A
    template that closes a turn with plain text, or not at all, gets the end of sequence.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token (and none was found in the chat template).
    """
    if template == "chat" and (found := _end_of_turn(tokenizer)) is not None:
        return found
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise ValueError(f"{name} has no end-of-sequence token; set tokenizer.eos_token")
    return end


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    answer = "tuna probes the end of a turn"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    except Exception:  # whatever a template's own Jinja code raises; prompts have their own error
        return None
    _, found, rest = str(text).rpartition(answer)
    if not found:
        return None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return next((int(token) for token in ids if token in special), None)


def _turns(record: Record) -> list[dict[str, str]]:
    if record.messages is None:
        return [{"role": "user", "content": record.prompt or ""}]
    return [message.model_dump() for message in record.messages]


def _render_chat(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates refuse by raising from Jinja, each with a class of its own
        raise ValueError(f"{name}: the chat template refuses these messages: {error}") from error
