"""The options of ``m2f2 demo``."""

from __future__ import annotations

from dataclasses import dataclass

from m2f2cli.options.explain import ExplainOptions
from m2f2cli.options.fields import Options, group, option


@dataclass(frozen=True)
class DemoOptions(Options):
    """Every option of ``m2f2 demo``."""

    model: str = option(
        "lite",
        "The detector or explainer: 'lite' (bundled), a checkpoint folder, or a hub id.",
        short="-m",
        group="Model",
        metavar="lite|DIR|HUB-ID",
    )
    host: str = option(
        "127.0.0.1",
        "Serve on this address of the machine; any but its own needs --auth.",
        group="Page",
    )
    port: int = option(7860, "0 takes a free one.", low=0, high=65535, group="Page")
    auth: str | None = option(
        None,
        "What visitors have to give. Better in the environment, as M2F2_DEMO_AUTH: others see the "
        "command line.",
        group="Page",
        metavar="USER:PASS",
        variable="M2F2_DEMO_AUTH",
        secret=True,
    )
    explain: ExplainOptions = group(
        ExplainOptions,
        *("frames", "device", "dtype", "quantize", "threshold", "uncertain", "max_new_tokens"),
    )
