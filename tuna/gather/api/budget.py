"""What calls may cost: prices, a bound that holds while calls run side by side, and an estimate before any."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

__all__ = ["Budget", "BudgetSpent", "Prices", "Usage", "estimate_tokens"]


class BudgetSpent(Exception):
    """The next call does not fit the budget. What is done stays done; a rerun with a larger budget goes on."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a call or of many: ``input`` (the prompt) and ``output`` (all its choices)."""

    input: int
    output: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.input + other.input, self.output + other.output)


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, in any one currency.

    Raises:
        ValueError: a price that is negative or not finite.

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
        """What so many tokens cost."""
        return (usage.input * self.input + usage.output * self.output) / 1e6


def estimate_tokens(text: str) -> int:
    """Tokens of a text without its tokenizer: a third of its UTF-8 bytes, on the high side for English."""
    return -(-len(text.encode("utf-8", "replace")) // 3)


class Budget:
    """Calls and cost of a folder over all its runs, kept below their bounds.

    A call reserves its worst case (prompt as estimated, every choice of full length) before it is sent and is
    charged what it used when it is back, so calls in flight together cannot overrun. ``max_calls`` counts calls
    that are or may be billed: an answer of any quality, a cut connection, a timeout. A refusal (429, 500, …) is
    free.

    Args:
        max_calls: most calls, or None.
        max_cost: most cost, in the currency of ``prices``, or None.
        prices: per million tokens; needed for ``max_cost``.
        calls: calls made by earlier runs.
        spent: their tokens.

    Raises:
        ValueError: a bound below 0, or ``max_cost`` without a price.
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
        """Cost of all calls that are back."""
        return self.prices.cost(self.spent)

    async def reserve(self, worst: Usage) -> None:
        """Set the worst case of a call aside; waits while only calls in flight stand in its way.

        Raises:
            BudgetSpent: it does not fit, and no call is in flight that could turn out cheaper.
        """
        while (reason := self._no_room(worst)) is not None:
            if not self._open:
                raise BudgetSpent(reason)
            await self._settled.wait()
        self._open.append(worst)

    def settle(self, worst: Usage, used: Usage | None) -> None:
        """A call that reserved ``worst`` is back: charge ``used``, or nothing where None."""
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
                return f"max_cost = {self.max_cost:g} could be exceeded: {self.cost:.4g} is spent"
        return None
