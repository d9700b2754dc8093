"""One pass or two phases: estimates of the memory of each, and of the free memory.

Estimated from the model's configuration in bytes per packed token; `docs/memory.md` has the derivation and a
comparison with measurements. It decides `TunaConfig.memory = "auto"`. An estimate that is too high costs a forward, one
that is too low the run, so a margin is added.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from tuna.train.config import TunaConfig
from tuna_kernels import PackedTree
from tuna_kernels.head.ranking_loss import default_logits_budget
from tuna_kernels.integrations.transformers.two_phase.loss import SCORING_ROWS, TwoPhaseOutput
from tuna_kernels.integrations.transformers.two_phase.requests import why_not_two_phase

logger = logging.getLogger(__name__)

MARGIN = 1.25
"""Factor on activations: gradients of one layer's activations, temporaries, allocator fragmentation."""


@dataclass(frozen=True)
class ActivationModel:
    """Bytes of a decoder's training step per packed token.

    Attributes:
        layers: number of layers.
        inside: activations one layer keeps for its backward.
        boundary: the hidden state between two layers.
        keys: keys and values of one layer.
        exact_keys: the same in float32, the dtype of the gradient sums.
        checkpointed: layers are recomputed in the backward.
        head: bytes that do not depend on the number of tokens.
    """

    layers: int
    inside: float
    boundary: float
    keys: float
    exact_keys: float
    checkpointed: bool
    head: float

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, *, checkpointed: bool, logits_budget: int) -> ActivationModel:
        """The estimate for a Llama-like decoder of this configuration with activations in `dtype`."""
        config = config.get_text_config()
        width, heads = config.hidden_size, config.num_attention_heads
        size = getattr(config, "head_dim", None) or width // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * width
        item = dtype.itemsize
        # Inputs of the projections, the normalised states before the gain, and what attention keeps: q, k, v, out
        # (the input of the output projection). The MLP keeps gate, its activation, up and their product.
        elements = 4 * width + 2 * heads * size + 2 * key_heads * size + 4 * inner
        norms = 2 * width * (item if item >= 4 else 4)  # norms are computed in float32
        return cls(
            layers=config.num_hidden_layers,
            inside=item * elements + norms,
            boundary=item * width,
            keys=2 * item * key_heads * size,
            exact_keys=2 * max(item, 4) * key_heads * size,
            checkpointed=checkpointed,
            head=2.0 * logits_budget,
        )

    def graph(self, tokens: int, shared: int = 0) -> float:
        """Bytes of the graph of `tokens` rows that also attend to `shared` kept ones (keys concatenated per layer)."""
        layer = tokens * self.inside + shared * self.keys
        if self.checkpointed:
            return self.layers * tokens * self.boundary + layer
        return self.layers * layer

    def one_pass(self, tree: PackedTree) -> int:
        """Bytes of `model_ranking_loss` and its backward."""
        return int(MARGIN * self.graph(tree.num_tokens) + self.head)

    def two_phase(self, tree: PackedTree, candidates_per_pass: int) -> int:
        """Bytes of `two_phase_ranking_loss`."""
        prompts = [prompt for prompt, _ in _lengths(tree)]
        largest, rows = 0.0, 0
        for prompt, responses in _lengths(tree):
            longest = sum(sorted(responses)[-candidates_per_pass:]) + 1
            largest = max(largest, self.graph(prompt), self.graph(longest, prompt))
            rows = max(rows, prompt, longest)
        kept = self.layers * sum(prompts) * self.keys
        gradients = MARGIN * (largest + kept + self.layers * max(prompts) * self.exact_keys)
        scoring = min(tree.num_tokens, SCORING_ROWS * rows) * self.inside + kept
        return int(max(gradients, scoring) + self.head)


