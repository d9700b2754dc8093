"""Metrics of a training run since its last log line, over all ranks.

A meter keeps results of the loss on the device, without their graph, and reads them only for a log line: no host
synchronisation in between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from accelerate.utils import gather_object
from torch import Tensor

from tuna.data.batching import Batch
from tuna.score.evaluation import PendingScores
from tuna.score.metrics import ScoredGroups, ranking_metrics
from tuna_kernels import RankingLossOutput


@dataclass
class _Tokens:
    computed: int = 0
    unshared: int = 0
    padded: int = 0


@dataclass
class TrainingMeter:
    """Collects the micro-batches of one rank; `flush` returns the figures of all ranks since the last flush."""

    _steps: int = 0
    _started: float = 0.0
    _scores: list[PendingScores] = field(default_factory=list)
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # ranking, mle, active
    _tokens: _Tokens = field(default_factory=_Tokens)

    def start_step(self) -> None:
        """Start an optimizer step."""
        if self._steps == 0:
            self._started = time.perf_counter()
        self._steps += 1

    def add(self, batch: Batch, output: RankingLossOutput) -> None:
        """Add a counted micro-batch and its loss, normalised over the whole optimizer step."""
        tree = batch["tree"]
        self._scores.append(PendingScores.of(tree, output.scores, output.logprobs))
        self._parts.append((output.ranking.detach(), output.mle.detach(), output.active.sum()))
        self._tokens.computed += tree.num_tokens
        self._tokens.unshared += tree.unshared_tokens
        self._tokens.padded += batch["padded_tokens"]

    def flush(self) -> dict[str, float]:
        """Figures since the last flush, the same on all ranks; all ranks must call it. Empty without a step.

        - `loss/rank`, `loss/mle`: parts of the loss, mean over optimizer steps.
        - `rank/…`, `margin/mean`, `logps/rank_r`: `tuna.score.metrics.ranking_metrics` of all groups, each
          scored with the weights before its own step.
        - `active_share`: fraction of candidates whose log-probabilities had a gradient.
        - `tokens/computed`: packed tokens through the model. `tokens/saved`: additional tokens of k separate
          unpadded sequences; `tokens/padded`: tokens of k padded copies, as in the released code.
        - `tokens/s`: packed tokens per second of wall time, evaluation included.
        """
        if self._steps == 0:
            return {}
        mine = (
            ScoredGroups.concatenate([scores.fetch() for scores in self._scores]),
            [sum(float(part[i]) for part in self._parts) for i in range(3)],
            self._tokens,
        )
        scored, parts, tokens = zip(*gather_object([mine]), strict=True)
        everything = ScoredGroups.concatenate(scored)
        ranking, mle, active = (sum(part[i] for part in parts) for i in range(3))
        computed = sum(rank.computed for rank in tokens)
        figures = {
            "loss/rank": ranking / self._steps,
            "loss/mle": mle / self._steps,
            **ranking_metrics(everything),
            "active_share": active / max(len(everything.scores), 1),
            "tokens/computed": computed,
            "tokens/saved": sum(rank.unshared for rank in tokens) - computed,
            "tokens/padded": sum(rank.padded for rank in tokens),
            "tokens/s": computed / (time.perf_counter() - self._started),
        }
        self.__init__()  # type: ignore[misc]  # reset
        return figures
