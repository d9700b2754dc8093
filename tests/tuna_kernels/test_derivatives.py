"""Every derivative of every op is the reference's or refused: torch.func, forward mode, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from tests.tuna_kernels.integrations.tiny_models import GROUPS, tiny
from tuna_kernels import (
    Group,
    available_backends,
    linear_logprobs,
    linear_ranking_loss,
    pack_groups,
    ranking_loss,
    selective_logprobs,
    sequence_scores,
)
from tuna_kernels.attention.tree_attention import tree_attention
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model, two_phase_ranking_loss

NATIVE = available_backends()["cpu"]
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(bool(NATIVE), reason=NATIVE))]
TREE = pack_groups([Group([1, 2], [[3, 4], [3, 5, 6], [7]], ranks=[1, 0, 2])])
T = TREE.num_tokens
Function = Callable[[Tensor, str], Tensor]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


H, W, QKV = _random(T, 5), _random(11, 5, seed=1), [_random(1, 2, T, 4, seed=s) for s in range(3)]


def _logprobs(x: Tensor, backend: str, **options: Any) -> Tensor:
    """All that it returns, as one tensor."""
    weight = options.pop("weight", W).to(x.dtype)
    found = linear_logprobs(x, weight, TREE.targets, rows=TREE.rows, backend=backend, **options)
    return found if isinstance(found, Tensor) else torch.stack(found)


def _attention(x: Tensor, backend: str, place: int, **options: Any) -> Tensor:
    q, k, v = (x if i == place else y.to(x.dtype) for i, y in enumerate(QKV))
    options = {"sinks": x, **options} if place == 3 else options
    found = tree_attention(q, k, v, TREE.subtree_end, backend=backend, **options)
    return found if isinstance(found, Tensor) else found[1]


OPS: dict[str, tuple[Function, Tensor]] = {
    "logprobs of hidden": (_logprobs, H),
    "logprobs, lse and entropy": (lambda x, b: _logprobs(x, b, return_lse=True, return_entropy=True), H),
    "logprobs of weight": (lambda x, b: _logprobs(H.to(x.dtype), b, weight=x), W),
    "selective": (lambda x, b: selective_logprobs(x, torch.arange(T), backend=b), _random(T, 11)),
    "ranking": (lambda x, b: linear_ranking_loss(x, W.to(x.dtype), TREE, backend=b).loss * 3, H),
    "attention of q": (lambda x, b: _attention(x, b, 0), QKV[0]),
    "attention of v": (lambda x, b: _attention(x, b, 2), QKV[2]),
    "attention's lse": (lambda x, b: _attention(x, b, 1, return_lse=True), QKV[1]),
    "attention of sinks": (lambda x, b: _attention(x, b, 3), _random(2)),
}
NO_FORWARD = 'no forward-mode derivative .*: use backend="reference"'
NO_SECOND = 'no second derivative .*: use backend="reference"'


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_reverse_mode_of_torch_func(op: str, backend: str) -> None:
    """grad, jacrev, and vmap inside and outside of them."""
    function, x = OPS[op]
    two = torch.stack([x, x * 2])

    def total(x: Tensor, backend: str) -> Tensor:
        return function(x, backend).sum()

    expected = [grad(total)(y, "reference") for y in two]
    near(grad(total)(x, backend), expected[0])
    near(jacrev(function)(x, backend), jacrev(function)(x, "reference"))
    near(vmap(lambda y: grad(total)(y, backend))(two), torch.stack(expected))
    near(grad(lambda y: vmap(lambda z: total(z, backend))(y).sum())(two), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str, backend: str) -> None:
    """As a transform, as dual tensors, over reverse mode, in the upstream alone, and while being compiled."""
    function, x = OPS[op]

    def tangent(y: Tensor) -> Tensor:
        return jvp(lambda z: function(z, backend), (y,), (torch.ones_like(y),))[1]

    for transformed in (tangent, lambda y: jacfwd(function)(y, backend)):
        with pytest.raises(RuntimeError, match=NO_FORWARD):
            transformed(x)
    with pytest.raises(RuntimeError, match=NO_FORWARD), forward_ad.dual_level():
        function(forward_ad.make_dual(x, x), backend)
    with pytest.raises(RuntimeError, match=NO_FORWARD), forward_ad.dual_level():
        function(forward_ad.make_dual(x.clone().requires_grad_(), x), backend)
    # The warning of vmap's loop, where it comes first, takes the place of the message in PyTorch 2.14.
    with pytest.raises(Exception, match=r"no (forward-mode|second) derivative|returned a result with an exception"):
        hessian(lambda y: function(y, backend).sum())(x)
    with pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_an_upstream_with_a_tangent(op: str, backend: str) -> None:
    """The gradient is linear in it: its tangent is what the tangent gives as upstream, or refused; never none."""
    function, x = OPS[op]
    leaf = x.clone().requires_grad_()
    out = function(leaf, backend)
    (expected,) = torch.autograd.grad(out, leaf, torch.ones_like(out), retain_graph=True)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.full_like(out, 1 / 3), torch.ones_like(out))
        try:
            (found,) = torch.autograd.grad(out, leaf, upstream)
        except RuntimeError as refusal:
            assert "no forward-mode derivative" in str(refusal)
            return
        tangent = forward_ad.unpack_dual(found).tangent
        assert tangent is not None
        near(tangent, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_penalty_is_refused_when_it_is_differentiated(op: str, recompute: bool, backend: str) -> None:
    """create_graph=True alone costs nothing: the gradient is right, twice; only what is made of it has none."""
    function, x = OPS[op]
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf, "reference").sum(), leaf)

    def run() -> Tensor:
        if not recompute:
            return function(leaf, backend).sum()
        whole: Tensor = checkpoint(lambda y: function(y * 1, backend), leaf, use_reentrant=False)
        return whole.sum()

    loss = run()
    for _ in range(2):
        near(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected)
    (first,) = torch.autograd.grad(run(), leaf, create_graph=True)
    near(first, expected)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        (run() + first.square().sum()).backward()
    with pytest.raises(RuntimeError, match=NO_SECOND):
        jacrev(grad(lambda y: function(y, backend).sum()))(x)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_them_all(op: str) -> None:
    """What the refusals advise: tangents are the finite differences, second derivatives pass gradgradcheck."""
    function, x = OPS[op][0], OPS[op][1].double()
    direction, step = _random(*x.shape, seed=9).double(), 1e-6

    def f(y: Tensor) -> Tensor:
        return function(y, "reference")

    tangent = jvp(f, (x,), (direction,))[1]
    difference = (f(x + step * direction) - f(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent, tangent)
    assert torch.autograd.gradgradcheck(f, x.clone().requires_grad_())
    near(vmap(f)(x[None])[0], f(x))


def test_the_loss_of_scores_is_piecewise_linear_in_either_mode() -> None:
    """Right at any order on every backend: the second derivative is 0, and a penalty reaches what made the scores."""

    def loss(scores: Tensor) -> Tensor:
        return ranking_loss(scores, TREE.ranks, TREE.group_offsets, reduction="mean_per_lag")

    scores = _random(3, seed=4).double()
    assert torch.autograd.gradcheck(loss, scores.clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, scores.clone().requires_grad_())
    assert not hessian(loss)(scores).any()

    def of_logprobs(logprobs: Tensor) -> Tensor:
        squared = sequence_scores(logprobs * logprobs, TREE.candidate_offsets)
        return loss(squared)

    logprobs = _random(TREE.num_slots, seed=5).double()
    assert torch.autograd.gradgradcheck(of_logprobs, logprobs.clone().requires_grad_())
    compiled = torch.compile(lambda x: jvp(loss, (x,), (x,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores), jvp(loss, (scores,), (scores,))[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_go_elsewhere(backend: str) -> None:
    """Overwritten logits and a weight's gradient that is added to a buffer: a penalty is refused there too."""
    x, targets = H.clone().requires_grad_(), torch.arange(T)
    taken = selective_logprobs(x @ W.t(), targets, inplace_backward=True, backend=backend)
    plain = selective_logprobs(x @ W.t(), targets, backend="reference")
    (first,) = torch.autograd.grad(taken.sum(), x, create_graph=True)
    near(first, torch.autograd.grad(plain.sum(), x)[0])
    with pytest.raises(RuntimeError, match=NO_SECOND):
        first.sum().backward()
    weight, total = W.clone().requires_grad_(), torch.zeros_like(W)
    added = linear_logprobs(x, weight, TREE.targets, rows=TREE.rows, accumulate_into=total, backend=backend)
    assert isinstance(added, Tensor)
    (first,) = torch.autograd.grad(added.sum(), x, create_graph=True)
    assert total.any()
    with pytest.raises(RuntimeError, match=NO_SECOND):
        first.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_shards_of_the_vocabulary(backend: str, tmp_path: Any) -> None:
    """A second derivative would need the other ranks' numbers, on the reference backend too."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        leaves = [H.clone().requires_grad_(), W.clone().requires_grad_()]
        out = _logprobs(leaves[0], backend, weight=leaves[1], process_group=dist.group.WORLD)
        for i in (0, 1):
            (first,) = torch.autograd.grad(out.sum(), leaves[i], create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                first.square().sum().backward()
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"), forward_ad.dual_level():
            _logprobs(H, backend, weight=forward_ad.make_dual(W, W), process_group=dist.group.WORLD)
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"), forward_ad.dual_level():
            _logprobs(forward_ad.make_dual(H, H), backend, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_models_in_one_pass_and_two() -> None:
    """A penalty on a model's parameters: refused by kernels, computed by the reference, refused by the two phases."""
    model, tree = prepare_model(tiny("llama")), pack_groups(GROUPS)
    head = model.get_output_embeddings().weight

    def penalty(backend: str) -> Tensor:
        loss = model_ranking_loss(model, tree, backend=backend).loss
        (first,) = torch.autograd.grad(loss, head, create_graph=True)
        return torch.autograd.grad(first.square().sum(), head)[0]

    with pytest.raises(RuntimeError, match=NO_SECOND):
        penalty("torch")
    assert penalty("reference").any()
    with pytest.raises(RuntimeError, match="two_phase_ranking_loss has no second derivative"):
        two_phase_ranking_loss(
            model, tree, backend="reference", backward=lambda loss, last: loss.backward(create_graph=True)
        )

    def two_phases(weight: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, {"lm_head.weight": weight}):
            return two_phase_ranking_loss(model, tree, backend="reference").loss

    with pytest.raises(RuntimeError, match="two_phase_ranking_loss runs the backward itself"):
        jvp(two_phases, (head.detach(),), (head.detach(),))
    with pytest.raises(RuntimeError, match="two_phase_ranking_loss runs the backward itself"):
        grad(two_phases)(head.detach())
