"""The command ``merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from m2f2cli.cli import options as flags
from m2f2cli.cli.output import Output

if TYPE_CHECKING:
    from m2f2cli.checkpoints.merge import Merge
    from m2f2cli.checkpoints.verify import Proof

EXAMPLES = {
    "merge": (
        "m2f2 merge --base explainer-0 --delta delta-1 --output explainer-1",
        "m2f2 merge --base explainer-1 --delta delta-2 --output explainer --verify",
        "m2f2 merge --base explainer-0 --delta delta-1 --delta delta-2 --output explainer",
        "m2f2 merge --base explainer-1 --delta stage-3-delta/ --output explainer --dry-run",
    ),
}
_INPUT, _RESULT = "Input", "Result"
Base = Annotated[
    Path,
    flags.flag("base", "Checkpoint to merge into.", metavar="DIR", rich_help_panel=_INPUT),
]
Deltas = Annotated[
    list[Path],
    flags.flag(
        "delta",
        "What a stage trained: a delta of align or lora, a PEFT adapter or a published delta "
        "folder. Several are applied in order.",
        metavar="DIR",
        rich_help_panel=_INPUT,
    ),
]
Force = Annotated[
    bool,
    flags.flag(
        "force",
        "Merge a delta that was trained on another base, or that updates frozen modules; "
        "stage.json records it.",
        switch=True,
        rich_help_panel=_INPUT,
    ),
]
Dtype = Annotated[
    str,
    flags.flag(
        "dtype",
        "Type to store all but the detector in; auto keeps each tensor's.",
        metavar="auto|float32|bfloat16|float16",
        rich_help_panel=_RESULT,
    ),
]
Verify = Annotated[
    bool,
    flags.flag(
        "verify",
        "Compare what was written with base and delta kept apart, on probe inputs.",
        switch=True,
        rich_help_panel=_RESULT,
    ),
]
DryRun = Annotated[
    bool,
    flags.flag(
        "dry-run",
        "Check everything and print the plan; write nothing.",
        switch=True,
        rich_help_panel=_RESULT,
    ),
]


def merge(
    base: Base,
    delta: Deltas,
    output: flags.ImportFolder,
    config: flags.Config = None,
    dtype: Dtype = "auto",
    force: Force = False,
    verify: Verify = False,
    dry_run: DryRun = False,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
) -> None:
    """Merge what a stage trained into the checkpoint it was trained on.

    Tensors go from file to file: memory does not grow with the model. Sums are float32, rounded
    once; what no delta touches is copied byte for byte. Every tensor of a delta must have its
    place, and a delta must have been trained on this base. The output folder appears whole or not
    at all; a run that was killed is simply started again.
    """
    from m2f2cli.checkpoints.merge import Merge

    out = Output(as_json, quiet)
    job = Merge(base, delta, output, dtype=dtype, force=force, overwrite=overwrite)
    if dry_run:
        _show_plan(out, job)
        return
    with out.progress("Merging", job.nbytes, in_bytes=True) as advance:
        made = job.write(advance)
    for said in made.stage["forced"]:
        out.warning(f"{said}.")
    proof = _verify(out, job) if verify else None
    if as_json:
        out.json(made.as_dict() | {"verified": proof.as_dict() if proof else None})
        return
    out.table(_COLUMNS, _rows(made.actions))
    if proof is not None:
        out.text(proof.sentence())
    if made.existed:
        out.note("It was there already, made of the same base and deltas; nothing was written.")
    out.text(f"{output}: {made.fingerprint}")


_COLUMNS = ("tensors are", "tensors>", "parameters>", "size>")


def _rows(actions: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    return [
        (a["action"], f"{a['tensors']:,}", f"{a['parameters']:,}", f"{a['bytes'] / 1e6:,.1f} MB")
        for a in actions
    ]


def _show_plan(out: Output, job: Merge) -> None:
    plan = job.plan()
    if out.as_json:
        out.json(plan)
        return
    out.table(_COLUMNS, _rows(plan["actions"]))
    for tensor in plan["tensors"]:
        out.note(f"{tensor['action']}: {tensor['name']} {tensor['shape']} {tensor['dtype']}")
    if plan["left_out"]:
        out.text(f"{len(plan['left_out'])} updates change nothing and are left out.")
    for said in plan["forced"]:
        out.warning(f"{said}.")
    gb = {name: plan[name] / 1e9 for name in ("bytes", "free_bytes", "peak_memory_bytes")}
    out.text(
        f"{plan['output']}: {gb['bytes']:.2f} GB to write, {gb['free_bytes']:.1f} GB free; peak "
        f"memory about {gb['peak_memory_bytes']:.2f} GB. Nothing was written."
    )


def _verify(out: Output, job: Merge) -> Proof:
    from m2f2cli.checkpoints.verify import prove

    with out.progress("Verifying", None) as advance:
        return prove(job, advance)
