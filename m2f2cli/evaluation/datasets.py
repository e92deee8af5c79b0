"""What ``m2f2 evaluate`` knows of each data set: the pictures to judge, and what is true of them.

torch is never imported here: a model's answers are evaluated without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from m2f2cli.data.samples import SampleSet
from m2f2cli.errors import UsageError
from m2f2cli.evaluation.predictions import Predictions
from m2f2cli.evaluation.truth import Truth, ddvqa_truth, file_truth, frames_truth
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.evaluate import (
    EvaluateDdvqaOptions,
    EvaluateFfppOptions,
    EvaluateImagesOptions,
    EvaluateOptions,
)


class DataSet(Protocol):
    """What an evaluation asks of its data."""

    def samples(self) -> SampleSet:
        """The pictures or videos, for a model to judge."""

    def truth(self, predictions: Predictions | None, detect: DetectOptions) -> Truth:
        """What is true; ``predictions`` are None before a model has judged."""


class Ddvqa:
    """DD-VQA: crops, annotations, questions.

    Args:
        options: See ``options``.

    Raises:
        UsageError: Neither answers nor data are named.
    """

    def __init__(self, options: EvaluateDdvqaOptions) -> None:
        self._data, self._file = options.data, options.answers.truth
        named = self._file or self._data.data
        # The published figures take the labels from the paths of the answers.
        as_published = options.protocol.protocol == "paper" and not named
        self._from_names = self._data.truth_from_names or as_published
        if options.answers.predictions is None and self._data.data is None:
            raise UsageError(
                "There is nothing to measure.",
                "Add --predictions FILE.jsonl, or --data DIR for a model to judge.",
            )

    def samples(self) -> SampleSet:
        """The crops of the split."""
        from m2f2cli.data.readers.ddvqa import read_ddvqa

        folder = Path(self._data.data or "")
        crops = folder / "images" / "c40" / self._data.split
        return read_ddvqa(crops if crops.is_dir() else folder)

    def truth(self, predictions: Predictions | None, detect: DetectOptions) -> Truth:
        """From ``--truth``, else the annotations, else, when asked, from file names."""
        return ddvqa_truth(
            task=predictions.task if predictions else "scores",
            file=self._file,
            data=self._data.data,
            predictions=predictions,
            from_names=self._from_names,
            split=self._data.split,
        )


class Images:
    """A folder of labelled pictures.

    Args:
        options: See ``options``.

    Raises:
        UsageError: The folder is not named and needed.
    """

    def __init__(self, options: EvaluateImagesOptions) -> None:
        self._data, self._file = options.data, options.answers.truth
        self._model = options.model.model
        if self._data.folder is None and not (self._file and options.answers.predictions):
            raise UsageError(
                "The folder of pictures is missing.",
                "m2f2 evaluate images DIR; or name both --predictions and --truth.",
            )

    def samples(self) -> SampleSet:
        """The pictures of the split."""
        from m2f2cli.evaluation.runs import read_split

        folder, split = Path(self._data.folder or ""), self._data.split
        if split not in ("train", "validation"):
            return read_split(folder, split)
        from m2f2cli.checkpoints.hub import resolve_checkpoint

        return read_split(folder, split, model=resolve_checkpoint(self._model))

    def truth(self, predictions: Predictions | None, detect: DetectOptions) -> Truth:
        """From ``--truth``, else from the folder."""
        from m2f2cli.evaluation.runs import truth_of

        if self._file is not None:
            return file_truth(self._file, dataset="images", split=self._data.split)
        return truth_of(self.samples(), detect, self._data.split)


class Ffpp:
    """FaceForensics++ in HDF5 files, or a published CSV of frames.

    Args:
        options: See ``options``.

    Raises:
        UsageError: Neither answers nor data are named.
    """

    def __init__(self, options: EvaluateFfppOptions) -> None:
        self._data, self._file = options.data, options.answers.truth
        if options.answers.predictions is None and self._data.folder is None:
            raise UsageError("The folder of HDF5 files is missing.", "m2f2 evaluate ffpp DIR")

    def samples(self) -> SampleSet:
        """The videos of the split."""
        from m2f2cli.data.readers.ffpp import read_ffpp

        return read_ffpp(
            Path(self._data.folder or ""),
            compression=self._data.compression,
            manipulations=self._data.manipulations,
            split=self._data.split,
            splits=self._data.splits,
        )

    def truth(self, predictions: Predictions | None, detect: DetectOptions) -> Truth:
        """From ``--truth``, else from the folder, else from the CSV of frames itself."""
        from m2f2cli.evaluation.runs import truth_of

        if self._file is not None:
            return file_truth(self._file, dataset="ffpp", split=self._data.split)
        if self._data.folder is not None:
            return truth_of(self.samples(), detect, self._data.split)
        if predictions is not None and predictions.layout == "frames":
            return frames_truth(predictions)
        raise UsageError(
            "Nothing was named that says which frames are real.",
            "Add the folder of HDF5 files, or --truth FILE.jsonl.",
        )


def data_of(options: EvaluateOptions) -> DataSet:
    """The data set that options are for."""
    kinds: dict[type[EvaluateOptions], Any] = {
        EvaluateDdvqaOptions: Ddvqa,
        EvaluateImagesOptions: Images,
        EvaluateFfppOptions: Ffpp,
    }
    found: DataSet = kinds[type(options)](options)
    return found
