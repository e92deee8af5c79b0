"""What the Trainer is told in every stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
from transformers import TrainingArguments

from m2f2cli.errors import ConfigError
from m2f2cli.options.train_detector import OptimizerOptions, RunOptions
from m2f2cli.options.train_explainer import StageRunOptions, StepOptions
from m2f2cli.runtime import pick_device

# A plateau's cuts are made by the detector's trainer; other schedules have the Trainer's names.
_SCHEDULES = {"constant": "constant_with_warmup", "plateau": "constant_with_warmup"}


def pick_precision(precision: str, device_name: str) -> str:
    """The arithmetic: ``float32``, ``bfloat16`` or ``float16``.

    Args:
        precision: One of them, or ``auto``.
        device_name: See ``runtime.pick_device``.

    Raises:
        ConfigError: It does not go with the device.
        UsageError: There is no such device.
    """
    device = pick_device(device_name)
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(
            f"--precision float16 needs a CUDA device, not {device.type}.",
            "Use --precision bfloat16 or float32.",
        )
    return precision


def build_arguments(
    folder: Path,
    *,
    run: RunOptions | StageRunOptions,
    steps: OptimizerOptions | StepOptions,
    precision: str,
    workers: int,
    **others: Any,
) -> TrainingArguments:
    """The Trainer's settings.

    Args:
        folder: Where saved states and curves go.
        run: Device, seed and determinism.
        steps: Epochs, batches and rates.
        precision: As ``pick_precision`` gives it.
        workers: Processes that prepare samples.
        **others: What only one stage sets.
    """
    device = pick_device(run.device)
    if device.index is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=steps.epochs,
        per_device_train_batch_size=steps.batch_size,
        per_device_eval_batch_size=steps.batch_size,
        gradient_accumulation_steps=steps.gradient_accumulation_steps,
        max_grad_norm=steps.max_grad_norm,
        lr_scheduler_type=_SCHEDULES.get(steps.schedule, steps.schedule),
        warmup_steps=min(steps.warmup_ratio, 0.999999),
        learning_rate=steps.learning_rate,
        save_strategy="epoch",
        logging_strategy="steps",
        logging_steps=10,
        seed=run.seed,
        full_determinism=run.deterministic,
        use_cpu=device.type == "cpu",
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        **others,
    )
    if "WORLD_SIZE" not in os.environ:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # no DataParallel over the other GPUs
    return arguments
