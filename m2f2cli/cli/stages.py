"""Commands that train an explainer, ``align`` and ``lora``: flags are their options' fields."""

from __future__ import annotations

from typing import Any

from m2f2cli.cli.train import as_command, train
from m2f2cli.options.train_explainer import AlignOptions, LoraOptions

_BLANKS = {"model": "DIR", "data": "FILE", "images": "DIR", "output": "DIR"}

EXAMPLES = {
    "align": (
        "m2f2 align --model explainer-0/ --data train_judge_only_c40.json --images crops/ "
        "--output delta-1/",
        "m2f2 align --config align.yaml --output delta-1/ --resume",
        "torchrun --nproc-per-node 8 -m m2f2cli align --config align.yaml --deepspeed zero2",
    ),
    "lora": (
        "m2f2 lora --model explainer-1/ --data train_explain_c40.json --images crops/ "
        "--output delta-2/",
        "m2f2 lora --config lora.yaml --batch-size 4 --gradient-accumulation-steps 5 "
        "--quantize 4bit",
        "m2f2 lora --config lora.yaml --validation-share 0.05 --output delta-2/",
    ),
}


def align(**values: Any) -> None:
    """Teach an explainer to read its detector's answer (stage 2).

    Only the forgery projector trains; the language model, the detector and CLIP stay as they are.
    The result is a delta folder, to be merged with 'm2f2 merge'. A killed run goes on with --resume
    and ends with the weights it would have had. The defaults are the published settings;
    --print-config shows them as a file for --config.
    """
    train(AlignOptions, values, trainer="explainer", blanks=_BLANKS)


def lora(**values: Any) -> None:
    """Teach an explainer to give reasons (stage 3).

    Low-rank updates of the language model's layers train, and both projectors; its head, the
    detector and CLIP stay as they are. The result is a PEFT adapter folder, to be merged with 'm2f2
    merge' or loaded by peft. A killed run goes on with --resume and ends with the weights it would
    have had. The defaults are the published settings; --print-config shows them as a file for
    --config.
    """
    train(LoraOptions, values, trainer="explainer", blanks=_BLANKS)


as_command(align, AlignOptions)
as_command(lora, LoraOptions)
