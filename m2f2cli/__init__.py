"""m2f2cli: tells whether a face picture is forged and shows where.

The names below load torch on first use, so ``import m2f2cli`` stays cheap.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"

_LAZY = {
    "Detector": "m2f2cli.models.detector",
    "DetectorConfig": "m2f2cli.models.detector",
    "detect": "m2f2cli.inference.detect",
    "explain": "m2f2cli.inference.explain",
}
__all__ = ["Detector", "DetectorConfig", "__version__", "detect", "explain"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'm2f2cli' has no attribute '{name}'")
