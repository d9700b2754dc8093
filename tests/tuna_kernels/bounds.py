"""The error bound every backend is held to: a small multiple of the error plain PyTorch makes in the same type."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 4.0


def assert_as_good_as_reference(
    got: Tensor,
    reference: Tensor,
    truth: Tensor,
    name: str = "",
    *,
    rounded: torch.dtype = torch.float32,
    units: float = 16,
    scale: float = 0.0,
) -> None:
    """``max |got - truth| <= FACTOR * max |reference - truth| + units * eps max(|truth|, scale)``.

    ``truth`` is float64, ``reference`` the reference backend on the very inputs of ``got``. ``rounded``: the type in
    which gradients of logits are multiplied; where that is half precision, one rounding of it comes on top. ``scale``:
    size of the terms that were summed, for drawn cases whose sum may cancel, or on which the reference may be lucky.
    """
    assert got.dtype == reference.dtype and got.shape == truth.shape, name
    if truth.numel() == 0:
        return
    error = (got.double() - truth).abs().max().item()
    own = (reference.double() - truth).abs().max().item()
    limit = FACTOR * own + units * torch.finfo(torch.float32).eps * max(truth.abs().max().item(), scale)
    if rounded != torch.float32:
        limit += torch.finfo(rounded).eps * truth.abs().max().item()
    if got.dtype == torch.float64:
        limit = FACTOR * own + 64 * torch.finfo(torch.float64).eps * truth.abs().max().item()
    assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g} (reference makes {own:.3g})"
