"""Settings of sampling: how a local student responds, and when its responses are too alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuna.gather.diversity import worst_pair
from tuna.gather.responses import Response

if TYPE_CHECKING:
    from tuna.models import decoding

__all__ = ["Diversity", "LocalSampling", "Try"]


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """When to draw again.

    Raises:
        ValueError: a value outside its range.
    """

    alike: float = field(default=0.8, metadata={"help": "Draw again if two responses have this ROUGE-L or more."})
    step: float = field(default=0.1, metadata={"help": "Increase of the temperature with each draw."})
    tries: int = field(default=3, metadata={"help": "Maximum number of draws per prompt."})

    def __post_init__(self) -> None:
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike = {self.alike} must be above 0 and at most 1")
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step = {self.step} must be a finite number above 0")
        if self.tries < 1:
            raise ValueError(f"tries = {self.tries} must be at least 1")

    def settled(self, tries: Sequence[Try]) -> bool:
        """Whether no further try is due."""
        return len(tries) >= self.tries or (bool(tries) and tries[-1].worst < self.alike)

    def temperature(self, first: float, number: int) -> float:
        """Of try ``number``, from 0."""
        return round(first + self.step * number, 6)


@dataclass(frozen=True)
class Try:
    """One draw of an instruction's k responses.

    Attributes:
        responses: the k.
        temperature: it was drawn at.
        worst: ROUGE-L of the two most alike.
    """

    responses: list[Response]
    temperature: float
    worst: float

    @classmethod
    def of(cls, responses: Sequence[Response], temperature: float) -> Try:
        """With `worst` worked out."""
        return cls(list(responses), temperature, worst_pair([response.text for response in responses]))


@dataclass(frozen=True, kw_only=True)
class LocalSampling:
    """How a local student responds.

    The end token counts as one of `max_tokens`; the id of an instruction and `seed` decide its draws.

    Raises:
        ValueError: a value outside its range.
    """

    k: int = field(default=4, metadata={"help": "Responses per prompt."})
    max_tokens: int = field(default=256, metadata={"help": "Maximum length of a response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the first draw."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass of nucleus sampling."})
    seed: int = field(default=0, metadata={"help": "Sampling seed."})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "Text that ends a response; may be repeated."})
    template: str = field(
        default="none", metadata={"help": "Prompt template: none, chat, alpaca or a text with {prompt}."}
    )
    diversity: Diversity = field(default_factory=Diversity)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k = {self.k} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must be at least 0")
        self.drawn_at(self.temperature, ())

    def drawn_at(self, temperature: float, stream: tuple[int, ...]) -> decoding.Sampling:
        """Settings of one row."""
        from tuna.models import decoding

        return decoding.Sampling(
            max_tokens=self.max_tokens,
            temperature=temperature,
            top_p=self.top_p,
            seed=(self.seed, *stream),
            stop=self.stop,
        )
