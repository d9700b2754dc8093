"""The log-prob arms: ours and the peers', over one `Case`; and the float64 oracle they are all held against.

Every arm computes the log-probability of one target per row, `log_softmax(hidden @ weight.T)[target]`, and
in the training modes the gradients under one random upstream per row, the same for all arms. An arm runs its
library the way that library documents it; what it was told besides its defaults stands in its note.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Arm

Mode = Literal["forward", "trainable", "half", "frozen"]
MODES: tuple[Mode, ...] = get_args(Mode)
TRAINABLE = ("trainable", "half")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRL_CHUNK = 32768  # what its trainer passes
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """N rows of width D against a vocabulary of V."""

    rows: int
    width: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "1024x768x32768" → N = 1024, D = 768, V = 32768."""
        try:
            rows, width, vocab = (int(part) for part in text.lower().split("x"))
        except ValueError:
            raise ValueError(f"shape {text!r} is not of the form ROWSxWIDTHxVOCAB") from None
        if min(rows, width, vocab) < 1:
            raise ValueError(f"shape {text!r} has a size below 1")
        return cls(rows, width, vocab)

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}x{self.vocab}"


@dataclass(frozen=True)
class Case:
    """The inputs all arms share: hidden [N, D], weight [V, D], targets int64 [N], upstream float32 [N], and
    the mode ("forward": no gradient; "trainable": gradients of hidden and weight; "half": the same, every second
    upstream zero; "frozen": gradient of hidden only)."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    mode: Mode

    @property
    def shape(self) -> Shape:
        """N, D, V."""
        rows, width = self.hidden.shape
        return Shape(rows, width, len(self.weight))


def make_case(shape: Shape, dtype: str, mode: Mode, *, seed: int = 0, logit_std: float = 3.0) -> Case:
    """Random inputs: normal hidden states, and a head scaled so that logits have standard deviation
    `logit_std` (about that of a trained model; 0.5 is nearly flat, 10 nearly one-hot)."""
    maker = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.rows, shape.width, generator=maker).to(DTYPES[dtype])
    weight = torch.randn(shape.vocab, shape.width, generator=maker).mul_(logit_std / shape.width**0.5)
    targets = torch.randint(shape.vocab, (shape.rows,), generator=maker)
    upstream = torch.randn(shape.rows, generator=maker)
    if mode == "half":
        upstream[::2] = 0
    case = Case(hidden, weight.to(DTYPES[dtype]), targets, upstream, mode)
    case.hidden.requires_grad_(mode != "forward")
    case.weight.requires_grad_(mode in TRAINABLE)
    return case


def dtype_name(case: Case) -> str:
    """The name of the dtype of a case's hidden states, as `make_case` takes it."""
    return next(name for name, dtype in DTYPES.items() if dtype == case.hidden.dtype)


