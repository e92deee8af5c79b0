"""Commands that store a threshold in a checkpoint: ``calibrate ddvqa``, ``images``, ``ffpp``."""

from __future__ import annotations

from typing import Any

from m2f2cli.cli.evaluate import as_command, run
from m2f2cli.options.evaluate import (
    EvaluateDdvqaOptions,
    EvaluateFfppOptions,
    EvaluateImagesOptions,
)

EXAMPLES = {
    "calibrate ddvqa": ("m2f2 calibrate ddvqa --data ddvqa/ --split train --model detector/",),
    "calibrate images": ("m2f2 calibrate images faces/ --model detector/ --split validation",),
    "calibrate ffpp": ("m2f2 calibrate ffpp ffpp_h5/ --split validation --model detector/",),
}


def ddvqa(**values: Any) -> None:
    """Calibrate a detector on the crops of DD-VQA.

    Temperature, threshold and uncertain band are fitted to the set and stored in the checkpoint, or
    in a copy of it with --calibrated. Refused on a test set. The set is measured and reported as by
    'm2f2 evaluate'.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateDdvqaOptions, values | {"calibrate": True})


def images(**values: Any) -> None:
    """Calibrate a detector on a folder of real and forged pictures.

    Temperature, threshold and uncertain band are fitted to the set and stored in the checkpoint, or
    in a copy of it with --calibrated. Refused on a test set. The set is measured and reported as by
    'm2f2 evaluate'.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateImagesOptions, values | {"calibrate": True})


def ffpp(**values: Any) -> None:
    """Calibrate a detector on FaceForensics++ videos in HDF5 files.

    Temperature, threshold and uncertain band are fitted to the set and stored in the checkpoint, or
    in a copy of it with --calibrated. Refused on a test set. The set is measured and reported as by
    'm2f2 evaluate'.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateFfppOptions, values | {"calibrate": True})


as_command(ddvqa, EvaluateDdvqaOptions, "calibrate")
as_command(images, EvaluateImagesOptions, "calibrate")
as_command(ffpp, EvaluateFfppOptions, "calibrate")
