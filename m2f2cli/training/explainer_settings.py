"""Options of stages 2 and 3 turned into the Trainer's settings and into where a model lies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from m2f2cli.errors import ConfigError, MissingExtraError
from m2f2cli.options.train_explainer import DEEPSPEED, StageOptions, StageRunOptions
from m2f2cli.runtime import pick_device
from m2f2cli.training.arguments import build_arguments, pick_precision

_SETTINGS = Path(__file__).parent.parent / "assets" / "deepspeed"


def where_to_load(options: StageOptions) -> str:
    """The device a model is read to: this process's own; memory where DeepSpeed spreads it."""
    device = pick_device(options.run.device)
    if options.run.deepspeed:
        return "cpu"
    if device.type == "cuda" and device.index is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return str(device)


def stage_arguments(options: StageOptions, folder: Path, *, measures: bool) -> TrainingArguments:
    """The Trainer's settings.

    Args:
        options: Everything about the run.
        folder: Where saved states and curves go.
        measures: Whether there are held-out conversations.

    Raises:
        ConfigError: The precision does not go with the device, or DeepSpeed's settings are broken.
        MissingExtraError: DeepSpeed, TensorBoard or W&B is asked for and not installed.
    """
    run, steps = options.run, options.optimizer
    return build_arguments(
        folder,
        run=run,
        steps=steps,
        precision=pick_precision(options.model.precision, run.device),
        workers=options.data.workers,
        weight_decay=steps.weight_decay,
        eval_strategy="epoch" if measures else "no",
        report_to=_reports(run),
        deepspeed=_deepspeed(run.deepspeed),
    )


@contextmanager
def read_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Let each process read and change a model as a whole, which ZeRO-3 shards afterwards."""
    settings = arguments.hf_deepspeed_config if arguments.deepspeed else None
    if settings is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if settings is not None:
            set_hf_deepspeed_config(settings)


def _reports(run: StageRunOptions) -> list[str] | str:
    if run.report_to == "wandb":
        if find_spec("wandb") is None:
            raise ConfigError(
                "--report-to wandb needs the package 'wandb', which is not installed.",
                "pip install wandb",
            )
        return ["wandb"]
    board = find_spec("tensorboard") is not None
    if run.report_to == "tensorboard" and not board:
        raise MissingExtraError("tensorboard", "train", "--report-to tensorboard")
    return ["tensorboard"] if board and run.report_to != "none" else "none"


def _deepspeed(name: str | None) -> dict[str, object] | None:
    """DeepSpeed's settings: bundled ones by their name, or those of a file."""
    if name is None:
        return None
    if find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "train", "--deepspeed")
    path = _SETTINGS / f"{name}.json" if name in DEEPSPEED else Path(name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed's settings '{path}' cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' holds no JSON object with DeepSpeed's settings.")
    return found
