"""One ``m2f2 explain`` over files: explain what has no record yet, and keep the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from m2f2cli.errors import UsageError
from m2f2cli.inference.explain import explain_settings, explain_sources
from m2f2cli.inference.explain_asker import Asker, Loaded
from m2f2cli.inference.explain_interviews import Heard
from m2f2cli.inference.job import Tally, record_new, refuse_input
from m2f2cli.inference.recordfile import EXPLANATIONS, Layout, RecordFile
from m2f2cli.inference.sources import expand
from m2f2cli.options.explain import ExplainOptions
from m2f2cli.records import Explanation


class ExplainJob:
    """Everything one run of ``explain`` over files does, as an iterator of records.

    Args:
        paths: See ``sources.expand``.
        options: How to ask.
        model: A checkpoint's name, or an explainer with its processor.
        recursive: Enter sub-folders.
        output: A ``.jsonl`` file, which is resumed; or None.
        overwrite: Replace ``output`` instead.

    Attributes:
        sources: Every item.
        tally: What came out so far.

    Raises:
        M2F2Error: Nothing to explain, or ``output`` cannot be used.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        options: ExplainOptions,
        model: str | Loaded,
        recursive: bool = False,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.sources = expand(paths, recursive=recursive)
        self.options = options
        self.model = model
        self.tally = Tally()
        self._log: RecordFile | None = None
        if output is not None:
            refuse_input(output, self.sources)
            self._log = open_records(output, overwrite=overwrite, layout=EXPLANATIONS)

    def run(self, hear: Callable[[Heard], object] | None = None) -> Iterator[Explanation]:
        """Explain, record and yield every item that had no record yet, in order.

        Args:
            hear: Is told the words of each answer as they are written.
        """
        with ExitStack() as stack:
            if self._log is not None:
                stack.enter_context(self._log)
            yield from record_new(
                self.sources,
                run=lambda left: explain_sources(
                    left, model=self.model, options=self.options, hear=hear
                ),
                settings=lambda: explain_settings(self.model, Asker(self.model, self.options)),
                log=self._log,
                tally=self.tally,
            )


def open_records(output: Path, *, overwrite: bool, layout: Layout) -> RecordFile:
    """The file that answers go to.

    Raises:
        UsageError: It is no ``.jsonl`` file, or holds something else.
        M2F2Error: It cannot be opened.
    """
    if output.suffix.lower() != ".jsonl":
        raise UsageError(
            f"--output must end in .jsonl, not '{output.name}'.",
            "For example: --output explained.jsonl",
        )
    return RecordFile(output, overwrite=overwrite, layout=layout)
