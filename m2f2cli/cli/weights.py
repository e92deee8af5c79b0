"""Commands on checkpoints: ``import`` and ``init-llava``."""

from __future__ import annotations

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import Output

EXAMPLES = {
    "import": (
        "m2f2 import M2F2_Det_densenet121.pth --output detector",
        "m2f2 import detector.pth vision_tower.pth --output detector --verbose",
        "m2f2 import llava-v1.5-7b-M2F2-Det/ --output explainer --verify",
        "m2f2 import llava-v1.5-7b-M2F2-Det/ clip-vit-large-patch14-336/ --output explainer",
        "m2f2 import stage-3-delta/ --output delta-2",
    ),
    "init-llava": (
        "m2f2 init-llava --llava llava-hf/llava-1.5-7b-hf --detector detector --output explainer-0",
        "m2f2 init-llava --llava llava-v1.5-7b/ --detector detector --output explainer-0 "
        "--dtype bfloat16",
    ),
}


def import_checkpoint(
    files: flags.WeightFiles,
    output: flags.ImportFolder,
    config: flags.Config = None,
    clip_config: flags.ClipConfig = None,
    verify: flags.Proof = False,
    overwrite: flags.Overwrite = False,
    verbose: flags.Verbose = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Turn published weights into a checkpoint folder.

    They are recognised by what they hold, not by their names: the merged explainer (its folder, or
    a file of it), the delta of stage 2 or 3, detector B (.pth of the explainer), detector A (stage
    1), a CLIP vision tower beside one that lacks it. Every key is mapped, folded or dropped for a
    stated reason; an unknown one is an error. Nothing that a pickle names is run.
    """
    from m2f2cli.checkpoints.convert import import_weights

    out = Output(as_json, quiet)
    made = import_weights(
        files,
        output,
        clip_config=clip_config,
        verify=verify,
        overwrite=overwrite,
        progress=out.progress,
    )
    if as_json:
        out.json(made.as_dict())
        return
    rows = made.listing() if verbose else made.summary()
    out.table(("file", "key", "action", "to or why") if verbose else _SUMMARY, rows)
    out.text(f"{output}: {made.kind}, {made.parameters:,} parameters, {made.fingerprint}")
    if made.verified is not None:
        out.text(made.verified.sentence() + ".")
    out.note(f"See what it is: m2f2 info {output}")


_SUMMARY = ("file", "keys>", "action", "to or why")


def init_llava(
    llava: flags.LlavaBase,
    detector: flags.DetectorFolder,
    output: flags.ImportFolder,
    config: flags.Config = None,
    dtype: flags.StoredDtype = "auto",
    tower: flags.Tower = "detector",
    seed: flags.ProjectorSeed = 0,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Build an explainer from LLaVA-1.5 and a detector (before stage 2).

    The language model and its projector come from the LLaVA, the detector from its folder, and a
    new projector for the detector's answer is drawn from N(0, 0.1). One CLIP tower serves both.
    Tensors are copied one by one, so memory does not grow with the model.
    """
    from m2f2cli.checkpoints.initialize import InitLlavaOptions, TowerComparison
    from m2f2cli.checkpoints.initialize import init_llava as build

    out = Output(as_json, quiet)

    def compared(tower: TowerComparison) -> None:
        (out.warning if tower.state == "differs" else out.note)(tower.sentence())

    made = build(
        llava,
        detector,
        output,
        options=InitLlavaOptions(dtype=dtype, tower=tower, seed=seed),
        overwrite=overwrite,
        compared=compared,
        progress=out.progress,
    )
    if as_json:
        out.json({"output": str(output), **made.as_dict()})
        return
    rows = [(part, f"{n:,}", f"{total:,}", types) for part, n, total, types in made.parts()]
    out.table(("part", "tensors>", "parameters>", "types"), rows)
    out.text(f"{output}: {made.parameters:,} parameters, {made.fingerprint}")
