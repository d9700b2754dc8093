"""Settings of an endpoint: address, key, timeouts and retries."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tuna.gather.api.keys import Redactor, api_key

__all__ = ["EndpointSettings", "address_of"]


@dataclass(frozen=True)
class EndpointSettings:
    """Address, key, timeouts and retries of an endpoint. The key itself is in no field, file or log.

    White space around `base_url`, a trailing slash and the path of a request (`/chat/completions`) are removed.

    Raises:
        ValueError: a value outside its range, an invalid base URL or one with credentials, or an invalid key.
    """

    base_url: str = field(
        default="https://api.openai.com/v1", metadata={"help": "Base URL of the endpoint, including its version."}
    )
    key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable that holds the API key; local servers need none."},
    )
    requests_per_minute: float | None = field(
        default=None, metadata={"help": "Maximum number of requests per minute, evenly spaced."}
    )
    request_timeout: float = field(default=120.0, metadata={"help": "Timeout of one attempt, in seconds."})
    total_timeout: float = field(
        default=900.0, metadata={"help": "Timeout of a call with all its attempts and waits, in seconds."}
    )
    max_attempts: int = field(default=6, metadata={"help": "Maximum number of attempts per call."})
    backoff: float = field(
        default=1.0, metadata={"help": "Wait before the second attempt, in seconds; doubles with each attempt."}
    )
    max_backoff: float = field(
        default=60.0, metadata={"help": "Maximum back-off, in seconds; a Retry-After header may ask for more."}
    )

    def __post_init__(self) -> None:
        key = api_key(self.key_variable)
        object.__setattr__(self, "base_url", address_of(self.base_url, self.key_variable, Redactor(key)))
        for name in ("request_timeout", "total_timeout", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value} must be above 0")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts = {self.max_attempts} must be at least 1")
        if not (self.backoff >= 0 and self.max_backoff >= 0):
            raise ValueError(f"backoff = {self.backoff} and max_backoff = {self.max_backoff} must be at least 0")


def address_of(base_url: str, key_variable: str, redactor: Redactor) -> str:
    """Normalise a base URL: without white space around it, a trailing slash, or a request's path.

    Raises:
        ValueError: not an http or https address, or one with credentials, a query or a fragment.
    """
    url = base_url.strip().rstrip("/")
    for path in ("/chat/completions", "/completions"):
        url = url.removesuffix(path).rstrip("/")
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(f"base_url must not have credentials, query or fragment; put the key into ${key_variable}")
    shown = f"base_url = {redactor.text(url)!r}"
    if any(char.isspace() or not char.isprintable() for char in url):
        raise ValueError(f"{shown} contains a space, a line break or a control character")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:  # a port of letters, an incomplete IPv6 address
        raise ValueError(f"{shown} is not a valid address: {error}") from None
    if not good:
        hint = "" if "//" in url or not url else f"; did you mean http://{redactor.text(url)}?"
        raise ValueError(f"{shown} is not an http or https address{hint}")
    return url
