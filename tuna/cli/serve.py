"""`tuna serve`."""

from __future__ import annotations

import gc
import ipaddress
import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuna.cli.options import Device, Dtype, Model, Threads, at_least

if TYPE_CHECKING:
    from tuna.serve import Engine

__all__ = ["serve"]

GRACE_SECONDS = 3  # for answers under way when the server is told to end


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; set a key before listening to others.")
    ] = "127.0.0.1",
    port: Annotated[int, at_least(0, "Port to listen on; 0 picks a free one and prints it.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name of the server besides localhost; may be repeated.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TUNA_API_KEY", help="Key that requests must carry; other users can see a command line."),
    ] = None,
    max_body: Annotated[float, typer.Option(help="Maximum size of a request, in MiB.")] = 4.0,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests, if not that of --model.")] = None,
    batch: Annotated[
        int,
        at_least(1, "Maximum number of responses per batch; 1 makes a seed reproduce its bits."),
    ] = 16,
    batch_tokens: Annotated[
        int,
        at_least(1, "Maximum number of padded tokens per batch, which bounds the cache."),
    ] = 32768,
    max_waiting: Annotated[
        int,
        at_least(1, "Maximum number of waiting responses; more are refused with status 429."),
    ] = 1024,
    default_max_tokens: Annotated[
        int,
        at_least(1, "Maximum length of a chat response if the request sets none, in tokens."),
    ] = 512,
    threads: Threads = None,
    dtype: Dtype = "float32",
    device: Device = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log requests.")] = False,
    with_stdin: Annotated[
        bool, typer.Option("--with-stdin", help="Stop when standard input ends, as it does when the parent exits.")
    ] = False,
) -> None:
    """Serve a local model through the OpenAI API: completions, chat, and POST /v1/rank."""
    import socket

    import torch
    import uvicorn
    from transformers.utils.logging import disable_progress_bar

    from tuna.console.terminal import complain, say
    from tuna.data.templates import DEFAULT, saved_template
    from tuna.models.loading import load_model, place_for
    from tuna.serve import Engine, create_app
    from tuna.serve.access import check_key, host_name
    from tuna.serve.connections import BoundedProtocol, Server
    from tuna_kernels.integrations.transformers import prepare_model

    disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    place = place_for(device)
    family, address = _address(host)
    hosts = [*(allow_host or ()), *([] if address else [host])]
    for option in hosts:
        host_name(option)
    if api_key is not None:
        check_key(api_key)
    if not 0 < max_body <= 1024:
        raise ValueError(f"max_body = {max_body} must be above 0 and at most 1024 MiB")
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))  # before the model loads: a port that is taken is known at once
        except (OSError, OverflowError) as error:
            raise ValueError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', error)}") from error
        network, tokenizer = load_model(model, dtype=getattr(torch, dtype))
        torch.nn.Module.to(network, place)
        prepare_model(network)
        engine = Engine(network, tokenizer, max_rows=batch, max_tokens=batch_tokens, max_waiting=max_waiting)
        app = create_app(
            engine,
            name or model,
            default_max_tokens=default_max_tokens,
            template=saved_template(model) or DEFAULT,
            hosts=hosts,
            api_key=api_key,
            max_body=int(max_body * (1 << 20)),
        )
        listener.listen(128)
        say(f"{name or model} at http://{_in_url(host, address)}:{listener.getsockname()[1]}/v1")
        if api_key is None and not (address and address.is_loopback):
            complain(f"warning: without --api-key, anyone who can reach {host} can use this server")
        config = uvicorn.Config(
            app,
            log_level="warning" if quiet else "info",
            access_log=not quiet,
            http=BoundedProtocol,
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        server = Server(config)
        if with_stdin:
            threading.Thread(target=_stop_with_stdin, args=(server,), daemon=True).start()
        gc.freeze()  # what is loaded stays: collections, which stop all threads, need not walk it
        try:
            server.run(sockets=[listener])
            code = 0
        except KeyboardInterrupt:  # raised again by uvicorn when it has shut down
            code = 130
        _end(engine, code)


def _end(engine: Engine, code: int) -> None:
    """Leave now: a thread in the midst of a long step, or of a long prompt, would be waited for."""
    engine.close(timeout=1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _address(host: str) -> tuple[int, Any]:
    """The kind of socket for a host, and its address; None for a name."""
    import socket

    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return socket.AF_INET, None
    return (socket.AF_INET6 if address.version == 6 else socket.AF_INET), address


def _in_url(host: str, address: Any) -> str:
    """How clients on this machine write the host: an unspecified address is none to ask."""
    if address is None:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host


def _stop_with_stdin(server: Any) -> None:
    while sys.stdin.buffer.read(1024):
        pass
    server.should_exit = True
