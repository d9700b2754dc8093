"""An OpenAI-compatible server for one local transformers model: completions, chat, and ranking."""

from tuna.serve.app import create_app
from tuna.serve.engine import Engine

__all__ = ["Engine", "create_app"]
