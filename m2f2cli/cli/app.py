"""The ``m2f2`` application: the table of commands, and where every error becomes a sentence."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from m2f2cli import __version__
from m2f2cli.cli.flags import Command
from m2f2cli.cli.output import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Output,
    silence,
    stand_in_for_closed_streams,
)
from m2f2cli.compat import leave
from m2f2cli.errors import ConfigError, M2F2Error
from m2f2cli.options.fields import MOVED, RENAMED, renamed
from m2f2cli.runtime import debug


class Entry(NamedTuple):
    """One row of the command table.

    Attributes:
        name: What the user types; ``group command`` for one of a group.
        target: ``module:command``, a ``flags.Command``. The module may have ``EXAMPLES: dict[name,
            tuple of command lines]``.
        panel: The heading it stands under in ``m2f2 --help``.
    """

    name: str
    target: str
    panel: str


COMMANDS = (
    Entry("detect", "m2f2cli.cli.detect:detect", "Judge pictures"),
    Entry("explain", "m2f2cli.cli.explain:explain", "Judge pictures"),
    Entry("demo", "m2f2cli.cli.demo:demo", "Judge pictures"),
    Entry("prepare faces", "m2f2cli.cli.prepare:faces", "Prepare data"),
    Entry("prepare ddvqa", "m2f2cli.cli.prepare:ddvqa", "Prepare data"),
    Entry("evaluate ddvqa", "m2f2cli.cli.evaluate:evaluate_ddvqa", "Measure"),
    Entry("evaluate images", "m2f2cli.cli.evaluate:evaluate_images", "Measure"),
    Entry("evaluate ffpp", "m2f2cli.cli.evaluate:evaluate_ffpp", "Measure"),
    Entry("calibrate ddvqa", "m2f2cli.cli.evaluate:calibrate_ddvqa", "Measure"),
    Entry("calibrate images", "m2f2cli.cli.evaluate:calibrate_images", "Measure"),
    Entry("calibrate ffpp", "m2f2cli.cli.evaluate:calibrate_ffpp", "Measure"),
    Entry("robustness ddvqa", "m2f2cli.cli.evaluate:robustness_ddvqa", "Measure"),
    Entry("robustness images", "m2f2cli.cli.evaluate:robustness_images", "Measure"),
    Entry("robustness ffpp", "m2f2cli.cli.evaluate:robustness_ffpp", "Measure"),
    Entry("evaluate compare", "m2f2cli.cli.evaluate:compare", "Measure"),
    Entry("train-detector", "m2f2cli.cli.train:train_detector", "Train"),
    Entry("align", "m2f2cli.cli.train:align", "Train"),
    Entry("lora", "m2f2cli.cli.train:lora", "Train"),
    Entry("init-llava", "m2f2cli.cli.init_llava:init_llava", "Checkpoints"),
    Entry("merge", "m2f2cli.cli.merge:merge", "Checkpoints"),
    Entry("import", "m2f2cli.cli.import_weights:import_checkpoint", "Checkpoints"),
    Entry("info", "m2f2cli.cli.info:info", "Checkpoints"),
)
# What the groups of commands are for.
GROUPS: dict[str, str] = {
    "calibrate": "Store a threshold in a detector's checkpoint.",
    "robustness": "Measure a detector on corrupted pictures.",
    "evaluate": "Measure answers against the truth, report, gate and compare.",
    "prepare": "Make the files that training and evaluation read.",
}


class _Command(TyperCommand):
    """A command that refuses environment variables of options that have another name now."""

    def invoke(self, ctx: Any) -> Any:
        known = {name.removeprefix("--") for p in self.params for name in p.opts}
        for old in RENAMED:
            variable, new = _variable(old), renamed(old, known)
            if new and variable in os.environ:
                raise ConfigError(f"'{variable}' is now '{_variable(new)}'.", f"Unset {variable}.")
        return super().invoke(ctx)


def _variable(option: str) -> str:
    return "M2F2_" + option.upper().replace("-", "_")


def build(name: str | None = None) -> typer.Typer:
    """Attach the commands of the table to a new application. Imports no torch.

    Args:
        name: What stands after ``m2f2``: a command or group is attached alone, with its flags; for
            any other word all are, without flags, as help and suggestions need them. None attaches
            all with their flags.
    """
    named = [entry for entry in COMMANDS if entry.name.split()[0] == name]
    app = typer.Typer(
        name="m2f2",
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True, help=_paragraphs(_root.__doc__))(_root)
    homes = {"": app}
    for entry in named or COMMANDS:
        group, _, last = entry.name.rpartition(" ")
        if group not in homes:
            homes[group] = typer.Typer(rich_markup_mode="rich")
            homes[group].callback(invoke_without_command=True)(_group)
            app.add_typer(homes[group], name=group, rich_help_panel=entry.panel, help=GROUPS[group])
        module_name, attribute = entry.target.split(":")
        module = import_module(module_name)
        examples = getattr(module, "EXAMPLES", {}).get(entry.name, ())
        command: Command = getattr(module, attribute)
        homes[group].command(
            last,
            cls=_Command,
            rich_help_panel=None if group else entry.panel,
            help=_paragraphs(command.body.__doc__),
            epilog=_epilog(examples),
        )(command.callback() if named or name is None else lambda: None)
    return app


def _paragraphs(docstring: str | None) -> str:
    """A docstring as help text: lines joined to paragraphs, brackets kept from being markup."""
    blocks = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks).replace("[", "\\[")


def _epilog(examples: Sequence[str]) -> str | None:
    if not examples:
        return None
    lines = "\n\n".join("  " + line.replace("[", "\\[") for line in examples)
    return f"[bold]Examples[/bold]\n\n{lines}"


def _version(wanted: bool) -> None:
    if wanted:
        Output().text(f"m2f2 {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            *("--version", "-V"),
            callback=_version,
            is_eager=True,
            metavar="",
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Tell whether a face picture is forged, show where, and say why.

    A flag can also be given as M2F2_<FLAG> in the environment or in a --config FILE.yaml:
    flags win over the environment, the environment over the file.
    """
    _group(context)


