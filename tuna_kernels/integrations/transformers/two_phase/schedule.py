"""The passes of the two-phase loss, in order: which candidates are scored together, then which share a backward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tuna_kernels.integrations.transformers.ranking_model import Carrier, ModelRequest
from tuna_kernels.integrations.transformers.shared_keys import PromptKeys
from tuna_kernels.integrations.transformers.two_phase.passes import Layout, TreeGroups, dummy_layout, prompt_layout
from tuna_kernels.integrations.transformers.two_phase.requests import BranchPass, KeepPass, PromptPass
from tuna_kernels.tree import PackedTree

__all__ = ["Schedule", "Scoring"]


class Scoring:
    """The passes without a graph: a single one if the tree has at most `most_rows` rows, else group by group the
    prompt, then as many candidates at a time as fit."""

    def __init__(self, tree: PackedTree, groups: TreeGroups, backend: str, most_rows: int) -> None:
        self._groups, self._slots, self._backend = groups, tree.num_slots, backend
        self._chunks: list[list[list[int]]] = []
        self.prompts: list[PromptKeys] = []
        self.passes = 1
        if tree.num_tokens > most_rows:
            self._chunks = [groups.chunks(g, most_rows) for g in range(len(groups))]
            self.passes = sum(len(chunks) + (len(groups.prompt(g)) > 1) for g, chunks in enumerate(self._chunks))

    def run(self, carry: Carrier, passes: int) -> Tensor:
        """The log-probabilities [M] of all slots; stores the prompts' keys in `prompts`."""
        logprobs: Tensor | None = None
        for request in self.requests(passes):
            (found,) = carry(request)
            if logprobs is None:
                logprobs = found.new_empty(self._slots)
            slots = request.layout.slots.to(found.device)
            logprobs[slots] = found[: len(slots)]  # the slot of a prompt pass is not in the tree
        assert logprobs is not None
        return logprobs

    def requests(self, passes: int) -> Iterator[KeepPass | BranchPass]:
        """All passes in order, padded to `passes` with dummies. Each must run before the next is requested."""
        groups = self._groups
        if not self._chunks:
            # every pass recomputes the last prompt token: its keys are not shared
            bounds = [(start, stop - 1) for start, stop in groups.prompt_rows]
            yield (whole := KeepPass(groups.whole(), bounds, self._backend))
            self.prompts = whole.prompts
        for g, chunks in enumerate(self._chunks):
            keys = PromptKeys()
            if (shared := len(groups.prompt(g)) - 1) > 0:
                yield (alone := KeepPass(prompt_layout(groups.prompt(g)), [(0, shared)], self._backend))
                keys = alone.prompts[0]
            self.prompts.append(keys)
            for chunk in chunks:
                yield BranchPass(groups.branches(g, chunk), keys, None, self._backend)
        for _ in range(self.passes, passes):
            yield KeepPass(dummy_layout(groups.prompt(0), groups.response(0)), [], self._backend)


class Schedule:
    """The gradient passes of a tree, group by group: its candidates, then its prompt."""

    def __init__(self, groups: TreeGroups, taken: list[bool], candidates_per_pass: int) -> None:
        self._groups = groups
        self._chunks: list[list[list[int]]] = []
        self.passes = self.rows_alive = self.shared_bytes = 0
        for g in range(len(groups)):
            members = [c for c in groups.candidates(g) if taken[c]]
            chunks = [members[i : i + candidates_per_pass] for i in range(0, len(members), candidates_per_pass)]
            self._chunks.append(chunks)
            self.passes += len(chunks) + bool(chunks and len(groups.prompt(g)) > 1)

    def requests(
        self, prompts: list[PromptKeys], grad_logprobs: Tensor, backend: str, passes: int
    ) -> Iterator[ModelRequest]:
        """All passes in order, padded to `passes` with dummies; a group's shared keys are freed after its passes."""
        self._count(prompts)
        for g, chunks in enumerate(self._chunks):
            keys = prompts[g]
            for chunk in chunks:
                layout = self._alive(self._groups.branches(g, chunk))
                yield BranchPass(layout, keys, grad_logprobs[layout.slots.to(grad_logprobs.device)], backend)
            self._count(prompts)
            keys.kept.clear()
            if chunks and len(self._groups.prompt(g)) > 1:
                yield PromptPass(self._alive(prompt_layout(self._groups.prompt(g))), keys, backend)
        dummy = dummy_layout(self._groups.prompt(0), self._groups.response(0))
        for _ in range(self.passes, passes):
            yield PromptPass(self._alive(dummy), PromptKeys(), backend)

    def _alive(self, layout: Layout) -> Layout:
        self.rows_alive = max(self.rows_alive, len(layout.input_ids))
        return layout

    def _count(self, prompts: list[PromptKeys]) -> None:
        self.shared_bytes = max(self.shared_bytes, sum(keys.nbytes() for keys in prompts))
