"""An explainer that is really asked, and one whose words are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2f2cli.inference.explain import ExplainPipeline
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import ExplainOptions
from tests.models.explainers import tiny_explainer, tiny_processor

TOKENS = 6


def asking(*, faces: str = "none", **changes: Any) -> ExplainOptions:
    """Short answers about pictures taken whole; changes of either kind of options."""
    judging = {name: changes.pop(name) for name in ("batch_size", "threshold") if name in changes}
    return ExplainOptions(
        detect=DetectOptions(faces=faces, frames=4, **judging),
        **{"max_new_tokens": TOKENS, **changes},
    )


def tiny(**changes: Any) -> tuple[Any, Any]:
    """A tiny explainer and its processor, as ``explain`` takes them."""
    return tiny_explainer(**changes), tiny_processor(**changes)


def crops(folder: Path, count: int, *, wide: int | None = None) -> list[str]:
    """Pictures of noise; number ``wide`` is not square."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for seed in range(count):
        size = (40, 60 if seed == wide else 40, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        files.append(str(folder / f"{seed}.png"))
        Image.fromarray(pixels).save(files[-1])
    return files


def say(monkeypatch: Any, answer: Callable[[str], str]) -> list[str]:
    """Let the language model say what a function of the prompt gives; returns what it was asked."""
    asked: list[str] = []

    def reply(self: ExplainPipeline, crops: Any, features: Any, prompts: Any, **_: Any) -> Any:
        asked.extend(prompt.text for texts in prompts for prompt in texts)
        return [[(answer(p.text), True) for p in texts] for texts in prompts]

    monkeypatch.setattr(ExplainPipeline, "complete", reply)
    return asked
