"""Tiny random models of every causal-LM family of transformers, what the tree makes of each, and the page that says so.

python -m tests.tuna_kernels.integrations.families            # writes docs/families.md
python -m tests.tuna_kernels.integrations.families gpt_oss    # prints what comes out
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tuna_kernels.integrations.family_settings import SETTINGS, SMALL, UNTRIED
from tests.tuna_kernels.integrations.tiny_models import GROUPS, randomized, separate_scores
from tuna_kernels.integrations.transformers import model_ranking_loss, prepare_model, score_groups
from tuna_kernels.integrations.transformers.attention_hook import DENSE
from tuna_kernels.integrations.transformers.check import small_groups, stock_logprobs
from tuna_kernels.integrations.transformers.two_phase.loss import two_phase_ranking_loss
from tuna_kernels.integrations.transformers.two_phase.requests import why_not_two_phase
from tuna_kernels.tree import pack_groups

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
BOUND = 64 * torch.finfo(torch.float32).eps
"""Relative, on scores and on each parameter's gradient: families take norms and softmaxes in float32 in float64 too."""

IN_FLOAT32 = ("xglm",)
"""Families whose own forward has no float64."""


INTRO = """\
# Model families

What each causal-LM family of transformers {release} does on a packed tree. This page is made by
`python -m tests.tuna_kernels.integrations.families` and held by `test_families.py`: a tiny random model of every
family below is compared with k separate sequences through its own forward, in float64: scores and all gradients, by
one pass and by two phases under activation checkpointing, within {bound} relative (most families take norms or
softmaxes in float32; {narrow} is compared in float32, within eight times that).

A family's name decides nothing at run time. Every model object is checked once, when it is prepared: two groups with
six sequences, some 60 tokens, by its own forward and as a tree. So a subclass, remote code, a hook or an adapter that
does more than the tree knows is refused, and a family that is not listed here runs if it is right. The check takes
about ten short forwards. In half precision, up to 1 GiB of weights, it computes in float32 on a copy that it lets go
of. It runs again when a class, a forward or a hook anywhere in the model has changed. Under ZeRO-3 it runs at the first
step, where the weights are gathered.

## Runs ({runs})

*tree*: attention through transformers' registry, attention sinks and windows included. *dense mask*: the model's
attention is its own; it gets the tree as a mask of T x T numbers for T packed rows, at the speed of its eager
attention. `granitemoehybrid` is Granite 4 without Mamba layers (with them it is refused, as Bamba is); `falcon` is the
one with rotary positions; `gpt_neo` takes no more packed rows than its local window; Llama 4 runs while no sequence is
longer than a chunk of its attention.
"""


REFUSED = """\
## Refused ({refused})

*unshared*: whether the model's own forward gives separate sequences the same log-probabilities alone and in a padded
batch, so that they could be scored without a tree. Nothing here runs them so: a model of these is refused.
"""


@dataclass(frozen=True)
class Outcome:
    """What the tree makes of a family.

    Attributes:
        way: "tree", "dense mask" or "refused".
        two_phase: "yes", or why not.
        reason: why it is refused.
        unshared: of one that is refused, whether its own forward gives separate sequences the same log-probabilities
            alone and in a padded batch: "yes", or what comes between.
    """

    way: str
    two_phase: str = ""
    reason: str = ""
    unshared: str = ""


def tiny_family(model_type: str) -> nn.Module:
    """In float64 (`IN_FLOAT32` apart), experts by their plain loop, which has float64."""
    kind = CONFIG_MAPPING[model_type]
    given = {**SMALL, **SETTINGS.get(model_type, {})}
    fixed = {name for base in kind.__mro__ for name, x in vars(base).items() if isinstance(x, property) and not x.fset}
    config = kind(**{name: value for name, value in given.items() if value is not None and name not in fixed})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 5e6, f"{model_type} has {size:,} parameters: make it smaller in family_settings.py"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with suppress(ValueError, AttributeError):
        model.set_experts_implementation("eager")
    dtype = torch.float32 if model_type in IN_FLOAT32 else torch.float64
    return randomized(model.to(dtype), 0.2).eval()