def _group(context: typer.Context) -> None:
    """Show the help where no command is named."""
    if context.invoked_subcommand is None:
        Output().text(context.get_help())


def run(arguments: Sequence[str], *, app: typer.Typer | None = None) -> int:
    """Run one command line and return its exit code; nothing is raised, whatever happens.

    Args:
        arguments: What stands after ``m2f2``.
        app: The application; the whole of ``COMMANDS`` by default.

    Returns:
        0 done, 1 failed, 2 wrong usage, 3 finished but some items failed, 4 a gate tripped, 130
        interrupted.
    """
    try:
        chosen = app or build(arguments[0] if arguments else "")
        code = chosen(list(arguments), prog_name="m2f2", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    except BrokenPipeError:
        silence(sys.stdout)
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - every error becomes a sentence
        if debug():
            import traceback

            traceback.print_exc()
        return _explain(error, arguments)
    if code == EXIT_INTERRUPTED:
        Output().error("Interrupted.")
    return code if isinstance(code, int) else 0


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    output = Output()
    if isinstance(error, M2F2Error):
        output.error(error.message, error.hint)
        return error.exit_code
    if hasattr(error, "format_message"):  # the command line's own parser
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "m2f2"
        hint = _new_name(error) or _file_like_a_flag(arguments) or f"See '{where} --help'."
        output.error(str(error.format_message()), hint)
        return EXIT_USAGE
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        output.error("There is not enough memory.", "End other programs, or do less at a time.")
        return EXIT_FAILED
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing '{error.filename}'" if error.filename else ""
        output.error(f"The disk is full{where}.", "Free some space and run the command again.")
        return EXIT_FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f"'{error.filename}': " if error.filename else ""
        no_place = "usable temporary directory" in error.strerror
        output.error(
            "There is no folder for temporary files." if no_place else f"{where}{error.strerror}.",
            "Set TMPDIR to a folder that may be written." if no_place else None,
        )
        return EXIT_FAILED
    sentence = " ".join(str(error).split()) or "no further words"
    output.error(
        f"Unexpected {type(error).__name__}: {sentence[:300]}",
        "A bug, or a broken installation: M2F2_DEBUG=1 before the command shows the traceback.",
    )
    return EXIT_FAILED


def _new_name(error: Any) -> str | None:
    """The hint for a flag that has another name now."""
    context, old = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None or old is None:
        return None
    if old.removeprefix("--") in MOVED:
        return f"'{old}' is now '{MOVED[old.removeprefix('--')]}'."
    known = {name.removeprefix("--") for p in context.command.params for name in p.opts}
    new = renamed(old.removeprefix("--"), known)
    return f"'{old}' is now '--{new}'." if new else None


def _file_like_a_flag(arguments: Sequence[str]) -> str | None:
    """The hint for a file whose name begins like a flag."""
    for word in arguments:
        if word.startswith("-") and (os.path.lexists(word) or os.path.splitext(word)[1]):
            return f"If '{word}' is a file, write './{word}', or '--' before it."
    return None


def main() -> None:
    """Entry point of the ``m2f2`` script."""
    stand_in_for_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # OpenMP threads that spin while they wait steal the processor from the decoding threads and
    # from everybody else: on a busy machine sleeping ones halve the time. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not debug():  # Pillow's and torch's remarks are not for users
        warnings.simplefilter("ignore")
    code = run(sys.argv[1:])
    others = [t for t in threading.enumerate() if t is not threading.main_thread()]
    done = all(thread.daemon for thread in others)
    # An interrupt waits neither for pictures that are being decoded nor for torch's own end.
    if code == EXIT_INTERRUPTED or ("torch" in sys.modules and done):
        leave(code)
    sys.exit(code)
