"""Names on the Hugging Face hub, answered at once: its own client tries a wrong one again for half a minute."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

__all__ = ["hub_model"]

SECONDS = 5.0


def hub_model(name: str, known: Sequence[str]) -> str:
    """What transformers takes for a name on the hub: the name, or where the hub is out of reach, the copy kept here.

    Args:
        name: `owner/model`.
        known: names that need no hub, for the error.

    Raises:
        FileNotFoundError: no such model on the hub, or it is out of reach and no copy is kept.
        PermissionError: a model that asks for a licence or a token first.
    """
    kept = try_to_load_from_cache(name, "config.json") if name.count("/") <= 1 else None
    copy = Path(kept).parent if isinstance(kept, str) else None
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = f"names known without it: {', '.join(known)}{hint}"
    if "/" not in name and copy is None:
        raise FileNotFoundError(f"no model {name!r}: no such folder, and on the hub it is OWNER/{name}; {names}")
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except GatedRepoError as error:
        raise PermissionError(f"the model {name!r} asks for a licence or a token: {_first_line(error)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"no model {name!r} on the hub; {names}") from error
    except Exception as error:  # offline mode, no network, a proxy: each client's library has classes of its own
        if copy is not None:
            return str(copy)
        reason = f"the hub is out of reach ({_first_line(error)})"
        raise FileNotFoundError(f"no model folder {name!r}, and {reason}; {names}") from error
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
