"""Settings of sampling: from a local student, and when its responses are too similar."""

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
    """When to sample again.

    Raises:
        ValueError: a value outside its range.
    """

    alike: float = field(default=0.8, metadata={"help": "Sample again if two responses have at least this ROUGE-L."})
    step: float = field(default=0.1, metadata={"help": "Increase of the temperature with each try."})
    tries: int = field(default=3, metadata={"help": "Maximum number of tries per prompt, the first included."})

    def __post_init__(self) -> None:
        if not 0 < self.alike <= 1:
            raise ValueError(f"alike = {self.alike} must be above 0 and at most 1")
        if not 0 < self.step < float("inf"):
            raise ValueError(f"step = {self.step} must be a finite number above 0")
        if self.tries < 1:
            raise ValueError(f"tries = {self.tries} must be at least 1")

    def settled(self, tries: Sequence[Try]) -> bool:
        """Whether no further try is needed."""
        return len(tries) >= self.tries or (bool(tries) and tries[-1].worst < self.alike)

    def temperature(self, first: float, number: int) -> float:
        """The temperature of try `number`, from 0."""
        return round(first + self.step * number, 6)


@dataclass(frozen=True)
class Try:
    """One try: k responses to an instruction.

    Attributes:
        responses: k responses.
        temperature: the sampling temperature.
        worst: ROUGE-L of the two most similar.
    """

    responses: list[Response]
    temperature: float
    worst: float

    @classmethod
    def of(cls, responses: Sequence[Response], temperature: float) -> Try:
        """Compute `worst`."""
        return cls(list(responses), temperature, worst_pair([response.text for response in responses]))


@dataclass(frozen=True, kw_only=True)
class LocalSampling:
    """Sampling from a local student.

    The end token counts as one of `max_tokens`; responses depend on `seed` and the id of the instruction.

    Raises:
        ValueError: a value outside its range.
    """

    k: int = field(default=4, metadata={"help": "Responses per prompt."})
    max_tokens: int = field(default=256, metadata={"help": "Maximum length of a response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the first try."})
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

    def drawn_at(self, temperature: float, stream: tuple[int, ...]) -> decoding.Decoding:
        """Settings of one row."""
        from tuna.models import decoding

        return decoding.Decoding(
            max_tokens=self.max_tokens,
            temperature=temperature,
            top_p=self.top_p,
            seed=(self.seed, *stream),
            stop=self.stop,
        )
