"""One ``m2f2 evaluate``: answers and truth brought together, measured, and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from m2f2cli.errors import UsageError
from m2f2cli.evaluation import report as reports
from m2f2cli.evaluation.datasets import data_of
from m2f2cli.evaluation.predictions import read_predictions
from m2f2cli.evaluation.protocols import Measures, paper, standard
from m2f2cli.evaluation.truth import Joined, Truth, join
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.evaluate import EvaluateOptions

if TYPE_CHECKING:
    from m2f2cli.evaluation.robustness import Sweep

RECORDS, SWEEP = "predictions.jsonl", "robustness"
Advance = Callable[[], object]


class Evaluation(NamedTuple):
    """What came of an evaluation.

    Attributes:
        report: Of ``report.build_report``.
        scored: The joined items.
        calibration: What was learnt and stored, in words; empty unless asked for.
        sweep: The figures of corrupted pictures; None unless asked for.
    """

    report: dict[str, Any]
    scored: Joined
    calibration: tuple[str, ...] = ()
    sweep: Sweep | None = None

    @property
    def unanswered(self) -> int:
        """Items without an answer: missing from the predictions, or not to be judged."""
        return len(self.scored.missing) + int(self.report["counts"].get("failed", 0))


def evaluate(options: EvaluateOptions, advance: Advance | None = None) -> Evaluation:
    """Judge a data set if need be, measure the answers, and write the report.

    Args:
        options: Those of a data set: ``EvaluateImagesOptions`` and its like.
        advance: Called after each picture that was judged.

    Raises:
        M2F2Error: Something named is missing or broken, or a file cannot be written.
    """
    return Evaluator(options).run(advance)


class Evaluator:
    """Everything that one evaluation does. What the options name is looked at before any work.

    Args:
        options: Those of a data set: ``EvaluateImagesOptions`` and its like.

    Attributes:
        steps: How many pictures are to be judged; 0 with predictions.

    Raises:
        M2F2Error: Something named is missing or broken, or the report's extra is not installed.
    """

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options
        self.steps = 0
        self._render: Callable[..., str] | None = None
        if options.results.report is not None:
            from m2f2cli.evaluation.page import render_page

            reports.check_folder(options.results.report)
            self._render = render_page
        model = options.model
        self._detect = DetectOptions(
            faces=model.faces,
            batch_size=model.batch_size,
            frames=getattr(options.data, "frames", 1),
            device=model.device,
            dtype=model.dtype,
        )
        self._data = data_of(options)
        self._truth: Truth | None = None
        if options.answers.predictions is None:
            self._prepare_run()

    def _prepare_run(self) -> None:
        from m2f2cli.evaluation.runs import count_items, is_test_set

        output = self.options.model.output
        if output is not None and output.suffix.lower() != ".jsonl":
            raise UsageError(f"--output must end in .jsonl, not '{output.name}'.")
        truth = self._truth = self._data.truth(None, self._detect)
        self._samples = self._data.samples()
        self.steps = count_items(self._samples, self._detect)
        if self.options.calibration.calibrate:
            from m2f2cli.evaluation.calibrate import check_calibration

            check_calibration(
                self.options.model.model,
                "test" if is_test_set(self._samples) else truth.split,
                output=self.options.calibration.calibrated,
                overwrite=self.options.model.overwrite,
            )
        if self.options.robustness.robustness:
            from m2f2cli.evaluation.robustness import SweepOptions, count_records

            chosen = self.options.protocol
            self._sweep = SweepOptions(
                split=truth.split, resamples=chosen.resamples, seed=chosen.seed
            )
            self.steps += count_records(self._samples, self._sweep, self._detect)

    def run(self, advance: Advance | None = None) -> Evaluation:
        """Judge if need be, measure, and write the report.

        Args:
            advance: Called after each picture that was judged.

        Raises:
            M2F2Error: Predictions and truth do not fit, or a file cannot be written.
        """
        with self._answers(advance) as file:
            predictions = read_predictions(file)
            truth = self._truth or self._data.truth(predictions, self._detect)
            scored = join(truth, predictions)
            report = reports.build_report(scored, self._measure(scored), predictions=file)
        if file != self._kept():
            report["predictions"]["file"] = None
        folder = self.options.results.report
        if folder is not None and self._render is not None:
            reports.write_report(folder, report, scored, self._render(report, scored))
        learnt = self._calibrate(scored) if self.options.calibration.calibrate else ()
        swept = self._run_sweep(advance) if self.options.robustness.robustness else None
        return Evaluation(report, scored, learnt, swept)

    def _kept(self) -> Path | None:
        """The file of answers that stays after the run; None for a passing one."""
        named = self.options.answers.predictions or self.options.model.output
        folder = self.options.results.report
        return named or (None if folder is None else folder / RECORDS)

    @contextmanager
    def _answers(self, advance: Advance | None) -> Iterator[Path]:
        """The file of answers, made by the model unless there is one."""
        if self.options.answers.predictions is not None:
            yield self.options.answers.predictions
        elif (kept := self._kept()) is not None:
            yield self._judge(kept, advance)
        else:
            with TemporaryDirectory(prefix="m2f2-") as folder:
                yield self._judge(Path(folder) / RECORDS, advance)

    def _judge(self, output: Path, advance: Advance | None) -> Path:
        from m2f2cli.evaluation.runs import score_set

        score_set(
            self._samples,
            model=self.options.model.model,
            output=output,
            options=self._detect,
            overwrite=self.options.model.overwrite,
            advance=advance,
        )
        return output

    def _measure(self, scored: Joined) -> Measures:
        chosen = self.options.protocol
        if chosen.protocol == "paper":
            return paper(scored)
        return standard(scored, resamples=chosen.resamples, seed=chosen.seed)

    def _calibrate(self, scored: Joined) -> tuple[str, ...]:
        from m2f2cli.evaluation.calibrate import calibrate

        chosen = self.options.calibration
        found = calibrate(
            self.options.model.model,
            scored,
            target_fpr=chosen.target_fpr,
            output=chosen.calibrated,
            overwrite=self.options.model.overwrite,
            seed=self.options.protocol.seed,
        )
        return found.sentences()

    def _run_sweep(self, advance: Advance | None) -> Sweep:
        from m2f2cli.evaluation.robustness import sweep

        folder = self.options.robustness.robustness_dir
        return sweep(
            self._samples,
            model=self.options.model.model,
            folder=folder or Path(self.options.results.report or "") / SWEEP,
            options=self._sweep,
            detect=self._detect,
            advance=advance,
        )
