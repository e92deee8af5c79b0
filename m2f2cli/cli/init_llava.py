"""``m2f2 init-llava``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.checkpoints import InitLlavaCommand

if TYPE_CHECKING:
    from m2f2cli.checkpoints.initialize import TowerComparison

EXAMPLES = {
    "init-llava": (
        "m2f2 init-llava --llava llava-hf/llava-1.5-7b-hf --detector detector --output explainer-0",
        "m2f2 init-llava --llava llava-v1.5-7b/ --detector detector --output explainer-0 "
        "--dtype bfloat16",
    )
}


@command(InitLlavaCommand)
def init_llava(options: InitLlavaCommand, out: Output) -> None:
    """Build an explainer from LLaVA-1.5 and a detector (before stage 2).

    The language model and its projector come from the LLaVA, the detector from its folder, and a
    new projector for the detector's answer is drawn from N(0, 0.1). One CLIP tower serves both.
    Tensors are copied one by one, so memory does not grow with the model.
    """
    from m2f2cli.checkpoints.initialize import init_llava as build

    def compared(tower: TowerComparison) -> None:
        (out.warning if tower.state == "differs" else out.note)(tower.sentence())

    output = options.result.output
    made = build(
        options.llava,
        options.detector,
        output,
        options=options.built,
        overwrite=options.result.overwrite,
        compared=compared,
        progress=out.progress,
    )
    if out.as_json:
        out.json({"output": str(output), **made.as_dict()})
        return
    rows = [(part, f"{n:,}", f"{total:,}", types) for part, n, total, types in made.parts()]
    out.table(("part", "tensors>", "parameters>", "types"), rows)
    out.text(f"{output}: {made.parameters:,} parameters, {made.fingerprint}")
