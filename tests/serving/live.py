"""The page, really served, in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from m2f2cli.options.explain import ExplainOptions
from m2f2cli.serving.gate import Uploads
from m2f2cli.serving.server import Address, application, web_server


@contextmanager
def served(
    model: Any,
    uploads: Uploads,
    options: ExplainOptions,
    auth: str | None = None,
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """The address of a page about a model, for as long as the block lasts.

    Whatever ``host`` it is made for, only this computer can reach it.
    """
    address = Address(host, port=0, auth=auth)
    app = application(model, options=options, address=address, uploads=uploads)
    bound = Address(port=0).bind()
    ready = threading.Event()
    server = web_server(app, uploads, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        bound.close()
    assert not thread.is_alive()
