"""``m2f2 train-detector``, ``m2f2 align`` and ``m2f2 lora``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module

from m2f2cli.cli.flags import command
from m2f2cli.cli.output import Output
from m2f2cli.options.fields import Options
from m2f2cli.options.train_detector import TrainDetectorOptions
from m2f2cli.options.train_explainer import AlignOptions, LoraOptions
from m2f2cli.runtime import first_process

EXAMPLES = {
    "train-detector": (
        "m2f2 train-detector --data faces/ --output detector/",
        "m2f2 train-detector --config recipe.yaml --output detector/ --resume",
        "m2f2 train-detector --data ddvqa/ --model lite --train head --epochs 5 --output tuned/",
        "m2f2 train-detector --data ffpp:ffpp_h5/ --recipe published --output detector/",
        "m2f2 train-detector --data ffpp:ffpp_h5/ --data faces/ --balance --output detector/",
        "m2f2 train-detector --recipe published --set augment.jpeg.p=0.2 --print-config",
    ),
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


@command(TrainDetectorOptions, json=False)
def train_detector(options: TrainDetectorOptions, output: Output) -> None:
    """Train a detector on pictures in real/ and fake/ (stage 1).

    The epoch that does best on held-out identities becomes a checkpoint folder, for 'm2f2 detect
    --model DIR'. A killed run goes on with --resume and ends with the weights it would have had.
    The defaults are the published settings; --recipe names others, and --print-config shows the
    whole as a file for --config. Flags win over M2F2_* in the environment, that over the file, the
    file over the recipe.
    """
    _train("detector", options, output)


@command(AlignOptions, json=False)
def align(options: AlignOptions, output: Output) -> None:
    """Teach an explainer to read its detector's answer (stage 2).

    Only the forgery projector trains; the language model, the detector and CLIP stay as they are.
    The result is a delta folder, to be merged with 'm2f2 merge'. A killed run goes on with --resume
    and ends with the weights it would have had. The defaults are the published settings;
    --print-config shows them as a file for --config.
    """
    _train("explainer", options, output)


@command(LoraOptions, json=False)
def lora(options: LoraOptions, output: Output) -> None:
    """Teach an explainer to give reasons (stage 3).

    Low-rank updates of the language model's layers train, and both projectors; its head, the
    detector and CLIP stay as they are. The result is a PEFT adapter folder, to be merged with 'm2f2
    merge' or loaded by peft. A killed run goes on with --resume and ends with the weights it would
    have had. The defaults are the published settings; --print-config shows them as a file for
    --config.
    """
    _train("explainer", options, output)


def _train(trained: str, options: Options, output: Output) -> None:
    """Train and print the result's folder; of several processes, the first one alone speaks."""
    leads = first_process()
    output = replace(output, quiet=output.quiet or not leads)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints, and logs to what this is when it loads
        run = import_module(f"m2f2cli.training.{trained}").prepare(options, notify=output.note)
        with output.progress("Training", run.steps) as advance:
            folder = run.run(advance=advance)
    if leads:
        output.text(str(folder))
