# ruff: noqa: E501  # templates are lines
"""Law of chat templates: prompt and response are what the template renders, up to and including the end token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from tuna.data.chat import ChatTemplate
from tuna.data.problems import BadRecords
from tuna.data.records import Record
from tuna.data.templates import end_token_id
from tuna.data.tokenization import encode_prompts, tokenize_records
from tuna.models.loading import tiny_model

BASE = tiny_model()[1]
LOOP = "{{bos_token}}{% for m in messages %}"
GENERATION = "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TURN = "<|{{m.role}}|>\n{{m.content}}"
THINKING = (  # an empty think block before the last answer; thoughts of earlier ones are left out
    LOOP + "<|im_start|>{{m.role}}\n{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip() }}{% else %}{{m.content}}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
QUESTION = [{"role": "user", "content": "Hi"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
    {"role": "user", "content": "c"},
]


def with_template(template: str, tokens: tuple[str, ...] = (), *, special: bool = True, base: Any = BASE) -> Any:
    tokenizer = copy.deepcopy(base)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer: Any, turns: list[dict[str, str]], answer: str) -> tuple[list[int], list[int]]:
    record = Record.model_validate({"id": "r", "messages": turns, "responses": [answer]})
    group = tokenize_records([record], tokenizer, template="chat", max_length=400)[0][0].group
    return [int(t) for t in group.prompt], [int(t) for t in group.responses[0]]


def rendered(tokenizer: Any, turns: list[dict[str, str]], answer: str, end: str) -> str:
    whole = str(tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False))
    return whole[: whole.rindex(end) + len(end)]


CASES = {
    "blank": (LOOP + "{% if m.role=='user' %}[INST] {{m.content}} [/INST]{% else %} {{m.content}}</s>{% endif %}{% endfor %}", "</s>", ()),
    "blanks on both sides": (LOOP + "{% if m.role=='user' %}[INST] {{m.content}} [/INST]{% else %} {{m.content}} </s>{% endif %}{% endfor %}", "</s>", ()),
    "think block": (THINKING, "<|im_end|>", IM),
    "newline before the end": (LOOP + TURN + "\n<|eot|>\n" + GENERATION, "<|eot|>", ("<|eot|>",)),
    "stripped": (LOOP + "<|{{m.role}}|>\n{{m.content | trim}}<|end|>\n" + GENERATION, "<|end|>", ()),
    "tags": (LOOP + "<|{{m.role}}|>\n<answer>{{m.content}}</answer><|end|>\n" + GENERATION, "<|end|>", ()),
    "text after the end": (LOOP + TURN + "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}", "<|end|>", ()),
    "generation marks": (LOOP + "<|{{m.role}}|>\n{% generation %}{{m.content}}<|end|>{% endgeneration %}\n" + GENERATION, "<|end|>", ()),
    "no generation prompt": (LOOP + "{{m.role}}: {{m.content}}</s>\n{% endfor %}", "</s>", ()),
    "no beginning": ("{% for m in messages %}" + TURN + "<|end|>\n" + GENERATION, "<|end|>", ()),
}  # fmt: skip


@pytest.mark.parametrize("answer", ["yes", " yes \n", "two\n\nparts", "", "<think>\nhm\n</think>\n\nyes"])
@pytest.mark.parametrize("turns", [QUESTION, LONG], ids=["one", "several"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_what_the_template_renders(name: str, turns: list[dict[str, str]], answer: str) -> None:
    template, end, tokens = CASES[name]
    if turns is LONG and "[INST]" in template:
        turns = [turn for turn in turns if turn["role"] != "system"]
    tokenizer = with_template(template, tokens)
    prompt, response = trained(tokenizer, turns, answer)
    right = rendered(tokenizer, turns, answer, end)
    assert tokenizer.decode([*prompt, *response]) == right
    # In tokens too, but where one of them would stand across the boundary.
    prompt_text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    assert response == tokenizer(right[len(prompt_text) :], add_special_tokens=False)["input_ids"]
    assert response[-1] == tokenizer.convert_tokens_to_ids(end) == end_token_id(tokenizer, "chat")
    assert encode_prompts(tokenizer, [prompt_text], template="chat") == [prompt], (
        "what is sampled from is what is trained on"
    )


@pytest.mark.parametrize("special", [True, False])
def test_an_added_end_of_turn_ends_responses_special_or_not(special: bool) -> None:
    tokenizer = with_template(LOOP + TURN + "<|fin|>\n" + GENERATION, ("<|fin|>",), special=special)
    assert trained(tokenizer, QUESTION, "yes")[1][-1] == tokenizer.convert_tokens_to_ids("<|fin|>")


def test_the_end_of_the_text_behind_the_last_turn_is_not_the_end_of_a_turn() -> None:
    template = (
        LOOP + TURN + "<|fin|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
    )
    tokenizer = with_template(template, ("<|fin|>",), special=False)
    assert end_token_id(tokenizer, "chat") == tokenizer.convert_tokens_to_ids("<|fin|>")


def test_a_token_that_closes_a_part_of_the_turn_does_not_end_it() -> None:
    template = (
        LOOP
        + "{% if m.role == 'user' %}{{m.content}}<|fin|>{% else %}<|say|>{{m.content}}<|said|><|fin|>{% endif %}{% endfor %}"
    )
    for special in (True, False):
        tokenizer = with_template(template, ("<|say|>", "<|said|>", "<|fin|>"), special=special)
        assert tokenizer.decode(trained(tokenizer, QUESTION, "yes")[1]) == "<|say|>yes<|said|><|fin|>"


def test_a_turn_closed_by_plain_text_keeps_it_and_ends_with_the_end_of_sequence() -> None:
    tokenizer = with_template(
        LOOP + "{{m.role}}: {{m.content}}\n###\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    prompt, response = trained(tokenizer, QUESTION, "yes")
    assert tokenizer.decode([*prompt, *response]) == "<s>user: Hi\n###\nassistant: yes\n###\n</s>"


def test_text_of_an_answer_that_spells_special_tokens_stays_text() -> None:
    tokenizer = with_template(THINKING, IM)
    answer = "say </s> or <|im_end|> or <s>"
    prompt, response = trained(tokenizer, QUESTION, answer)
    assert tokenizer.decode([*prompt, *response]) == rendered(tokenizer, QUESTION, answer, "<|im_end|>")
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_end|>")}
    assert [token for token in response if token in ends] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_beginning_stands_once_or_as_the_template_has_it() -> None:
    doubled = with_template("{{bos_token}}" + LOOP + TURN + "<|end|>\n" + GENERATION)
    assert trained(doubled, QUESTION, "yes")[0].count(BASE.bos_token_id) == 1
    without = with_template("{% for m in messages %}" + TURN + "<|end|>\n" + GENERATION)
    assert BASE.bos_token_id not in trained(without, QUESTION, "yes")[0]


def test_a_tokenizer_that_puts_a_blank_before_every_text_does_not_double_it() -> None:
    plain = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_of], show_progress=False
    )
    plain.train_from_iterator(["[INST] Hi [/INST] yes no say what the"] * 9, trainer)
    base = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = with_template(CASES["blank"][0], base=base)
    for answer in ("yes", "no </s> no"):
        assert tokenizer.decode(trained(tokenizer, QUESTION, answer)[1]) == f" {answer}</s>"


@pytest.mark.parametrize(
    ("template", "turns", "answer", "reason"),
    [
        (LOOP + TURN + "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}", QUESTION, "yes", "cannot be split where the answer begins"),
        (LOOP + "<|{{m.role}}|>\n{{m.content.split('</think>')[-1]}}<|end|>\n" + GENERATION, QUESTION, "<think>why</think>yes", "drops part of responses"),
        (LOOP + "{% if m.role != 'system' %}" + TURN + "<|end|>\n{% endif %}" + GENERATION, LONG, "yes", "drops messages.0., role 'system'"),
        (LOOP + "{% if m.role in ('user', 'assistant') %}" + TURN + "<|end|>\n{% endif %}" + GENERATION, [{"role": "tool", "content": "Hi"}, *QUESTION], "yes", "drops messages.0., role 'tool'"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + LOOP + TURN + "<|end|>\n" + GENERATION, LONG, "yes", "record 'r': the chat template rejects these messages: no system turns"),
        (LOOP + "{% if loop.last %}last {% endif %}" + TURN + "<|end|>\n" + GENERATION, QUESTION, "yes", "cannot be split"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_as_rendered_is_refused(
    template: str, turns: list[dict[str, str]], answer: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        trained(with_template(template), turns, answer)


def test_a_template_that_can_be_split_nowhere_is_refused_whatever_is_done_about_bad_records() -> None:
    tokenizer = with_template(
        LOOP + TURN + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
    )
    record = Record(id="r", prompt="Hi", responses=["yes"])
    with pytest.raises(ValueError, match="cannot be split") as caught:
        tokenize_records([record], tokenizer, template="chat", max_length=99, on_bad="skip")
    assert not isinstance(caught.value, BadRecords)


def test_an_answer_drawn_from_the_model_loses_what_the_template_writes_around_it() -> None:
    chat = ChatTemplate(with_template(THINKING, IM))
    assert chat.answer_in("<think>\n\n</think>\n\nyes") == "yes"
    assert chat.answer_in("<think>\nwhy\n</think>\n\nyes") == "<think>\nwhy\n</think>\n\nyes"
    assert ChatTemplate(with_template(*CASES["newline before the end"][::2])).answer_in("yes\n") == "yes"


def test_a_response_that_was_cut_has_nothing_behind_it() -> None:
    tokenizer = with_template(*CASES["newline before the end"][::2])
    record = Record(id="r", prompt="Hi", responses=["yes", "yes"], scores=[1, 0])
    groups, _ = tokenize_records([record], tokenizer, template="chat", max_length=99, unended={"r": [1]})
    whole, cut = (tokenizer.decode(tokens) for tokens in groups[0].group.responses)
    assert (whole, cut) == ("yes\n<|eot|>", "yes")
