"""Laws of templates: the prompt stands in the text once and unchanged; the end token is what closes a turn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuna.data.records import Record
from tuna.data.templates import ALPACA, check_template, end_token_id, render_prompt
from tuna.models.loading import tiny_model

TOKENIZER = tiny_model()[1]
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def asked(prompt: str) -> Record:
    return Record(id="a", prompt=prompt, responses=["4"])


def with_chat_template(template: str | None) -> Any:
    tokenizer = tiny_model()[1]
    tokenizer.chat_template = template
    return tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_the_prompt_stands_unchanged_in_its_place(prompt: str) -> None:
    assert render_prompt(asked(prompt), "none", TOKENIZER) == prompt
    before, after = ALPACA.split("{prompt}")
    assert render_prompt(asked(prompt), "alpaca", TOKENIZER) == before + prompt + after
    own = '{"q": "{prompt}", "{other}": {}}'
    assert render_prompt(asked(prompt), own, TOKENIZER) == '{"q": "' + prompt + '", "{other}": {}}'
    assert render_prompt(asked(prompt), "chat", TOKENIZER) == f"<s><|user|>\n{prompt}<|end|>\n<|assistant|>\n"


def test_alpaca_is_the_public_template() -> None:
    text = render_prompt(asked("Name a fish."), "alpaca", TOKENIZER)
    assert text.startswith("Below is an instruction that describes a task. Write a response that appropriately ")
    assert text.endswith("completes the request.\n\n### Instruction:\nName a fish.\n\n### Response:")


def test_messages_need_chat() -> None:
    record = Record.model_validate({"id": "talk-1", "messages": TURNS, "responses": ["4"]})
    wanted = "<s><|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n"
    assert render_prompt(record, "chat", TOKENIZER) == wanted
    for template in ("none", "alpaca", "Q: {prompt}"):
        with pytest.raises(ValueError, match="record 'talk-1' has messages; they need template = 'chat'"):
            render_prompt(record, template, TOKENIZER)


@pytest.mark.parametrize("template", ["", "llama", "Q: {question}", "{}"])
def test_a_template_without_a_place_for_the_prompt_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"must be 'none', 'chat', 'alpaca' or a text that contains \{prompt\}"):
        check_template(template, TOKENIZER)


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ValueError, match="has no chat template; use 'alpaca', 'none' or"):
        render_prompt(asked("p"), "chat", with_chat_template(None))


def test_a_chat_template_that_refuses_names_the_record() -> None:
    tokenizer = with_chat_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="record 'a': the chat template rejects these messages: roles must alt"):
        render_prompt(asked("p"), "chat", tokenizer)


def test_a_template_is_not_applied_twice() -> None:
    templated = render_prompt(asked("Name a fish."), "alpaca", TOKENIZER)
    assert render_prompt(asked(templated), "none", TOKENIZER) == templated
    with pytest.raises(ValueError, match=r"record 'a': the prompt ends with '### Response:'.*takes template = 'none'"):
        render_prompt(asked(templated), "alpaca", TOKENIZER)
    with pytest.raises(ValueError, match="ends with 'A:'"):
        render_prompt(asked("Q: fish?\nA:"), "Q: {prompt}\nA:", TOKENIZER)
    assert render_prompt(asked("{prompt}"), "{prompt}", TOKENIZER) == "{prompt}"


BODY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"


@pytest.mark.parametrize(
    ("chat_template", "end"),
    [
        (BODY + "<|end|>\n{% endfor %}", "<|end|>"),  # ChatML, Phi-3, Gemma: a token of its own
        (BODY + " </s>{% endfor %}", "</s>"),  # Llama 2, Zephyr: the end of the text, after a blank
        (BODY + "<|end|></s>\n{% endfor %}", "<|end|>"),  # both: the turn ends first
        (BODY + "\n\n{% endfor %}", "</s>"),  # plain text closes the turn
        (BODY + "{% endfor %}", "</s>"),  # nothing does
        ("{{ 1 / 0 }}", "</s>"),  # it cannot be told
        ("{{ messages[0]['content'] }}", "</s>"),  # the answer is not shown
    ],
)
def test_the_end_of_turn_is_read_off_the_chat_template(chat_template: str, end: str) -> None:
    tokenizer = with_chat_template(chat_template)
    assert end_token_id(tokenizer, "chat") == tokenizer.convert_tokens_to_ids(end)
    assert end_token_id(tokenizer, "alpaca") == tokenizer.eos_token_id


def test_a_tokenizer_without_end_of_sequence_is_refused() -> None:
    tokenizer = with_chat_template(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        end_token_id(tokenizer, "alpaca")