def oracle(case: Case, block_bytes: int = 1 << 26) -> dict[str, Tensor]:
    """The right results in float64 by the closed form, a block of rows at a time (no [N, V] in float64).

    `dl/dz = onehot(target) - softmax(z)`; results as the arms name them.
    """
    hidden, weight = case.hidden.detach().double(), case.weight.detach().double()
    upstream = case.upstream.double()
    logprobs, d_hidden = hidden.new_empty(len(hidden)), torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight) if case.mode in TRAINABLE else None
    step = max(1, block_bytes // (8 * len(weight)))
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        block = torch.log_softmax(hidden[rows] @ weight.T, dim=-1)
        chosen = case.targets[rows, None]
        logprobs[rows] = block.gather(1, chosen)[:, 0]
        if case.mode == "forward":
            continue
        d_logits = block.exp_().neg_().scatter_add_(1, chosen, torch.ones_like(block[:, :1]))
        d_logits *= upstream[rows, None]
        d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            d_weight.addmm_(d_logits.T, hidden[rows])
    gradients = {"gradient:hidden": d_hidden, "gradient:weight": d_weight}
    if case.mode == "forward":
        return {"logprobs": logprobs}
    return {"logprobs": logprobs} | {name: grad for name, grad in gradients.items() if grad is not None}


def tolerance(dtype: str, vocab: int) -> dict[str, float]:
    """Largest error that passes, relative to the largest magnitude of the right result.

    Log-probs: 1.5 eps of the input type, since several peers round target logit, log-sum-exp and result to it (half an
    eps each); gradients: 4 eps, since p = exp(z - lse) carries |z| times the error of z. To each comes what float32
    sums leave behind: a few eps from products of D terms, and up to sqrt(V) eps in the sum over the vocabulary and so
    in every p (a tenth of it in a log-prob, which is some ten nats large). Plain torch needs that room: at V = 49152
    its log_softmax is off by 1e-5 nats, its gradients by 36 eps.
    """
    own, single = torch.finfo(DTYPES[dtype]).eps, torch.finfo(torch.float32).eps
    return {
        "logprobs": 1.5 * own + (4 + vocab**0.5 / 10) * single,
        "gradient": 4 * own + (30 + vocab**0.5) * single,
    }


def logprob_arms() -> list[Arm[Case]]:
    """All arms, in the order of the tables."""
    return [
        logprob_arm("baseline", _baseline, "linear, log_softmax, gather in the input type"),
        logprob_arm("cross_entropy", _cross_entropy, "F.cross_entropy on logits, reduction none"),
        logprob_arm(
            "torch auto",
            _torch_chunked(None),
            "F.linear_cross_entropy, default options",
            refuses=_needs_chunked,
        ),
        logprob_arm(
            "torch 256 rows",
            _torch_chunked(256),
            "F.linear_cross_entropy, batch_chunk_size=256",
            refuses=_needs_chunked,
        ),
        logprob_arm(
            "Liger",
            _liger,
            "_ChunkedSelectiveLogProbFunction, its 2048x4096 chunks",
            package="liger-kernel",
            refuses=_needs("liger_kernel.chunked_loss.fused_linear_ppo"),
        ),
        logprob_arm(
            "CCE compiled",
            _cce,
            "impl=torch_compile (its Triton kernels need a GPU)",
            package="cut-cross-entropy",
            refuses=_needs("cut_cross_entropy"),
        ),
        logprob_arm(
            "TRL",
            _trl,
            f"ChunkedLogProbFunction, chunks of {TRL_CHUNK} columns, log-probs alone",
            package="trl",
            refuses=_needs("trl.kernels"),
        ),
        logprob_arm(
            "baseline compiled",
            _compiled_baseline(),
            "torch.compile of baseline",
            refuses=_needs_compiler,
        ),
        logprob_arm(
            "tuna torch", our_logprobs("torch"), "linear_logprobs, backend torch", refuses=needs_backend("torch")
        ),
        logprob_arm("tuna cpu", our_logprobs("cpu"), "linear_logprobs, backend cpu", refuses=needs_backend("cpu")),
    ]


def logprob_arm(
    name: str,
    logprobs: LogProbs,
    note: str,
    *,
    package: str = "torch",
    refuses: Callable[[Case], str] = lambda _: "",
) -> Arm[Case]:
    """`logprobs(hidden, weight, targets)` as an arm over a `Case`."""
    return Arm(name, lambda case: run_case(case, logprobs), note, package, refuses)


def run_case(case: Case, logprobs: LogProbs) -> dict[str, Tensor]:
    """Log-probs of `case` by `logprobs(hidden, weight, targets)`, and its gradients unless the mode is
    "forward"."""
    if case.mode == "forward":
        with torch.no_grad():
            return {"logprobs": logprobs(case.hidden, case.weight, case.targets)}
    values = logprobs(case.hidden, case.weight, case.targets)
    wanted = [case.hidden, case.weight] if case.mode in TRAINABLE else [case.hidden]
    gradients = torch.autograd.grad(values, wanted, case.upstream.to(values.dtype))
    names = ("gradient:hidden", "gradient:weight")
    return {"logprobs": values.detach(), **dict(zip(names, gradients, strict=False))}


def _baseline(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


def _torch_chunked(rows: int | None) -> LogProbs:
    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from torch.nn import LinearCrossEntropyOptions

        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)

    return logprobs


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import fused_linear_ppo as liger

    chunk = liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    values: Tensor = liger._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, 1.0, chunk)
    return values


def _cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")
    return -loss


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    apply: Any = ChunkedLogProbFunction.apply
    values: Tensor = apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]
    return values


def _compiled_baseline() -> LogProbs:
    compiled: Any = torch.compile(_baseline)

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        values: Tensor = compiled(hidden, weight, targets)
        return values

    return logprobs


def our_logprobs(backend: str) -> LogProbs:
    """`tuna_kernels.linear_logprobs` on a backend."""

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from tuna_kernels import linear_logprobs

        values = linear_logprobs(hidden, weight, targets, backend=backend)
        assert isinstance(values, Tensor)  # a tuple only where more is asked for
        return values

    return logprobs


def _needs(module: str) -> Callable[[object], str]:
    def refuses(_: object) -> str:
        try:
            __import__(module)
        except ImportError as error:
            return f"not installed: {error}"
        return ""

    return refuses


def _needs_compiler(_: object) -> str:
    return "" if any(map(shutil.which, ("g++", "clang++", "cl"))) else "torch.compile needs a C++ compiler here"


def _needs_chunked(_: object) -> str:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return ""
    return f"torch {torch.__version__} has no F.linear_cross_entropy with options (2.13 has)"


def needs_backend(backend: str) -> Callable[[object], str]:
    """An `Arm.refuses`: the reason why this backend of ours cannot be used here."""

    def refuses(_: object) -> str:
        from tuna_kernels.dispatch import available_backends

        return available_backends().get(backend, f"no backend {backend!r}")

    return refuses
