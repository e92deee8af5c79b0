"""``m2f2 import``."""

from __future__ import annotations

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.checkpoints import ImportOptions

EXAMPLES = {
    "import": (
        "m2f2 import M2F2_Det_densenet121.pth --output detector",
        "m2f2 import detector.pth vision_tower.pth --output detector --verbose",
        "m2f2 import llava-v1.5-7b-M2F2-Det/ --output explainer --verify",
        "m2f2 import llava-v1.5-7b-M2F2-Det/ clip-vit-large-patch14-336/ --output explainer",
        "m2f2 import stage-3-delta/ --output delta-2",
    )
}


@command(ImportOptions)
def import_checkpoint(options: ImportOptions, out: Output) -> None:
    """Turn published weights into a checkpoint folder.

    They are recognised by what they hold, not by their names: the merged explainer (its folder, or
    a file of it), the delta of stage 2 or 3, detector B (.pth of the explainer), detector A (stage
    1), a CLIP vision tower beside one that lacks it. Every key is mapped, folded or dropped for a
    stated reason; an unknown one is an error. Nothing that a pickle names is run.
    """
    from m2f2cli.checkpoints.convert import import_weights

    output = options.result.output
    made = import_weights(
        options.files,
        output,
        clip_config=options.clip_config,
        verify=options.verify,
        overwrite=options.result.overwrite,
        progress=out.progress,
    )
    if out.as_json:
        out.json(made.as_dict())
        return
    if options.verbose:
        out.table(("file", "key", "action", "to or why"), made.listing())
    else:
        out.table(("file", "keys>", "action", "to or why"), made.summary())
    out.text(f"{output}: {made.kind}, {made.parameters:,} parameters, {made.fingerprint}")
    if made.verified is not None:
        out.text(made.verified.sentence() + ".")
    out.note(f"See what it is: m2f2 info {output}")
