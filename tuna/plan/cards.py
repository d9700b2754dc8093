"""Memory and speed of GPUs, from public data sheets.

Memory is as reported by the driver (`nvidia-smi`, with ECC on if that is the default), which may be less than the
nominal size: a "24 GB" card has 24 GiB, an "80 GB" A100 has 80 GiB less 0.7 for ECC and page tables, a "192 GB" B200
has 179 GiB. Matrix products are dense (no sparsity), with float32 accumulation. `link` is one direction between two
GPUs of a node: NVLink if the card has it, else PCIe. `pcie` is one direction between host and card.

Sources (NVIDIA): V100 data sheet (2020); A100 data sheet (2021); H100 SXM data sheet; DGX B200 data sheet (per
GPU, half of the sparse figure); RTX A6000 and L40S data sheets; GA102, Ada and RTX Blackwell architecture white
papers (GeForce: tensor FP16 with FP32 accumulate, which GeForce cards run at half the rate).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CARDS", "Card", "find_card"]


@dataclass(frozen=True)
class Card:
    """A GPU model.

    Attributes:
        name: the name used here; label: the name with its nominal memory.
        memory_gib: GiB reported by the driver.
        half_tflops: dense matrix products in bfloat16 (float16 on cards without it), 1e12 FLOP/s.
        float32_tflops: float32 products: TF32 if the card has it, else plain float32.
        memory_gbs: memory bandwidth, 1e9 B/s.
        pcie_gbs, link_gbs: bandwidth to the host and to another GPU; one direction, 1e9 B/s.
        bfloat16: whether it supports bfloat16.
    """

    name: str
    label: str
    memory_gib: float
    half_tflops: float
    float32_tflops: float
    memory_gbs: float
    pcie_gbs: float
    link_gbs: float
    bfloat16: bool = True

    @property
    def memory(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * 2**30)


_TABLE = (
    Card("rtx3090", "24 GB RTX 3090", 24.0, 71.0, 35.6, 936, 32, 32),
    Card("rtx4090", "24 GB RTX 4090", 24.0, 165.2, 82.6, 1008, 32, 32),
    Card("v100", "32 GB V100", 31.7, 125.0, 15.7, 900, 16, 150, bfloat16=False),
    Card("rtx5090", "32 GB RTX 5090", 31.8, 209.5, 104.8, 1792, 64, 64),
    Card("a100-40", "40 GB A100", 39.5, 312.0, 156.0, 1555, 32, 300),
    Card("a6000", "48 GB RTX A6000", 47.5, 154.8, 77.4, 768, 32, 56),
    Card("l40s", "48 GB L40S", 44.5, 362.0, 183.0, 864, 32, 32),
    Card("a100-80", "80 GB A100", 79.3, 312.0, 156.0, 2039, 32, 300),
    Card("h100-80", "80 GB H100", 79.2, 989.0, 494.0, 3350, 64, 450),
    Card("b200-192", "192 GB B200", 178.4, 2250.0, 1125.0, 8000, 64, 900),
)

CARDS: dict[str, Card] = {card.name: card for card in _TABLE}


# Words around the model in a card's trade name and in `nvidia-smi`.
MAKERS_WORDS = frozenset(
    ["nvidia", "geforce", "quadro", "tesla", "rtx", "gpu", "gb", "gib", "g", "pcie", "ada", "generation"]
)
MAKERS_WORDS |= {f"{word}{number}" for word in ("sxm", "hbm") for number in ("", "2", "3", "4", "5", "2e", "3e")}


def find_card(name: str) -> Card:
    """Find a card by its name in the table, its number, or the driver's name; case-insensitive.

    Raises:
        ValueError: not in the table, or several cards that differ in memory.

    Examples:
        >>> find_card("A100-80").memory_gbs, find_card("4090").name, find_card("NVIDIA A100-SXM4-40GB").name
        (2039, 'rtx4090', 'a100-40')
    """
    if (card := CARDS.get(name.lower())) is not None:
        return card
    words = set(re.findall(r"[a-z]*[0-9]+[a-z]?(?![a-z0-9])|[a-z]+[0-9]*|[0-9]+", name.lower())) - MAKERS_WORDS
    found = [card for card in CARDS.values() if words and words <= _words(card) and words & _models(card)]
    if len(found) == 1:
        return found[0]
    known = found or CARDS.values()
    raise ValueError(f"gpu = {name!r} is not one of {', '.join(card.name for card in known)}")


def _models(card: Card) -> set[str]:
    model = card.name.partition("-")[0]
    return {model, model.removeprefix("rtx")}


def _words(card: Card) -> set[str]:
    size = card.label.split()[0]
    return _models(card) | {size, f"{size}g", f"{size}gb", f"{size}gib"}
