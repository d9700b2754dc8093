"""Trees through transformers models: scores and every gradient equal those of separate sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from tests.tuna_kernels.integrations.tiny_models import (
    FAMILIES,
    GROUPS,
    IN_DOUBLE,
    all_gradients,
    assert_close,
    assert_same_gradients,
    bound,
    separate_logprobs,
    separate_scores,
    tiny,
)
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.integrations.transformers import attention_hook, model_ranking_loss, prepare_model, score_groups
from tuna_kernels.losses import ranking_loss
from tuna_kernels.tree import Share, pack_groups


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_equal_separate_sequences(family: str) -> None:
    """Several groups in one row, all three ways of sharing, with and without activation checkpointing."""
    model = tiny(family)
    expected = separate_scores(model, GROUPS)
    gradients = all_gradients(expected, model)
    prepare_model(model)
    shares: tuple[Share, ...] = ("tree", "prompt", "none")
    for share in shares:
        found = score_groups(model, pack_groups(GROUPS, share=share)).scores
        assert_close(found, expected, bound(family))
        assert_same_gradients(all_gradients(found, model), gradients, bound(family))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = score_groups(model, pack_groups(GROUPS)).scores
    assert_same_gradients(all_gradients(found, model), gradients, bound(family))


def test_the_families_use_what_they_are_here_for() -> None:
    """The windows, caps and scales above change the scores: the comparison would notice if they were
    dropped."""
    for family, setting, value in (
        ("mistral", "sliding_window", None),
        ("qwen2", "sliding_window", 1000),
        ("gemma2", "sliding_window", 1000),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "attn_logit_softcapping", None),
        ("granite", "logits_scaling", 1.0),
    ):
        model = tiny(family)
        with torch.no_grad():
            before = separate_scores(model, GROUPS)
            other = type(model)(_changed(model.config, setting, value)).double()
            other.load_state_dict(model.state_dict())
            assert (separate_scores(other, GROUPS) - before).abs().max() > 1e-3, (family, setting)


def _changed(config: Any, setting: str, value: Any) -> Any:
    config = copy.deepcopy(config)
    setattr(config, setting, value)
    return config


def test_a_scale_that_the_model_keeps_itself() -> None:
    """Cohere's models copy it from the configuration once."""
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = CohereForCausalLM(CohereConfig(**settings, num_attention_heads=4, logit_scale=0.3)).double().eval()
    prepare_model(model)
    for scale in (0.3, 5.0):
        model.logit_scale = scale
        found = score_groups(model, pack_groups(GROUPS)).scores
        assert_close(found, separate_scores(model, GROUPS), bound("llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reentrant_checkpointing(family: str) -> None:
    model = tiny(family)
    gradients = all_gradients(separate_scores(model, GROUPS), model)
    prepare_model(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    score_groups(model, pack_groups(GROUPS)).scores.mul(
        torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(found, gradients, bound(family))


def test_logprobs_entropy_and_length_penalty() -> None:
    model = prepare_model(tiny("gemma2"))
    tree = pack_groups(GROUPS)
    found = score_groups(model, tree, length_penalty=1.3, return_entropy=True)
    separate = separate_logprobs(model, GROUPS)
    assert_close(found.logprobs, torch.cat(separate), bound("gemma2"))
    assert_close(found.scores, separate_scores(model, GROUPS, 1.3), bound("gemma2"))
    group = GROUPS[1]
    logits = model(input_ids=torch.tensor([[*group.prompt, *group.responses[0]]])).logits[0, 1:-1]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    start = sum(len(y) for y in GROUPS[0].responses)
    assert_close(found.entropy[start : start + len(entropy)], entropy, bound("gemma2"))
    assert score_groups(model, tree).entropy is None


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("family", ["gemma2", "opt", "granite"])
def test_ranking_loss_equals_the_reference(family: str, preset: str) -> None:
    """Loss and all gradients against hinge and MLE over log-probabilities of separate sequences."""
    model = tiny(family)
    tree = pack_groups(GROUPS)
    logprobs = separate_logprobs(model, GROUPS)
    scores = torch.stack([x.mean() for x in logprobs])
    reduction = "mean_groups" if preset == "paper" else "mean_per_lag"
    ranking = ranking_loss(scores, tree.ranks, tree.group_offsets, reduction=reduction, margin=0.4)
    best = [-logprobs[1].mean(), -logprobs[4].mean(), -logprobs[6].mean()]
    mle = torch.stack(best).mean() if preset == "paper" else -torch.cat(logprobs).mean()
    expected = ranking + 0.3 * mle
    gradients = all_gradients(expected, model)
    output = model_ranking_loss(model, tree, preset=preset, margin=0.4, mle_weight=0.3)
    assert ranking > 0
    assert_close(output.loss, expected, bound(family))
    assert_close(output.scores, scores, bound(family))
    assert_same_gradients(all_gradients(output.loss, model), gradients, bound(family))


def test_a_group_scores_the_same_alone_and_in_company() -> None:
    """Up to rounding: attention gives the same bits, the trunk's matrix products need not."""
    model = prepare_model(tiny("llama", torch.float32))
    with torch.no_grad():
        together = score_groups(model, pack_groups(GROUPS)).scores
        alone = torch.cat([score_groups(model, pack_groups([group])).scores for group in GROUPS])
    assert_close(together, alone, 16 * torch.finfo(torch.float32).eps)


def test_half_precision_and_autocast_err_as_the_stock_forward_does() -> None:
    """A few times the error that separate sequences make in the same dtype, against float64."""
    exact = tiny("llama")
    tree = pack_groups(GROUPS)
    with torch.no_grad():
        truth = torch.cat(separate_logprobs(exact, GROUPS))
        for cast in (True, False):
            model = copy.deepcopy(exact).to(torch.float32 if cast else torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                stock = torch.cat(separate_logprobs(model, GROUPS))
                found = score_groups(prepare_model(model), tree).logprobs
            assert found.dtype == torch.float32
            assert (found - truth).square().mean() <= 4 * (stock - truth).square().mean()


def test_no_grad_builds_no_graph_and_training_mode_is_kept() -> None:
    model = prepare_model(tiny("llama"))
    with torch.no_grad():
        assert not score_groups(model, pack_groups(GROUPS)).scores.requires_grad
    assert model.training
    assert score_groups(model, pack_groups(GROUPS)).scores.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_calls_work_as_before(family: str) -> None:
    """Forward with and without padding, loss gradients, and generation from a padded batch."""
    # float32 for Gemma-2: stock eager attention makes NaN of left padding in float64
    model = tiny(family, torch.float32 if family == "gemma2" else torch.float64).eval()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9, 10, 11, 13]])
    mask = (ids != 0).long()

    def everything() -> list[Tensor]:
        with torch.no_grad():
            generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        padded = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        plain = model(input_ids=ids[1:]).logits
        return [padded, plain, generated, *all_gradients(plain.square().mean(), model).values()]

    before = everything()
    prepare_model(model)
    with torch.no_grad():
        score_groups(model, pack_groups(GROUPS))
    for a, b in zip(everything(), before, strict=True):
        assert_close(a, b, bound(family))


def test_preparing_twice_changes_nothing() -> None:
    model = tiny("llama")
    assert prepare_model(model) is model
    prepare_model(model)
    assert model.config._attn_implementation == "tuna_tree"
    copied = copy.deepcopy(model)
    assert_close(score_groups(copied, pack_groups(GROUPS)).scores, separate_scores(model, GROUPS), bound("llama"))


def test_a_saved_model_knows_nothing_of_the_tree(tmp_path: Path) -> None:
    """What is saved after training loads with plain transformers and its own attention."""
    model = prepare_model(tiny("llama"))
    model.save_pretrained(tmp_path)
    assert "tuna" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "sdpa"
    assert_close(separate_scores(loaded, GROUPS), separate_scores(model, GROUPS), bound("llama"))


def test_nothing_of_transformers_is_replaced() -> None:
    """No monkey-patch: classes and modules of the model hold the same objects before and after."""
    import transformers.masking_utils
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama as llama

    places = [llama, transformers.masking_utils, transformers.modeling_utils]
    places += [x for x in vars(llama).values() if isinstance(x, type)]

    def contents() -> list[dict[str, int]]:
        own = "_can_set_attn_implementation_cached_value"  # transformers' own note to itself
        return [{name: id(x) for name, x in vars(place).items() if name != own} for place in places]

    model = tiny("llama")
    methods = {name: type(m).forward for name, m in model.named_modules()}
    before = contents()
    score_groups(prepare_model(model), pack_groups(GROUPS)).scores.sum().backward()
    assert contents() == before
    for name, module in model.named_modules():
        assert type(module).forward is methods[name] and "forward" not in vars(module)


def test_float32_parts_are_where_we_say() -> None:
    """OPT and GPT-2 agree to float64 rounding; that the others do not is their norms in float32, not ours."""
    for family in IN_DOUBLE:
        assert bound(family) < 1e-9


def test_a_model_keeps_the_attention_backend_chosen_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare_model(attention=)` reaches every layer, apart from the head's `backend=`; an unknown or unable one is
    named."""
    asked: list[str] = []

    def listening(*args: Any, **keywords: Any) -> Any:
        asked.append(keywords["backend"])
        return tree_attention(*args, **keywords)

    monkeypatch.setattr(attention_hook, "tree_attention", listening)
    model, other = tiny("llama"), tiny("llama")
    tree = pack_groups(GROUPS)
    expected = score_groups(model, tree).scores
    for attention, backend, reached in (
        (None, "auto", "auto"),
        (None, "reference", "reference"),
        ("torch", "reference", "torch"),
        (None, "reference", "torch"),
        ("reference", "auto", "reference"),
    ):
        prepare_model(model, attention=attention)
        asked.clear()
        found = score_groups(model, tree, backend=backend).scores
        assert set(asked) == {reached}
        assert_close(found, expected, bound("llama"))
        asked.clear()
        model_ranking_loss(model, tree, backend=backend)
        assert set(asked) == {reached}
    asked.clear()
    score_groups(other, tree)
    assert set(asked) == {"auto"}
    with pytest.raises(ValueError, match="attention = 'turbo' is not one of"):
        prepare_model(model, attention="turbo")
    prepare_model(model, attention="flash")
    with pytest.raises(RuntimeError, match="backend = 'flash' does not support this call: flash-attn is not installed"):
        model_ranking_loss(model, tree)
