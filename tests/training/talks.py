"""A tiny explainer's folder, a conversation file about toy pictures, and options of short runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from m2f2cli.data.prepare.explanations import PLACEHOLDERS, judge_turns
from m2f2cli.options.train_explainer import AlignOptions, LoraOptions
from m2f2cli.training.explainer import align, lora
from tests.models.explainers import write_explainer
from tests.training.conftest import toy_picture

KINDS = {"align": AlignOptions, "lora": LoraOptions}


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("human", "gpt") * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


def write_talks(root: Path, people: int = 6) -> Path:
    """Of each person a real and a forged picture, with a judgement and two-turn reasons each."""
    rng = np.random.default_rng(0)
    (root / "crops").mkdir(parents=True)
    rows = []
    for person in range(people):
        for name, verdict in (
            (f"5_{person:03d}", "real"),
            (f"0_{person:03d}_{person + 100:03d}", "fake"),
        ):
            picture = toy_picture(rng, forged=verdict == "fake")
            picture.save(root / "crops" / f"{name}.jpg")
            flaw = "has stains" if verdict == "fake" else "is natural. It looks fine"
            said = turns(
                PLACEHOLDERS + "Describe the authenticity of the image based on skin.",
                f"The skin {flaw}.",
                "Is the image real or fake?",
                f"Based on the learned representation, this image is {verdict}.",
            )
            rows += [
                {"id": name[2:], "image": f"{name}.jpg", "conversations": said},
                {"id": name[2:], "image": f"{name}.jpg", "conversations": judge_turns(verdict)},
            ]
    file = root / "talks.json"
    file.write_text(json.dumps(rows))
    return file


def write_all(root: Path) -> Path:
    """``root/explainer``, ``root/talks.json`` and ``root/crops``."""
    write_explainer(root / "explainer")
    write_talks(root)
    return root


def stage_options(stage: str, root: Path, output: Path, **changes: Any) -> Any:
    """Options of a run of some steps."""
    small = {
        "model": str(root / "explainer"),
        "data": str(root / "talks.json"),
        "images": str(root / "crops"),
        "output": str(output),
        "batch-size": 4,
        "max-length": 400,
        "learning-rate": 1e-2,
        "device": "cpu",
        "report-to": "none",
        "save-steps": 2,
    }
    if stage == "lora":
        small |= {"lora-r": 4, "lora-alpha": 8, "projector-lr": 1e-2}
    return KINDS[stage].from_flat(small | {k.replace("_", "-"): v for k, v in changes.items()})


def train(options: Any, **told: Any) -> Path:
    """Train the stage that the options are of."""
    return (align if isinstance(options, AlignOptions) else lora)(options, **told)