class MemoryMode:
    """Chooses one pass or two phases for every micro-batch, and collects the figures to log.

    Args:
        model: prepared for trees.
        args: the settings.

    Raises:
        ValueError: `memory="two_phase"` with a model that does not support it.
    """

    def __init__(self, model: nn.Module, args: TunaConfig) -> None:
        self._model, self._args = model, args
        self._announced: set[str] = set()
        self._window: list[tuple[int, TwoPhaseOutput]] = []
        was_training = model.training
        model.train()
        reason = why_not_two_phase(model)
        model.train(was_training)
        kwargs: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and kwargs.get("use_reentrant", False):
            reason = reason or "activation checkpointing is reentrant (gradient_checkpointing_kwargs)"
        if args.memory == "two_phase" and reason:
            raise ValueError(f"memory = 'two_phase': {reason}")
        self.estimate: ActivationModel | None = None
        try:
            self.estimate = ActivationModel.of(
                model.config,
                torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else _floating_dtype(model),
                checkpointed=bool(args.gradient_checkpointing),
                logits_budget=default_logits_budget(args.device) if args.logits_budget is None else args.logits_budget,
            )
        except AttributeError as error:
            reason = reason or f"no estimate of the activations: {error}"
        self._possible = not reason
        if args.memory == "auto" and reason:
            logger.info("memory: one pass for micro-batches of any size; %s", reason)

    def wants_two_phase(self, tree: PackedTree, *, states_made: bool) -> bool:
        """Whether this rank prefers to run a micro-batch in two phases.

        Args:
            tree: the micro-batch.
            states_made: the optimizer states are already allocated, so free memory no longer has to hold them.
        """
        mode, free = self._args.memory, None
        if mode == "auto":
            mode = "one_pass"
            if self._possible and self.estimate is not None:
                free = free_bytes(self._args.device) - pending_bytes(self._model, self._args, states_made)
                mode = "two_phase" if self.estimate.one_pass(tree) > free else "one_pass"
        if mode not in self._announced:
            self._announced.add(mode)
            self._announce(mode, tree, free)
        return mode == "two_phase"

    def _announce(self, mode: str, tree: PackedTree, free: int | None) -> None:
        """Log the choice when it is first made."""
        size, model = self._args.candidates_per_pass, self.estimate
        logger.info(
            "memory: %s for a micro-batch of %d packed tokens%s%s",
            mode,
            tree.num_tokens,
            ""
            if model is None
            else f"; activations estimated at {_human(model.one_pass(tree))} in one pass and "
            f"{_human(model.two_phase(tree, size))} in two phases with candidates_per_pass = {size}",
            "" if free is None else f"; {_human(free)} free for them",
        )

    def add(self, tree: PackedTree, output: TwoPhaseOutput) -> None:
        """Add a micro-batch that was run in two phases."""
        self._window.append((tree.num_tokens, output))

    def flush(self) -> dict[str, float]:
        """Figures of this rank since the last flush; empty if everything ran in one pass.

        - `memory/two_phase`: micro-batches run in two phases, `memory/passes`: their gradient passes.
        - `memory/rows_alive`: packed rows of the largest pass; `memory/rows_one_pass`: those of one pass.
        - `memory/shared_bytes`: maximum bytes of keys, values and gradient sums of prompts.
        - `memory/skipped`: candidates skipped because they have no gradient.
        """
        window, self._window = self._window, []
        if not window:
            return {}
        outputs = [output for _, output in window]
        return {
            "memory/two_phase": len(window),
            "memory/passes": sum(output.passes for output in outputs),
            "memory/rows_alive": max(output.rows_alive for output in outputs),
            "memory/rows_one_pass": max(tokens for tokens, _ in window),
            "memory/shared_bytes": max(output.shared_bytes for output in outputs),
            "memory/skipped": sum(output.skipped for output in outputs),
        }


def free_bytes(device: torch.device) -> int:
    """Memory available to activations: on CUDA the free memory and what torch's allocator holds unused; otherwise
    this process's share of the host's available memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pending_bytes(model: nn.Module, args: TunaConfig, states_made: bool) -> int:
    """Bytes of gradients, and before the first step of optimizer states, that this step will allocate.

    Assumes two states of the size of each trained weight: exact for AdamW, too high for optimizers with fewer states.
    DeepSpeed allocates both at its start.
    """
    if args.deepspeed:
        return 0
    pending = 0
    for parameter in model.parameters():
        local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2's shards
        if parameter.requires_grad:
            pending += local.nbytes * ((parameter.grad is None) + 2 * (not states_made))
    return pending


def _lengths(tree: PackedTree) -> Iterator[tuple[int, list[int]]]:
    """Tokens of each group's prompt and responses, from host arrays and one copy from the device."""
    lengths = (tree.candidate_offsets_host[1:] - tree.candidate_offsets_host[:-1]).tolist()
    groups = tree.group_offsets_host.tolist()
    first = tree.rows[tree.candidate_offsets[:-1]]
    prompts = (tree.position_ids[first] + 1).tolist()
    for start, stop in itertools.pairwise(groups):
        yield prompts[start], lengths[start:stop]


def _floating_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _human(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
