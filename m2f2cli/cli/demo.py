"""``m2f2 demo``."""

from __future__ import annotations

import time

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.demo import DemoOptions

EXAMPLES = {
    "demo": (
        "m2f2 demo",
        "m2f2 demo --model explainer/ --port 8000",
        "M2F2_DEMO_AUTH=anna:a-long-password m2f2 demo --host 0.0.0.0",
    )
}


@command(DemoOptions, json=False, quiet=False)
def demo(options: DemoOptions, printer: Output) -> None:
    """Open a page in the browser: drop a picture, see the verdict, where and why.

    One process for this computer alone; Ctrl-C ends it. With an explainer the page also gives
    reasons and takes questions. Files are deleted once they are answered.
    """
    begin = time.perf_counter()
    from m2f2cli.serving.server import Address, serve

    serve(
        options.model,
        address=Address(options.host, options.port, options.auth),
        options=options.explain,
        ready=lambda url: printer.note(
            f"Ready at {url} after {time.perf_counter() - begin:.1f} s. Ctrl-C ends it."
        ),
    )
