"""Instructions: prompts without responses.

Formats read:

| format | prompt | id | reference response |
|---|---|---|---|
| plain | `prompt` (text) or `messages` | `id` | `reference` |
| Alpaca, Tuna as released | `instruction`, then `input` on the next line | `id` | `output` if it is a string |
| self-instruct seed tasks | `instruction`, then the `input` of the first of `instances` | `id` | its `output` |
| Vicuna and MT-bench questions | the first of `turns`, or `question` or `text` | `question_id` | `reference` |

Other fields that belong to a prompt are converted with it or rejected (`tuna.data.prompts`). Responses in a row are
ignored.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuna.data.files import Unreadable, open_rows
from tuna.data.problems import OnBad, Problem, read_rows, settle_problems
from tuna.data.prompts import prompt_of
from tuna.data.records import Message, Record, Text

logger = logging.getLogger(__name__)

__all__ = ["Instruction", "instruction_fields", "present_fields", "read_instructions", "read_items"]


class Instruction(BaseModel):
    """A prompt without responses, optionally with a reference response.

    Attributes:
        id: unique name within its file.
        prompt: as text; exactly one of `prompt` and `messages` is given.
        messages: as turns of a conversation, the last of them not the assistant's.
        reference: the response given in the dataset, or None.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Text = Field(min_length=1)
    prompt: Text | None = None
    messages: list[Message] | None = None
    reference: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Instruction:
        Record(id=self.id, prompt=self.prompt, messages=self.messages, responses=[""])  # the same rules
        return self

    def turns(self) -> list[dict[str, str]]:
        """The prompt as messages of a chat endpoint."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt or ""}]
        return [message.model_dump() for message in self.messages]


Item = TypeVar("Item", bound=Instruction)


def read_instructions(
    source: str | os.PathLike[str] | Iterable[Any], *, on_bad: OnBad = "fail"
) -> tuple[list[Instruction], list[Problem]]:
    """Read instructions of any format above; a file may mix formats.

    Instructions without an id get one from file and line or index; of a duplicate id, the later one is a problem.

    Returns:
        The instructions in order, and the problems of those skipped (with `on_bad="skip"`).

    Raises:
        FileNotFoundError: no such file.
        BadRecords: with `on_bad="fail"`, some cannot be used.
        ValueError: unknown file type.
    """
    return read_items(source, Instruction, instruction_fields, on_bad)


def read_items(
    source: Any, kind: type[Item], fields_of: Callable[[Any], dict[str, Any]], on_bad: OnBad
) -> tuple[list[Item], list[Problem]]:
    """Read the rows of a file as items of `kind`, a class derived from `Instruction`; `fields_of` converts a row."""

    def parse(row: Any, made_id: str) -> Item:
        return row if isinstance(row, kind) else kind.model_validate({"id": made_id, **fields_of(row)})

    settle_problems((), on_bad)
    return read_rows(open_rows(source), parse, on_bad, unnamed="instruction")


def present_fields(row: Any) -> dict[str, Any]:
    """The fields of a row that are not None; raises `ValueError` if the row is not an object."""
    if isinstance(row, Unreadable):
        raise ValueError(row.reason)
    if not isinstance(row, Mapping):
        raise ValueError("must be an object with named fields")
    return {key: value for key, value in row.items() if value is not None}


def instruction_fields(row: Any) -> dict[str, Any]:
    """Convert a row of any format above to fields of an `Instruction`; raises `ValueError` with a readable reason."""
    present = present_fields(row)
    fields: dict[str, Any] = {}
    given = present.get("id", present.get("question_id"))
    if given is not None:
        fields["id"] = str(given) if isinstance(given, int) else given
    if any(key in present for key in ("messages", "prompt")):
        return {**fields, **prompt_of(present), "reference": present.get("reference")}
    if "instruction" in present:
        return {**fields, **_from_instruction(present)}
    turns = present.get("turns")
    question = turns[0] if isinstance(turns, list) and turns else present.get("question", present.get("text"))
    if question is None:
        keys = ", ".join(map(str, present)) or "none"
        raise ValueError(f"no field prompt, messages, instruction, turns, question or text (fields: {keys})")
    if isinstance(turns, list) and len(turns) > 1:
        logger.warning("%s: using the first of %d turns, the others need its answer", fields.get("id"), len(turns))
    other = present.get("text", question)
    if other != question and isinstance(other, str) and other.strip():
        raise ValueError("fields 'question' and 'text' both hold a prompt, and they disagree: keep one")
    reference = present.get("reference")
    if isinstance(turns, list) and isinstance(reference, list) and reference:
        reference = reference[0]  # one per turn
    return {**fields, **prompt_of({**present, "question": question}), "reference": reference}


def _from_instruction(row: Mapping[str, Any]) -> dict[str, Any]:
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], Mapping) else {}
    output = row.get("output", first.get("output", row.get("reference")))
    prompt = prompt_of({"input": first.get("input"), **row})
    return {**prompt, "reference": output if isinstance(output, str) else None}
