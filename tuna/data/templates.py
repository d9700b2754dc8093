"""Prompt templates: from a record's prompt to the text before the answer.

| template | the prompt becomes |
|---|---|
| `none` | itself: the data already has a template applied |
| `chat` | the tokenizer's chat template, up to where the assistant's turn begins |
| `alpaca` | the Alpaca instruction template without input (Taori et al., 2023) |
| any text with `{prompt}` | that text with the prompt in its place |

A run saves the name of its template with its model (`save_template`); later uses of the model default to it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuna.data.chat import Answer, ChatTemplate
from tuna.data.records import Record
from tuna.system.writing import replacing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ALPACA",
    "DEFAULT",
    "Renderer",
    "check_template",
    "end_generation_at",
    "end_token_id",
    "render_prompt",
    "save_template",
    "saved_template",
    "unused_chat_template",
]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:"
)
PLACE = "{prompt}"
DEFAULT = "none"
"""Used if no template is given nor saved with the model."""
SAVED = "tuna.json"


def check_template(template: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Reject a template that cannot render any record; without a tokenizer, "chat" is one.

    Raises:
        ValueError: neither a known name nor a text with `{prompt}`; "chat", but the tokenizer has no chat
            template.
    """
    if template == "chat":
        if tokenizer is None or tokenizer.chat_template is None:
            name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
            others = f"use 'alpaca', 'none' or a text with {PLACE}"
            raise ValueError(f"template = 'chat', but {name} has no chat template; {others}")
    else:
        check_name(template)


def check_name(template: str) -> None:
    """Check that a template is a known name or a text with `{prompt}`.

    Raises:
        ValueError: it is neither.
    """
    if template not in ("none", "chat", "alpaca") and PLACE not in template:
        raise ValueError(f"template = {template!r} must be 'none', 'chat', 'alpaca' or a text that contains {PLACE}")


class Renderer:
    """Renders records with a template: the text before a response, and the response as it is trained.

    Args:
        template: "none", "chat", "alpaca" or any text that contains `{prompt}` (other braces are plain text).
        tokenizer: needed by "chat" only, which renders a text prompt as a single user turn.

    Raises:
        ValueError: as `check_template`; a chat template that cannot be split where the answer begins.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        check_template(template, tokenizer)
        self.template = template
        self.chat = ChatTemplate(tokenizer) if template == "chat" and tokenizer is not None else None
        if self.chat is not None:
            self.chat.check()

    def prompt(self, record: Record) -> str:
        """The text before the response.

        Raises:
            ValueError: messages without "chat", a prompt that ends as the template does (it would be applied twice), a
                chat template that rejects the messages or drops some.
        """
        if self.chat is not None:
            return self.chat.prompt(_turns(record), f"record {record.id!r}")
        if record.prompt is None:
            raise ValueError(f"record {record.id!r} has messages; they need template = 'chat', not {self.template!r}")
        if self.template == "none":
            return record.prompt
        text = ALPACA if self.template == "alpaca" else self.template
        ending = text.rsplit(PLACE, 1)[1].strip()
        if ending and record.prompt.rstrip().endswith(ending):
            raise ValueError(
                f"record {record.id!r}: the prompt ends with {ending!r} as the template does; "
                "data to which a template is already applied takes template = 'none'"
            )
        return text.replace(PLACE, record.prompt)

    def answers(self, record: Record, prompt: str) -> list[Answer]:
        """The responses after `prompt`; under "chat" with what the template writes around them.

        Raises:
            ValueError: a chat template that changes the prompt when an answer follows, or drops part of an answer.
        """
        if self.chat is None:
            return [Answer("", response, "", False) for response in record.responses]
        return self.chat.answers(_turns(record), prompt, record.responses, f"record {record.id!r}")


def render_prompt(record: Record, template: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text before the response; arguments and errors as in `Renderer`."""
    return Renderer(template, tokenizer).prompt(record)


def end_token_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The token that ends an uncut response: end of turn under "chat", else end of sequence.

    The end-of-turn token is found by rendering the chat template (`ChatTemplate.end`). A template that ends a turn with
    plain text or nothing gets the end of sequence.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token (and none was found in the chat template).
    """
    end = tokenizer.eos_token_id
    if template == "chat" and (found := ChatTemplate(tokenizer).end) is not None:
        end = tokenizer.convert_tokens_to_ids(found)
    if not isinstance(end, int):
        name = getattr(tokenizer, "name_or_path", "") or "this tokenizer"
        raise ValueError(f"{name} has no end-of-sequence token; set tokenizer.eos_token")
    return end


def end_generation_at(model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Make the model's generation config, which is saved with it, stop at the token that ends trained responses."""
    settings: Any = getattr(model, "generation_config", None)
    if settings is None:
        return
    given = settings.eos_token_id
    ends = [given] if isinstance(given, int) else list(given or ())
    end = end_token_id(tokenizer, template)
    if end not in ends:
        settings.eos_token_id = [*ends, end]


def unused_chat_template(template: str, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """A warning if the model has a chat template and `template` is another one, else None."""
    if template == "chat" or tokenizer is None or tokenizer.chat_template is None:
        return None
    return (
        f"the model's chat template is not used (template = {template!r}): prompts are not shown to it as a "
        "conversation; use template = 'chat' unless the data already has a template applied"
    )


def save_template(folder: str | os.PathLike[str], template: str) -> None:
    """Save the name of the template with a model trained with it."""
    with replacing(Path(folder) / SAVED) as file:
        file.write((json.dumps({"template": template}, ensure_ascii=False) + "\n").encode())


def saved_template(model: str | os.PathLike[str]) -> str | None:
    """The template that the model in a folder was trained with, None if none was saved.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(model).expanduser() / SAVED
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())["template"]
        check_name(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a template ({error}): fix or remove the file") from error
    return str(found)


def _turns(record: Record) -> list[dict[str, str]]:
    if record.messages is None:
        return [{"role": "user", "content": record.prompt or ""}]
    return [message.model_dump() for message in record.messages]
