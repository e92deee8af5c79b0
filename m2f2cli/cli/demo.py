"""The command that opens the page: ``demo``."""

from __future__ import annotations

import time
from typing import Annotated

from m2f2cli.cli import explain_options as asking
from m2f2cli.cli import options as flags
from m2f2cli.cli.infer import band
from m2f2cli.cli.output import Output

EXAMPLES = {
    "demo": (
        "m2f2 demo",
        "m2f2 demo --model explainer/ --port 8000",
        "M2F2_DEMO_AUTH=anna:a-long-password m2f2 demo --host 0.0.0.0",
    )
}
_PAGE = "Page"

PageModel = Annotated[
    str,
    flags.flag(
        "model",
        "The detector or explainer: 'lite' (bundled), a checkpoint folder, or a hub id.",
        short="-m",
        metavar="lite|DIR|HUB-ID",
        rich_help_panel="Model",
    ),
]
Host = Annotated[
    str,
    flags.flag(
        "host",
        "Serve on this address of the machine; any but its own needs --auth.",
        metavar="NAME",
        rich_help_panel=_PAGE,
    ),
]
Port = Annotated[
    int,
    flags.flag("port", "0 takes a free one.", min=0, max=65535, metavar="N", rich_help_panel=_PAGE),
]
Auth = Annotated[
    str | None,
    flags.flag(
        "auth",
        "What visitors have to give. Better in the environment, as M2F2_DEMO_AUTH: others see the "
        "command line.",
        variable="M2F2_DEMO_AUTH",
        metavar="USER:PASS",
        rich_help_panel=_PAGE,
        show_default=False,
    ),
]


def demo(
    config: flags.Config = None,
    model: PageModel = "lite",
    host: Host = "127.0.0.1",
    port: Port = 7860,
    auth: Auth = None,
    frames: flags.Frames = 16,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    quantize: asking.Quantise = None,
    threshold: flags.Threshold = None,
    uncertain: flags.Uncertain = None,
    max_new_tokens: asking.MaxNewTokens = 512,
) -> None:
    """Open a page in the browser: drop a picture, see the verdict, where and why.

    One process for this computer alone; Ctrl-C ends it. With an explainer the page also gives
    reasons and takes questions. Files are deleted once they are answered.
    """
    begin = time.perf_counter()
    from m2f2cli.options.detect import DetectOptions
    from m2f2cli.options.explain import ExplainOptions
    from m2f2cli.serving.server import Address, serve

    judging = DetectOptions(
        frames=frames, threshold=threshold, uncertain=band(uncertain), device=device, dtype=dtype
    )
    serve(
        model,
        address=Address(host, port, auth),
        options=ExplainOptions(judging, max_new_tokens=max_new_tokens, quantize=quantize),
        ready=lambda url: Output().note(
            f"Ready at {url} after {time.perf_counter() - begin:.1f} s. Ctrl-C ends it."
        ),
    )
