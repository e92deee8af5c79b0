"""``m2f2 demo`` as one process: address, password, model, page, and a clean end."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from m2f2cli.compat import configure_gradio
from m2f2cli.errors import M2F2Error, MissingExtraError, UsageError

if TYPE_CHECKING:
    from m2f2cli.options.explain import ExplainOptions
    from m2f2cli.serving.gate import Uploads

QUEUE = 20  # visitors that wait; more are told to come back
SESSIONS = 64  # visitors whose last answer is kept
CONNECTIONS = 400
_SWEEP = 60.0  # seconds between two looks for forgotten uploads
_LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True)
class Address:
    """Where the page is served, and to whom."""

    host: str = "127.0.0.1"  # a name or an address of this machine
    port: int = 7860  # 0 takes a free one
    # USER:PASS that visitors have to give; None for none, on this computer only.
    auth: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        user, _, password = (self.auth or "").partition(":")
        if self.auth is not None and not (user and password):
            raise UsageError("--auth takes USER:PASS.", "For example: --auth anna:a-long-password")
        if not self.is_local and self.auth is None:
            raise UsageError(
                f"On '{self.host}' others can reach the page, so it needs a password.",
                "Set M2F2_DEMO_AUTH=USER:PASS, add --auth USER:PASS, or leave out --host.",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this computer can reach it."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bind(self) -> socket.socket:
        """Take the address, before anything slow is done.

        Raises:
            M2F2Error: It is taken, or not ours.
        """
        where = f"port {self.port} of '{self.host}'"
        try:
            found = socket.getaddrinfo(
                self.host.strip("[]"), self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, protocol, _, address = found[0]
            bound = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:
            raise M2F2Error(f"There is no host '{self.host}' here.", "Check --host.") from error
        try:
            if os.name == "posix":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()
        except (OSError, OverflowError) as error:
            bound.close()
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                raise M2F2Error(
                    f"Another program uses {where}.",
                    "End it, or choose another port: --port 0 takes a free one.",
                ) from error
            reason = getattr(error, "strerror", None) or str(error)
            raise M2F2Error(
                f"The page cannot be served on {where}: {reason}.", "Check --host and --port."
            ) from error
        return bound


def serve(
    model: str,
    *,
    address: Address,
    options: ExplainOptions,
    ready: Callable[[str], object],
) -> None:
    """Serve the page until the process is told to end; to be called in its main thread.

    Args:
        model: A checkpoint's name, of a detector or an explainer.
        address: Where and to whom.
        options: How to judge and to ask.
        ready: Is told the page's address once it answers.

    Raises:
        M2F2Error: The address is taken, the model is unusable, or a package is missing.
        KeyboardInterrupt: It was ended by Ctrl-C.
    """
    bound = address.bind()
    try:
        if find_spec("gradio") is None:
            raise MissingExtraError("gradio", "demo", "The page")
        from m2f2cli.serving.gate import Uploads

        uploads = Uploads()
        try:
            app = application(model, options=options, address=address, uploads=uploads)
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            server = web_server(app, uploads, lambda: ready(f"http://{shown}:{port}"))
            _end_by_signals(uploads)
            server.run(sockets=[bound])
        finally:
            uploads.close()
    finally:
        bound.close()


def _end_by_signals(uploads: Uploads) -> None:
    """Once the server has stopped it sends the signal that stopped it on, to the handlers set here.

    A background job of a shell ignores Ctrl-C unless it is told not to; and SIGTERM ends a process
    before anything else can delete the uploads.
    """

    def end(number: int, _frame: object) -> None:
        uploads.close()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end)


def application(model: Any, *, options: ExplainOptions, address: Address, uploads: Uploads) -> Any:
    """The page behind its gate, as an ASGI application.

    Args:
        model: A checkpoint's name; or a detector or explainer, loaded.
        options: How to judge and to ask.
        address: To whom it is served; hosts and password are checked.
        uploads: Where files go.

    Raises:
        M2F2Error: The model is unusable.
    """
    configure_gradio(uploads.folder)
    import fastapi
    import gradio as gr

    from m2f2cli.inference.explain import load_pipeline
    from m2f2cli.serving import page
    from m2f2cli.serving.gate import MAX_BYTES, Gate
    from m2f2cli.serving.worker import Service

    pipeline = load_pipeline(model, options)
    blocks = page.build(page.Page(Service(pipeline, uploads)))
    blocks.queue(max_size=QUEUE, default_concurrency_limit=1)
    blocks.state_session_capacity = SESSIONS
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=page.THEME,
        css_paths=[page.ASSETS / "page.css"],
    )
    hosts = (*_LOCAL, address.host) if address.is_local else ()
    takes = {
        str(name): len(function.inputs)
        for number, function in blocks.fns.items()
        for name in (number, function.api_name)
    }
    return Gate(app, uploads=uploads, password=address.auth, hosts=hosts, takes=takes)


def web_server(app: Any, uploads: Uploads, ready: Callable[[], object]) -> Any:
    """A ``uvicorn.Server`` for ``application``; ``run(sockets=[…])`` serves until it is ended.

    ``ready`` is called once requests are answered; uploads nobody asks about are deleted meanwhile.
    """
    import uvicorn

    from m2f2cli.serving.connection import Connection

    async def attended(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return

        async def told(message: Any) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                ready()

        sweeping = asyncio.create_task(_sweep(uploads))
        try:
            await app(scope, receive, told)
        finally:
            sweeping.cancel()

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.ERROR)
    config = uvicorn.Config(
        attended,
        http=Connection,
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=0,
    )
    return uvicorn.Server(config)


async def _sweep(uploads: Uploads) -> None:
    while True:
        uploads.sweep()
        await asyncio.sleep(_SWEEP)
