"""Commands that judge corrupted pictures: ``robustness ddvqa``, ``images``, ``ffpp``."""

from __future__ import annotations

from typing import Any

from m2f2cli.cli.evaluate import as_command, run
from m2f2cli.options.evaluate import (
    EvaluateDdvqaOptions,
    EvaluateFfppOptions,
    EvaluateImagesOptions,
)

EXAMPLES = {
    "robustness ddvqa": ("m2f2 robustness ddvqa --data ddvqa/ --robustness-dir sweep/",),
    "robustness images": ("m2f2 robustness images faces/ --model detector/ --report report/",),
    "robustness ffpp": ("m2f2 robustness ffpp ffpp_h5/ --model detector/ --report report/",),
}


def ddvqa(**values: Any) -> None:
    """Judge the crops of DD-VQA, corrupted.

    JPEG, blur, noise, scaling and brightness, each from mild to severe. The untouched set is
    measured and reported as by 'm2f2 evaluate'; the sweep's records, plot and table are resumable.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateDdvqaOptions, values | {"robustness": True})


def images(**values: Any) -> None:
    """Judge a folder of real and forged pictures, corrupted.

    JPEG, blur, noise, scaling and brightness, each from mild to severe. The untouched set is
    measured and reported as by 'm2f2 evaluate'; the sweep's records, plot and table are resumable.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateImagesOptions, values | {"robustness": True})


def ffpp(**values: Any) -> None:
    """Judge FaceForensics++ videos in HDF5 files, corrupted.

    JPEG, blur, noise, scaling and brightness, each from mild to severe. The untouched set is
    measured and reported as by 'm2f2 evaluate'; the sweep's records, plot and table are resumable.

    Exit codes: 0 done, 3 some items have no answer, 4 a gate tripped.
    """
    run(EvaluateFfppOptions, values | {"robustness": True})


as_command(ddvqa, EvaluateDdvqaOptions, "robustness")
as_command(images, EvaluateImagesOptions, "robustness")
as_command(ffpp, EvaluateFfppOptions, "robustness")