def outcome(model_type: str) -> Outcome:
    """Compare scores, and all gradients by one pass and by two phases under checkpointing, with separate sequences.

    Raises:
        AssertionError: they differ by more than `BOUND`.
    """
    model: Any = tiny_family(model_type)
    try:
        prepare_model(copy.deepcopy(model))
    except ValueError as error:
        return Outcome("refused", reason=_short(str(error)), unshared=_unshared(model))
    bound = BOUND * (8 if model_type in IN_FLOAT32 else 1)
    expected = separate_scores(model, GROUPS)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = _gradients((expected * upstream).sum(), model)
    prepare_model(model)
    tree = pack_groups(GROUPS)
    found = score_groups(model, tree).scores
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= bound, f"{model_type}: scores differ by {error}"
    _assert_same(model_type, _gradients((found * upstream).sum(), model), wanted, bound)
    way = "dense mask" if model.config.get_text_config()._attn_implementation == DENSE else "tree"
    return Outcome(way, _two_phase(model_type, model, bound))


def _unshared(model: Any) -> str:
    with torch.no_grad():
        try:
            alone, together = stock_logprobs(model, small_groups(model))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"its own forward fails: {type(error).__name__}"
    if not alone.isfinite().all():
        return "its own forward gives numbers that are not finite"
    if (alone - together).abs().max() > BOUND * alone.abs().max():
        return "one by one; padding changes them"
    return "yes"


def _two_phase(model_type: str, model: Any, bound: float) -> str:
    if reason := why_not_two_phase(model):
        return _short(reason)
    tree = pack_groups(GROUPS)
    one_pass = _gradients(model_ranking_loss(model, tree, margin=0.4).loss, model)
    model.train()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        two_phase_ranking_loss(model, tree, margin=0.4)
    except ValueError as error:
        return _short(str(error))
    _assert_same(model_type, _taken(model), one_pass, bound)
    return "yes"


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return _taken(model)


def _taken(model: nn.Module) -> dict[str, Tensor]:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _assert_same(model_type: str, found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Relative to a parameter's own gradient, or a thousandth of the largest."""
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    assert largest > 0
    for name, gradient in wanted.items():
        error = (found[name] - gradient).abs().max().item() / max(gradient.abs().max().item(), 1e-3 * largest)
        assert error <= bound, f"{model_type}: the gradient of {name} differs by {error}"


def _short(message: str) -> str:
    """The reason in a message, without the model's name, what was measured and the remedy."""
    if "on a tree: " in message:
        return message.split("on a tree: ", 1)[1]
    if "root mean square" in message:
        return message.rsplit("; ", 1)[1]
    for remedy in (": two phases need", ", so its prompt's keys", ": scores and gradients"):
        message = message.split(remedy, 1)[0]
    return message


def page(outcomes: dict[str, Outcome]) -> str:
    """The page of the documentation."""
    runs = {name: o for name, o in outcomes.items() if o.way != "refused"}
    intro = INTRO.format(
        release=transformers.__version__, bound=f"{BOUND:.1e}", narrow=", ".join(IN_FLOAT32), runs=len(runs)
    )
    lines = [
        *intro.splitlines(),
        "",
        "| family | class | by | two phases |",
        "|---|---|---|---|",
        *(f"| `{name}` | {_class(name)} | {o.way} | {o.two_phase} |" for name, o in runs.items()),
        "",
        *REFUSED.format(refused=len(outcomes) - len(runs)).splitlines(),
        "| family | class | unshared | why |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | {_class(name)} | {o.unshared} | {o.reason} |"
            for name, o in outcomes.items()
            if o.way == "refused"
        ),
        "",
        "## Not tried",
        "",
        *(f"* {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in UNTRIED.items()),
        "",
    ]
    return "\n".join(lines)


def _class(model_type: str) -> str:
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return f"`{found if isinstance(found, str) else found[0]}`"


def families() -> list[str]:
    """All model types that are tried."""
    untried = {name for names in UNTRIED.values() for name in names}
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in untried]


def main(names: Iterable[str]) -> None:
    """Print the outcome of some families, or write the page of all."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes = {}
    for name in names or families():
        outcomes[name] = outcome(name)
        print(name, outcomes[name], flush=True)
    if not names:
        PAGE.write_text(page(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
