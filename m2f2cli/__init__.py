"""m2f2: tells whether a face picture is forged, shows where and says why.

Everything below is public and follows semantic versioning. A name loads what it needs on first use,
so ``import m2f2cli`` stays cheap: it imports neither torch nor NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from m2f2cli.checkpoints.convert import import_weights
    from m2f2cli.checkpoints.initialize import init_llava
    from m2f2cli.checkpoints.load import load_detector, load_explainer
    from m2f2cli.checkpoints.merge import merge
    from m2f2cli.evaluation.calibrate import calibrate
    from m2f2cli.evaluation.evaluate import evaluate
    from m2f2cli.evaluation.robustness import robustness
    from m2f2cli.inference.explain import explain
    from m2f2cli.inference.pipeline import detect
    from m2f2cli.models.detector import Detector, DetectorConfig
    from m2f2cli.models.explainer import Explainer, ExplainerConfig
    from m2f2cli.options.checkpoints import InitLlavaOptions
    from m2f2cli.options.detect import DetectOptions
    from m2f2cli.options.evaluate import (
        CalibrateOptions,
        DdvqaData,
        EvaluateOptions,
        FfppData,
        ImagesData,
        RobustnessOptions,
    )
    from m2f2cli.options.explain import ExplainOptions
    from m2f2cli.options.train_detector import TrainDetectorOptions
    from m2f2cli.options.train_explainer import AlignOptions, LoraOptions
    from m2f2cli.training.detector import train_detector
    from m2f2cli.training.explainer import align, lora

__all__ = [
    "AlignOptions",
    "CalibrateOptions",
    "DdvqaData",
    "DetectOptions",
    "Detector",
    "DetectorConfig",
    "EvaluateOptions",
    "ExplainOptions",
    "Explainer",
    "ExplainerConfig",
    "FfppData",
    "ImagesData",
    "InitLlavaOptions",
    "LoraOptions",
    "RobustnessOptions",
    "TrainDetectorOptions",
    "__version__",
    "align",
    "calibrate",
    "detect",
    "evaluate",
    "explain",
    "import_weights",
    "init_llava",
    "load_detector",
    "load_explainer",
    "lora",
    "merge",
    "robustness",
    "train_detector",
]
_MODULES = {
    "AlignOptions": "options.train_explainer",
    "CalibrateOptions": "options.evaluate",
    "DdvqaData": "options.evaluate",
    "DetectOptions": "options.detect",
    "Detector": "models.detector",
    "DetectorConfig": "models.detector",
    "EvaluateOptions": "options.evaluate",
    "ExplainOptions": "options.explain",
    "Explainer": "models.explainer",
    "ExplainerConfig": "models.explainer",
    "FfppData": "options.evaluate",
    "ImagesData": "options.evaluate",
    "InitLlavaOptions": "options.checkpoints",
    "LoraOptions": "options.train_explainer",
    "RobustnessOptions": "options.evaluate",
    "TrainDetectorOptions": "options.train_detector",
    "align": "training.explainer",
    "calibrate": "evaluation.calibrate",
    "detect": "inference.pipeline",
    "evaluate": "evaluation.evaluate",
    "explain": "inference.explain",
    "import_weights": "checkpoints.convert",
    "init_llava": "checkpoints.initialize",
    "load_detector": "checkpoints.load",
    "load_explainer": "checkpoints.load",
    "lora": "training.explainer",
    "merge": "checkpoints.merge",
    "robustness": "evaluation.robustness",
    "train_detector": "training.detector",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"m2f2cli.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'm2f2cli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
