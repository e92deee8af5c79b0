"""``m2f2 merge``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.checkpoints import MergeOptions

if TYPE_CHECKING:
    from m2f2cli.checkpoints.merge import Merge
    from m2f2cli.checkpoints.verify import Proof

EXAMPLES = {
    "merge": (
        "m2f2 merge --base explainer-0 --delta delta-1 --output explainer-1",
        "m2f2 merge --base explainer-1 --delta delta-2 --output explainer --verify",
        "m2f2 merge --base explainer-0 --delta delta-1 --delta delta-2 --output explainer",
        "m2f2 merge --base explainer-1 --delta stage-3-delta/ --output explainer --dry-run",
    )
}


@command(MergeOptions)
def merge(options: MergeOptions, out: Output) -> None:
    """Merge what a stage trained into the checkpoint it was trained on.

    Tensors go from file to file: memory does not grow with the model. Sums are float32, rounded
    once; what no delta touches is copied byte for byte. Every tensor of a delta must have its
    place, and a delta must have been trained on this base. The output folder appears whole or not
    at all; a run that was killed is simply started again.
    """
    from m2f2cli.checkpoints.merge import Merge

    result = options.result
    job = Merge(
        options.base,
        options.delta,
        result.output,
        dtype=options.dtype,
        force=options.force,
        overwrite=result.overwrite,
    )
    if options.dry_run:
        _show_plan(out, job)
        return
    with out.progress("Merging", job.nbytes, in_bytes=True) as advance:
        made = job.write(advance)
    for said in made.stage["forced"]:
        out.warning(f"{said}.")
    proof = _verify(out, job) if options.verify else None
    if out.as_json:
        out.json(made.as_dict() | {"verified": proof.as_dict() if proof else None})
        return
    out.table(_COLUMNS, _rows(made.actions))
    if proof is not None:
        out.text(proof.sentence())
    if made.existed:
        out.note("It was there already, made of the same base and deltas; nothing was written.")
    out.text(f"{result.output}: {made.fingerprint}")


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
