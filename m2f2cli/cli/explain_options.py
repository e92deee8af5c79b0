"""The flags of ``explain`` that no other command has; see ``cli.options`` for what a flag is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from m2f2cli.cli.options import flag

_MODEL, _QUESTIONS, _ANSWERS, _RESULT = "Model", "Questions", "Answers", "Output"

Explainer = Annotated[
    str,
    flag(
        "model",
        "The explainer: 'lite' (bundled), a checkpoint folder, or a hub id.",
        short="-m",
        metavar="lite|DIR|HUB-ID",
        rich_help_panel=_MODEL,
    ),
]
Quantise = Annotated[
    str | None,
    flag(
        "quantize",
        "Load the language model's layers in 4 or 8 bits (CUDA).",
        metavar="4bit|8bit",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
AnswersAtOnce = Annotated[
    int,
    flag("batch-size", "Answers written at a time.", min=1, metavar="N", rich_help_panel=_MODEL),
]
Question = Annotated[
    list[str] | None,
    flag(
        "question",
        "Ask this about each face. May be repeated.",
        metavar="TEXT",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
Region = Annotated[
    list[str] | None,
    flag(
        "region",
        "Ask for the reasons in this region. May be repeated. Default: all, unless there is a "
        "--question.",
        metavar="skin|eyes|eyebrows|nose|mouth|face",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
Judge = Annotated[
    bool,
    flag(
        "judge",
        "Ask for the judgement only: real or fake.",
        switch=True,
        rich_help_panel=_QUESTIONS,
    ),
]
Condition = Annotated[
    str | None,
    flag(
        "condition",
        "What questions say of the face: the detector's verdict, nothing, or the truth that a "
        "--dataset names. Default: detector; with --dataset: truth.",
        metavar="detector|none|truth",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    flag(
        "template",
        "The conversation template to ask in. Default: the model's.",
        metavar="vicuna_v1|ddvqa",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
QuestionFile = Annotated[
    Path | None,
    flag(
        "dataset",
        "Answer this file of DD-VQA questions instead, in the published format.",
        metavar="FILE.jsonl",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
Images = Annotated[
    str | None,
    flag(
        "images",
        "The folder of the pictures that --dataset asks about.",
        metavar="DIR",
        rich_help_panel=_QUESTIONS,
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int,
    flag("max-new-tokens", "Longest answer.", min=1, metavar="N", rich_help_panel=_ANSWERS),
]
Sample = Annotated[
    bool,
    flag(
        "sample",
        "Draw words by chance instead of taking the likeliest.",
        switch=True,
        rich_help_panel=_ANSWERS,
    ),
]
Temperature = Annotated[
    float | None,
    flag(
        "temperature",
        "With --sample: above 1 more daring, below 1 less. Default: 1.",
        metavar="T",
        rich_help_panel=_ANSWERS,
        show_default=False,
    ),
]
TopP = Annotated[
    float | None,
    flag(
        "top-p",
        "With --sample: draw from the likeliest words of this total probability. Default: 1.",
        metavar="0..1",
        rich_help_panel=_ANSWERS,
        show_default=False,
    ),
]
DrawSeed = Annotated[
    int, flag("seed", "Seed of --sample.", min=0, metavar="N", rich_help_panel=_ANSWERS)
]
RecordsFile = Annotated[
    Path | None,
    flag(
        "output",
        "Write one record an item; run again to resume.",
        short="-o",
        metavar="FILE.jsonl",
        rich_help_panel=_RESULT,
    ),
]
