"""Lookup of names on the Hugging Face hub without retries: its client retries a wrong name for half a minute."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

__all__ = ["hub_model"]

SECONDS = 5.0


def hub_model(name: str, known: Sequence[str]) -> str:
    """The name to pass to transformers for a model on the hub, or the cached copy if the hub is unreachable.

    Args:
        name: `owner/model`.
        known: names that do not need the hub, for the error.

    Raises:
        FileNotFoundError: no such model on the hub, or the hub is unreachable and there is no cached copy.
        PermissionError: the model requires a licence or a token.
    """
    kept = try_to_load_from_cache(name, "config.json") if name.count("/") <= 1 else None
    copy = Path(kept).parent if isinstance(kept, str) else None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = f"names that do not need the hub: {', '.join(known)}{hint}"
    if "/" not in name and copy is None:
        raise FileNotFoundError(f"no model {name!r}: no such folder, and hub names have the form OWNER/NAME; {names}")
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except GatedRepoError as error:
        raise PermissionError(f"the model {name!r} requires a licence or a token: {_first_line(error)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"no model {name!r} on the hub; {names}") from error
    except Exception as error:  # offline mode, no network, a proxy: the classes differ between client libraries
        if copy is not None:
            return str(copy)
        reason = f"the hub is unreachable ({_first_line(error)})"
        raise FileNotFoundError(f"no model folder {name!r}, and {reason}; {names}") from error
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
