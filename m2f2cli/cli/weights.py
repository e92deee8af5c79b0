"""Commands on checkpoints: ``import``."""

from __future__ import annotations

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import Output

EXAMPLES = {
    "import": (
        "m2f2 import M2F2_Det_densenet121.pth --output detector",
        "m2f2 import detector.pth vision_tower.pth --output detector --verbose",
        "m2f2 import small.pth --clip-config clip/config.json --output small --overwrite",
    )
}


def import_checkpoint(
    files: flags.WeightFiles,
    output: flags.ImportFolder,
    config: flags.Config = None,
    clip_config: flags.ClipConfig = None,
    overwrite: flags.Overwrite = False,
    verbose: flags.Verbose = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Turn published detector files into a checkpoint folder.

    The files are recognised by what they hold, not by their names: detector B (.pth of the
    explainer), detector A (stage 1), a CLIP vision tower beside one that lacks it. Every key is
    mapped, folded or dropped for a stated reason; an unknown one is an error. Nothing that a
    pickle names is run.
    """
    from m2f2cli.models.importing import import_detector

    out = Output(as_json, quiet)
    made = import_detector(files, output, clip_config=clip_config, overwrite=overwrite)
    if as_json:
        out.json(made.as_dict())
        return
    rows = made.listing() if verbose else made.summary()
    out.table(("file", "key", "fate", "to or why") if verbose else _SUMMARY, rows)
    out.text(f"{output}: {made.kind}, {made.parameters:,} parameters, {made.fingerprint}")
    out.note(f"Try it: m2f2 detect PHOTO --model {output}")


_SUMMARY = ("file", "keys>", "fate", "to or why")
