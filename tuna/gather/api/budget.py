"""Cost of calls: prices, a budget that holds with concurrent calls, and estimates in advance."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

__all__ = ["Budget", "BudgetSpent", "Prices", "Usage", "estimate_tokens"]


class BudgetSpent(Exception):
    """The next call exceeds the budget. Completed calls are kept; a rerun with a larger budget continues."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one or more calls: `input` (prompts) and `output` (all choices)."""

    input: int
    output: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input + other.input, self.output + other.output)


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any currency.

    Raises:
        ValueError: a negative or non-finite price.

    Examples:
        >>> Prices(input=2.0, output=8.0).cost(Usage(500_000, 250_000))
        3.0
    """

    input: float = field(default=0.0, metadata={"help": "Price per million prompt tokens, in any currency."})
    output: float = field(default=0.0, metadata={"help": "Price per million response tokens, in the same currency."})

    def __post_init__(self) -> None:
        for name, price in (("price_input", self.input), ("price_output", self.output)):
            if not 0 <= price < float("inf"):
                raise ValueError(f"{name} = {price} must be a finite number, at least 0")

    def cost(self, usage: Usage) -> float:
        """The cost of `usage`."""
        return (usage.input * self.input + usage.output * self.output) / 1e6


def estimate_tokens(text: str) -> int:
    """Estimated tokens of a text without its tokenizer: a third of its UTF-8 bytes, which is high for English."""
    return -(-len(text.encode("utf-8", "replace")) // 3)


class Budget:
    """Limits calls and cost of a folder over all its runs.

    A call reserves its worst case (estimated prompt, every choice of full length) before it is sent and is charged its
    actual usage when it returns, so concurrent calls cannot exceed the limits. `max_calls` counts calls that are or may
    be billed: an answer of any quality, a broken connection, a timeout. A refusal (429, 500, …) is free.

    Args:
        max_calls: maximum number of calls, or None.
        max_cost: maximum cost, in the currency of `prices`, or None.
        prices: per million tokens; needed for `max_cost`.
        calls: calls made by earlier runs.
        spent: their tokens.

    Raises:
        ValueError: a limit below 0, or `max_cost` without prices.
    """

    def __init__(
        self,
        max_calls: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
        *,
        calls: int = 0,
        spent: Usage | None = None,
    ) -> None:
        self.prices = prices or Prices()
        for name, bound in (("max_calls", max_calls), ("max_cost", max_cost)):
            if bound is not None and not bound >= 0:
                raise ValueError(f"{name} = {bound} must be at least 0")
        if max_cost is not None and self.prices == Prices():
            raise ValueError(f"max_cost = {max_cost} needs prices: price_input and price_output per million tokens")
        self.max_calls, self.max_cost = max_calls, max_cost
        self.calls, self.spent = calls, spent or Usage(0, 0)
        self._open: list[Usage] = []
        self._settled = asyncio.Event()

    @property
    def cost(self) -> float:
        """Cost of all returned calls."""
        return self.prices.cost(self.spent)

    async def reserve(self, worst: Usage) -> None:
        """Reserve the worst case of a call; waits while calls in flight may still free enough of the budget.

        Raises:
            BudgetSpent: it exceeds the budget, and no call in flight could turn out cheaper.
        """
        while (reason := self._no_room(worst)) is not None:
            if not self._open:
                raise BudgetSpent(reason)
            await self._settled.wait()
        self._open.append(worst)

    def settle(self, worst: Usage, used: Usage | None) -> None:
        """Settle a returned call that reserved `worst`: charge `used`, or nothing if None."""
        self._open.remove(worst)
        if used is not None:
            self.calls += 1
            self.spent = self.spent + used
        settled, self._settled = self._settled, asyncio.Event()
        settled.set()

    def _no_room(self, worst: Usage) -> str | None:
        if self.max_calls is not None and self.calls + len(self._open) >= self.max_calls:
            return f"max_calls = {self.max_calls} is reached"
        if self.max_cost is not None:
            cost = self.cost + sum(map(self.prices.cost, self._open)) + self.prices.cost(worst)
            if cost > self.max_cost:
                return f"max_cost = {self.max_cost:g} could be exceeded: {self.cost:.4g} spent so far"
        return None
