"""A real `tuna serve` on loopback, in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from tuna.serve import Engine, create_app
from tuna.serve.connections import BoundedProtocol


@contextmanager
def live_server(
    model: Any, tokenizer: Any, name: str = "tiny", app: dict[str, Any] | None = None, **engine: Any
) -> Iterator[tuple[str, Engine]]:
    """The base URL (with /v1) and the engine of a server that runs until the block ends."""
    running = Engine(model, tokenizer, **engine)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(running, name, default_max_tokens=8, **(app or {})),
                http=BoundedProtocol,
                log_level="warning",
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 60
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", running
        finally:
            server.should_exit = True
            thread.join(30)
            running.close()
