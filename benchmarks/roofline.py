"""The least time an operation can take on a card: by its arithmetic, and by the memory it must touch once.

Peak figures are those of the vendor's data sheets, dense (no sparsity): NVIDIA A100 80GB SXM, H100 SXM, B200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Peak rates: bfloat16 tensor-core FLOP/s and bytes/s of its memory."""

    name: str
    flops: float
    bandwidth: float


CARDS = (Card("A100", 312e12, 2.039e12), Card("H100", 989e12, 3.35e12), Card("B200", 2250e12, 8.0e12))


@dataclass(frozen=True)
class Work:
    """What an operation does at one shape: floating-point operations, and bytes read and written at least once."""

    name: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def seconds(self, card: Card) -> float:
        """max(arithmetic, traffic)."""
        return max(self.flops / card.flops, self.bytes / card.bandwidth)


def head(rows: int, width: int, vocab: int, *, slab: int = 8192) -> list[Work]:
    """The LM head with bfloat16 inputs: forward alone, and recompute backward by slabs of `slab` columns.

    Forward: one product, hidden and weight read once, three float32 numbers a row and split. Backward: three products;
    weight read twice (logits again, and for dX), dW written once, dX (float32) read and written at every slab, the
    dlogits slab written once and read twice.
    """
    product = 2.0 * rows * width * vocab
    hidden, weight, slabs = 2.0 * rows * width, 2.0 * vocab * width, -(-vocab // slab)
    name = f"N {rows}, D {width}, V {vocab}"
    backward = 2 * weight + weight + slabs * (hidden * 2 + 8.0 * rows * width) + 3 * 2.0 * rows * vocab
    return [
        Work(f"head forward, {name}", product, hidden + weight + 12.0 * rows),
        Work(f"head backward, {name}", 3 * product, backward),
    ]


def attention(prompt: int, response: int, k: int, heads: int, size: int) -> list[Work]:
    """Tree attention of one group, bfloat16: pairs of rows that see each other, q, k, v and out once."""
    tokens = prompt + k * response
    pairs = prompt * prompt / 2 + k * (prompt * response + response * response / 2)
    moved = 2.0 * 4 * tokens * heads * size
    name = f"P {prompt}, R {response}, k {k}, {heads} heads of {size}"
    flops = 4.0 * pairs * heads * size
    return [
        Work(f"tree attention forward, {name}", flops, moved),
        Work(f"tree attention backward, {name}", 2.5 * flops, 2 * moved),
    ]


WORKS = (
    *head(2560, 4096, 32000),
    *head(8192, 4096, 32000),
    *head(2560, 4096, 128256),
    *head(8192, 4096, 128256),
    *attention(512, 512, 5, 32, 128),
    *attention(2048, 512, 16, 32, 128),
)


def roofline_rows() -> list[list[str]]:
    """Header and rows: FLOP per byte, and milliseconds with what limits on each card."""
    rows = [["operation", "TFLOP", "FLOP/byte", *(f"{card.name} ms" for card in CARDS)]]
    for work in WORKS:
        cells = [work.name, f"{work.flops / 1e12:.2f}", f"{work.intensity:.0f}"]
        for card in CARDS:
            limit = "arithmetic" if work.flops / card.flops >= work.bytes / card.bandwidth else "memory"
            cells.append(f"{work.seconds(card) * 1e3:.2f} ({limit})")
        rows.append(cells)
    return rows
