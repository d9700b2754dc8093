"""The text of an endpoint's error, extracted from its answer, and a remedy if one is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tuna.gather.api.bodies import UnusableAnswer, parse_json
from tuna.gather.api.keys import NO_KEY, api_key
from tuna.gather.api.settings import EndpointSettings

__all__ = ["error_message", "error_words", "needs_key", "remedy"]

_MARKUP = re.compile(r"<[^<>]*>")
_CONTEXT = re.compile(r"context.?length|context window|maximum context|too long|too many tokens", re.IGNORECASE)
_MAX_TOKENS = re.compile(r"max_tokens\W.{0,60}(?:not supported|unsupported|max_completion_tokens)", re.IGNORECASE)
_DEFAULT_ONLY = re.compile(
    r"\b(temperature|top_p|seed|stop|logprobs|n)\W.{0,80}(?:not support|unsupported)", re.IGNORECASE
)
_FIELDS = "temperature|top_p|seed|stop|logprobs|top_logprobs|response_format|max_tokens|n"
_UNKNOWN_FIELD = re.compile(
    rf"\b(?:unknown|unrecogni[sz]ed|unexpected|extra|additional|not permitted|not allowed)\b.{{0,80}}?\b({_FIELDS})\b|"
    rf"\b({_FIELDS})\b\W.{{0,60}}\b(?:unknown|unrecogni[sz]ed|unexpected|extra fields?|not permitted|not allowed)\b",
    re.IGNORECASE,
)
_MODEL = re.compile(r"\bmodel\b", re.IGNORECASE)


def needs_key(settings: EndpointSettings) -> str | None:
    """Why no call can succeed without a key, None if a call may."""
    host = urlsplit(settings.base_url).hostname or ""
    if api_key(settings.key_variable) != NO_KEY or not host.endswith(("api.openai.com", "openrouter.ai")):
        return None
    return f"{host} needs a key, and ${settings.key_variable} is not set; set it, or give --base-url"


def error_words(content: bytes) -> str:
    """The text of an error: message and code of a JSON object in any common format, else the raw text."""
    try:
        value = parse_json(content, unique=False)
    except UnusableAnswer:
        return _MARKUP.sub(" ", content.decode("utf-8", "replace")[:2000]).strip() or "no words"
    found = error_message(value)
    return found or content.decode("utf-8", "replace")[:2000]


def error_message(value: Any, depth: int = 0) -> str:
    """The error message in a JSON value, "" if there is none."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, (error_message(item, depth + 1) for item in value[:3])))
    if not isinstance(value, Mapping):
        return ""
    for name in ("error", "message", "msg", "detail", "errors"):
        words = error_message(value.get(name), depth + 1)
        if words:
            place = value.get("loc")  # FastAPI's: ["body", "n"]
            if isinstance(place, list) and place and all(isinstance(part, str | int) for part in place[:8]):
                words = f"{'.'.join(map(str, place[:8]))}: {words}"
            code = value.get("code") if isinstance(value.get("code"), str) else value.get("type")
            return f"{words} ({code})" if isinstance(code, str) and name == "message" else words
    return ""


def remedy(status: int, words: str, url: str, settings: EndpointSettings) -> str:
    """What to try, "" if there is no advice."""
    if status == 401:
        if api_key(settings.key_variable) == NO_KEY:
            return f"${settings.key_variable} is not set; set it, or name another variable with --api-key-env"
        return f"Check the key in ${settings.key_variable}, and that it is for this address"
    if status == 402 or "insufficient_quota" in words:
        return "The account has no credit left"
    if status in (404, 405):
        asked = f"The request went to {url}"
        if _MODEL.search(words):
            return f"{asked}; check --model"
        if not re.search(r"/v\d", urlsplit(url).path):
            return f"{asked}; most base URLs end in /v1: --base-url {settings.base_url}/v1"
        return f"{asked}; check --base-url (most end in /v1) and --api"
    if status not in (400, 413, 422):
        return ""
    if _MAX_TOKENS.search(words):
        return """Try --extra '{"max_tokens": null, "max_completion_tokens": 512}'"""
    if _CONTEXT.search(words):
        return "Shorten the prompt or lower --max-tokens"
    if (found := _DEFAULT_ONLY.search(words)) is not None:
        name = found[1].lower()
        return f"""Try --extra '{{"{name}": {1 if name == "n" else "null"}}}'"""
    if (unknown := _UNKNOWN_FIELD.search(words)) is not None:
        return f"""Try --extra '{{"{(unknown[1] or unknown[2]).lower()}": null}}'"""
    return ""
