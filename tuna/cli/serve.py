"""`tuna serve`."""

from __future__ import annotations

import sys
import threading
from typing import Annotated, Any, Literal

import typer

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Option(help="smollm2-135m, tiny, a folder, or a name on the hub.")],
    host: Annotated[str, typer.Option(help="Address to listen on. There is no access control.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one and prints it.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model. Default: as --model.")] = None,
    batch: Annotated[int, typer.Option(help="Most answers computed together. 1: a seed gives the same bits.")] = 16,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch, padded: bounds the cache.")] = 32768,
    max_waiting: Annotated[int, typer.Option(help="Most answers that wait; more get status 429.")] = 1024,
    default_max_tokens: Annotated[int, typer.Option(help="Longest chat answer where a request names none.")] = 512,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: as torch sees fit.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    device: Annotated[str | None, typer.Option(help="As torch names it. Default: a GPU if there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
    with_stdin: Annotated[
        bool, typer.Option("--with-stdin", help="Stop when the standard input ends: when the parent is gone.")
    ] = False,
) -> None:
    """Serve a local model by the OpenAI API: completions, chat, and POST /v1/rank."""
    import socket

    import torch
    import uvicorn
    from transformers.utils.logging import disable_progress_bar

    from tuna.cli.terminal import say
    from tuna.models import load_model
    from tuna.serve import Engine, create_app
    from tuna.templates import DEFAULT, saved_template
    from tuna_kernels.integrations.transformers import prepare_model

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads = {threads} must be at least 1")
        torch.set_num_threads(threads)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))  # before the model loads: a port that is taken is known at once
        except OSError as error:
            raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        network, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        torch.nn.Module.to(network, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        prepare_model(network)
        engine = Engine(network, tokenizer, max_rows=batch, max_tokens=batch_tokens, max_waiting=max_waiting)
        app = create_app(
            engine, name or model, default_max_tokens=default_max_tokens, template=saved_template(model) or DEFAULT
        )
        listener.listen(128)
        say(f"{name or model} at http://{host}:{listener.getsockname()[1]}/v1")
        config = uvicorn.Config(app, log_level="warning" if quiet else "info", access_log=not quiet)
        server = uvicorn.Server(config)
        if with_stdin:
            threading.Thread(target=_stop_with_stdin, args=(server,), daemon=True).start()
        server.run(sockets=[listener])


def _stop_with_stdin(server: Any) -> None:
    while sys.stdin.buffer.read(1024):
        pass
    server.should_exit = True
