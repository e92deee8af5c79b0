"""``m2f2 info``: this installation, or a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.checkpoints import InfoOptions

if TYPE_CHECKING:
    from m2f2cli.checkpoints.inspect import Description

EXAMPLES = {
    "info": (
        "m2f2 info",
        "m2f2 info lite",
        "m2f2 info detector/ --verify",
        "m2f2 info x.pth --json",
    )
}


@command(InfoOptions, quiet=False)
def info(options: InfoOptions, out: Output) -> None:
    """Show versions, devices and extras, or say what a checkpoint is.

    A checkpoint is a folder, a weights file or 'lite': its kind, parts, parameters, stage and
    fingerprint, and what it lacks. Nothing that a pickle names is run.
    """
    if options.checkpoint is None:
        from m2f2cli.environment import describe_environment

        _print_environment(out, describe_environment())
        return
    from m2f2cli.checkpoints.inspect import inspect_checkpoint

    found = inspect_checkpoint(options.checkpoint, verify=options.verify)
    _print_checkpoint(out, found, options.verbose)


def _print_environment(out: Output, found: dict[str, Any]) -> None:
    if out.as_json:
        out.json(found)
        return
    packages = {name: version or "missing" for name, version in found["packages"].items()}
    out.fields({name: found[name] for name in ("m2f2cli", "python", "platform")} | packages)
    if problem := found.get("torch_error"):
        out.warning(problem)
    out.table(
        ("device", "what", "dtypes"),
        [(d["name"], d["description"], ", ".join(d["dtypes"])) for d in found["devices"]],
    )
    out.table(
        ("extra", "present", "packages", "install"),
        [
            (e["name"], "yes" if e["present"] else "no", _listed(e["packages"]), e["install"])
            for e in found["extras"]
        ],
    )


def _listed(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items())


def _print_checkpoint(out: Output, found: Description, verbose: bool) -> None:
    if out.as_json:
        out.json(found.as_dict())
        return
    out.fields(
        {
            "path": found.path,
            "kind": found.kind,
            "files": ", ".join(f"{n} ({size / 1e6:,.1f} MB)" for n, size in found.files.items()),
            "tensors": f"{len(found.tensors):,}",
            "parameters": f"{found.parameters:,}",
            "dtypes": ", ".join(f"{name} ({count})" for name, count in found.dtypes.items()),
            "stage": found.stage.get("stage", "none stored"),
            "fingerprint": found.fingerprint or "none stored",
            **({"license": found.license} if found.license else {}),
            "missing": "; ".join(found.missing) or "nothing",
            **({"notes": "; ".join(found.notes)} if found.notes else {}),
            **({"not run": ", ".join(found.foreign)} if found.foreign else {}),
        }
    )
    if verbose:
        shapes = [(k, str(list(t.shape)), t.dtype) for k, t in sorted(found.tensors.items())]
        out.table(("tensor", "shape", "dtype"), shapes)
    else:
        rows = [(name, f"{tensors:,}", f"{total:,}") for name, tensors, total in found.parts()]
        out.table(("part", "tensors>", "parameters>"), rows)
