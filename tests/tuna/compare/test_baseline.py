"""Laws of `tuna.compare.baseline`: it equals the hand formula taken sequence by sequence, unpadded, in float64; and the
packed tree gives the same loss and the same gradient of every parameter, for both presets and all sharing.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.tuna.tiny_gpt2 import tiny_gpt2
from tuna.compare.baseline import baseline_step_loss, padded_batch, plain_tree_loss
from tuna_kernels import Group, pack_groups
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model
from tuna_kernels.losses import Preset

PRESETS: tuple[Preset, ...] = ("paper", "released")
VOCABULARY = 37


ROUNDINGS = 1000 * torch.finfo(torch.float64).eps


def ragged_groups() -> list[Group]:
    """Several sizes k, a tie, equal responses, a common beginning, a response that starts another, k = 1."""
    generator = torch.Generator().manual_seed(1)

    def tokens(number: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (number,), generator=generator).tolist()

    start = tokens(3)
    return [
        Group(tokens(5), [tokens(4), tokens(7), tokens(2), tokens(5)], scores=[0.5, 0.9, 0.1, 0.3]),
        Group(tokens(3), [start + tokens(2), start, start + tokens(4)], ranks=[1, 2, 3]),
        Group(tokens(6), [tokens(3), tokens(3), tokens(6)], scores=[0.2, 0.7, 0.7]),
        Group(tokens(2), [start, tokens(4), start], ranks=[3, 2, 1]),
        Group(tokens(4), [tokens(5)]),
    ]


def hand_formula(
    model: GPT2LMHeadModel, groups: list[Group], preset: Preset, margin: float, penalty: float, weight: float
) -> torch.Tensor:
    """The loss written out: one sequence at a time, no padding, loops over pairs."""
    ranking: dict[int, list[torch.Tensor]] = {}
    best_terms, all_logprobs = [], []
    for group in groups:
        logprobs = []
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            table = model(input_ids=ids).logits[0].log_softmax(-1)
            first = len(group.prompt)
            logprobs.append(torch.stack([table[first - 1 + t, y] for t, y in enumerate(response)]))
        ranks = expected_ranks(group)
        scores = [own.sum() / len(own) ** penalty for own in logprobs]
        for i, rank_i in enumerate(ranks):
            for j, rank_j in enumerate(ranks):
                if rank_i < rank_j:
                    lag = rank_j - rank_i
                    ranking.setdefault(lag, []).append(torch.relu(margin * lag - (scores[i] - scores[j])))
        best_terms.append(-logprobs[ranks.index(0)].mean())
        all_logprobs += logprobs
    if preset == "paper":
        rank_term = torch.stack([hinge for lag in ranking.values() for hinge in lag]).sum() / len(groups)
        return rank_term + weight * torch.stack(best_terms).mean()
    rank_term = torch.stack([torch.stack(hinges).mean() for hinges in ranking.values()]).sum()
    return rank_term - weight * torch.cat(all_logprobs).mean()


def expected_ranks(group: Group) -> list[int]:
    """By hand for `ragged_groups`: equal responses share the better rank."""
    written = {4: [1, 0, 3, 2], 1: [0]}
    if len(group.responses) in written:
        return written[len(group.responses)]
    if group.scores is not None:
        return [1, 0, 0]
    return [0, 1, 2] if group.ranks == [1, 2, 3] else [0, 1, 0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("margin", "penalty", "weight"), [(0.1, 1.0, 1.0), (0.4, 1.3, 0.2)])
def test_equals_the_hand_formula(preset: Preset, margin: float, penalty: float, weight: float) -> None:
    model, groups = tiny_gpt2(VOCABULARY), ragged_groups()
    output = baseline_step_loss(model, groups, preset=preset, margin=margin, length_penalty=penalty, mle_weight=weight)
    expected = hand_formula(model, groups, preset, margin, penalty, weight)
    torch.testing.assert_close(output.loss, expected, rtol=ROUNDINGS, atol=0)
    torch.testing.assert_close(output.loss.detach(), output.ranking + weight * output.mle)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    by_hand = torch.autograd.grad(expected, list(model.parameters()))
    assert_all_close(gradients, by_hand)


@pytest.mark.parametrize("share", ["tree", "prompt", "none"])
@pytest.mark.parametrize("preset", PRESETS)
def test_packed_tree_gives_the_same_loss_and_gradients(preset: Preset, share: str) -> None:
    model, groups = tiny_gpt2(VOCABULARY), ragged_groups()
    settings = {"preset": preset, "margin": 0.4, "length_penalty": 1.2, "mle_weight": 0.5}
    baseline = baseline_step_loss(model, groups, **settings)
    expected = torch.autograd.grad(baseline.loss, list(model.parameters()))
    ours = model_ranking_loss(prepare_model(model), pack_groups(groups, share=share), **settings)
    gradients = torch.autograd.grad(ours.loss, list(model.parameters()))
    for name in ("loss", "ranking", "mle", "scores"):
        torch.testing.assert_close(getattr(ours, name), getattr(baseline, name), rtol=ROUNDINGS, atol=0)
    assert_all_close(gradients, expected)


def assert_all_close(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Within so many roundings of the largest entry of all gradients (some entries cancel to nothing)."""
    bound = ROUNDINGS * max(b.abs().max() for b in expected)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert b.abs().max() > 0, f"parameter {number} has no gradient to compare"
        assert (a - b).abs().max() <= bound, f"parameter {number}"


def test_padding_is_masked_and_prompts_are_not_labelled() -> None:
    groups = [Group([1, 2], [[3], [4, 5, 6]])]
    input_ids, attention_mask, labels = padded_batch(groups, pad_token_id=9)
    assert input_ids.tolist() == [[1, 2, 3, 9, 9], [1, 2, 4, 5, 6]]
    assert attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 4, 5, 6]]


def test_the_padding_token_does_not_matter() -> None:
    model, groups = tiny_gpt2(VOCABULARY), ragged_groups()
    losses = [baseline_step_loss(model, groups, pad_token_id=token).loss.item() for token in (0, 11)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("preset", PRESETS)
def test_groups_of_one_train_on_likelihood_alone(preset: Preset) -> None:
    model = tiny_gpt2(VOCABULARY)
    output = baseline_step_loss(model, [Group([1, 2], [[3, 4, 5]])], preset=preset, mle_weight=2.0)
    expected = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), labels=torch.tensor([[-100, -100, 3, 4, 5]])).loss
    assert output.ranking.item() == 0
    torch.testing.assert_close(output.loss, 2 * expected.double(), rtol=1e-6, atol=0)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="groups is empty"):
        baseline_step_loss(tiny_gpt2(VOCABULARY), [])
    with pytest.raises(ValueError, match="preset = 'rrhf'"):
        baseline_step_loss(tiny_gpt2(VOCABULARY), ragged_groups(), preset="rrhf")  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plain_torch_tree_gives_the_same_loss_and_gradients(preset: Preset) -> None:
    model, groups = tiny_gpt2(VOCABULARY), ragged_groups()
    found = []
    for loss_of in (baseline_step_loss, plain_tree_loss):
        model.zero_grad()
        out = loss_of(model, groups, preset=preset, margin=0.3, length_penalty=1.2, mle_weight=0.7)
        out.loss.backward()
        found.append([out.loss.detach(), out.ranking, out.mle, out.scores, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=ROUNDINGS, atol=ROUNDINGS)
