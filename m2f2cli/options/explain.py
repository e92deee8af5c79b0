"""The options of ``m2f2 explain``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.errors import UsageError
from m2f2cli.options.detect import DetectOptions, ItemOptions
from m2f2cli.options.fields import Options, group, option
from m2f2cli.registry import Registry

REGIONS = ("skin", "eyes", "eyebrows", "nose", "mouth", "face")
TEMPLATES = Registry(
    "conversation template",
    {
        "vicuna_v1": "m2f2cli.models.conversation:VICUNA_V1",
        "ddvqa": "m2f2cli.models.conversation:DDVQA",
    },
    group="m2f2cli.templates",
)


@dataclass(frozen=True)
class ExplainOptions(Options):
    """How to judge and explain."""

    detect: DetectOptions = group(
        DetectOptions, "faces", "frames", "device", "dtype", "batch_size", "threshold", "uncertain"
    )
    questions: tuple[str, ...] = option(
        (),
        "Ask this about each face. May be repeated.",
        name="question",
        group="Questions",
        metavar="TEXT",
    )
    regions: tuple[str, ...] = option(
        (),
        "Ask for the reasons in this region. May be repeated. Default: all, unless there is a "
        "--question.",
        *REGIONS,
        name="region",
        group="Questions",
    )
    judge: bool = option(False, "Ask for the judgement only: real or fake.", group="Questions")
    condition: str = option(
        "detector",
        "What questions say of the face: the detector's verdict, nothing, or the truth that a "
        "--dataset names. Default: detector; with --dataset: truth.",
        *("detector", "none", "truth"),
        group="Questions",
        says_default=True,
        key=True,
    )
    template: str | None = option(
        None,
        "The conversation template to ask in. Default: the model's.",
        group="Questions",
        metavar="vicuna_v1|ddvqa",
        key=True,
    )
    max_new_tokens: int = option(512, "Longest answer.", low=1, group="Answers")
    sample: bool = option(
        False, "Draw words by chance instead of taking the likeliest.", group="Answers", key=True
    )
    temperature: float | None = option(
        None,
        "With --sample: above 1 more daring, below 1 less. Default: 1.",
        low=0.0,
        open_low=True,
        group="Answers",
        metavar="T",
        key=True,
    )
    top_p: float | None = option(
        None,
        "With --sample: draw from the likeliest words of this total probability. Default: 1.",
        low=0.0,
        high=1.0,
        open_low=True,
        group="Answers",
        metavar="0..1",
        key=True,
    )
    seed: int = option(0, "Seed of --sample.", low=0, group="Answers", key=True)
    quantize: str | None = option(
        None,
        "Load the language model's layers in 4 or 8 bits (CUDA).",
        "4bit",
        "8bit",
        group="Model",
    )

    def check(self) -> None:
        """Questions that can be asked, in a template that there is; words drawn where asked for."""
        if not all(question.strip() for question in self.questions):
            raise UsageError("A question is empty.", 'For example: --question "Why the nose?"')
        if self.judge and (self.questions or self.regions):
            raise UsageError(
                "--judge asks for the judgement alone.",
                "Leave out --judge, or --question and --region.",
            )
        if not self.sample and (self.temperature is not None or self.top_p is not None):
            raise UsageError(
                "A temperature or top-p does nothing while the likeliest word is taken.",
                "Add --sample.",
            )
        if self.template is not None:
            TEMPLATES.get(self.template)

    def sampling(self) -> dict[str, float] | None:
        """How words are drawn, as records say it; None when the likeliest is taken."""
        if not self.sample:
            return None
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class ExplainCommand(Options):
    """Every option of ``m2f2 explain``."""

    items: ItemOptions = group(ItemOptions)
    explain: ExplainOptions = group(ExplainOptions)
    dataset: Path | None = option(
        None,
        "Answer this file of DD-VQA questions instead, in the published format.",
        group="Questions",
        metavar="FILE.jsonl",
    )
    images: str | None = option(
        None,
        "The folder of the pictures that --dataset asks about.",
        group="Questions",
        metavar="DIR",
    )

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> ExplainCommand:
        """As ``Options.from_flat``; questions of a data set name the truth, unless told not to."""
        if values.get("dataset") is not None:
            values = {"condition": "truth", **values}
        return super().from_flat(values)

    def check(self) -> None:
        """Pictures, or the questions of a data set with its pictures."""
        if (self.dataset is None) != (self.images is None):
            raise UsageError("--dataset and --images belong together.", "Give both, or neither.")
        if self.dataset is not None and (self.items.paths or self.items.fail_on):
            raise UsageError("--dataset takes no PATH and no --fail-on.", "Leave them out.")
