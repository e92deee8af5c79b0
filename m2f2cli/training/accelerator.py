"""Where and how a run computes: device, precision, curves and DeepSpeed, as one Accelerator."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from transformers import enable_full_determinism

from m2f2cli.compat import forget_accelerator
from m2f2cli.errors import ConfigError, MissingExtraError
from m2f2cli.options.train_detector import RunOptions
from m2f2cli.options.train_explainer import DEEPSPEED, StageRunOptions, StepOptions
from m2f2cli.runtime import pick_device
from m2f2cli.training.states import state_folder

_SETTINGS = Path(__file__).parent.parent / "assets" / "deepspeed"
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def pick_precision(precision: str, device_name: str) -> str:
    """The arithmetic: ``float32``, ``bfloat16`` or ``float16``; ``auto`` hangs on the device.

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


def pick_tracker(report_to: str) -> str | None:
    """What writes curves: ``tensorboard``, ``wandb`` or nothing.

    Raises:
        ConfigError: W&B is asked for and not installed.
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    if report_to == "wandb" and find_spec("wandb") is None:
        raise ConfigError(
            "--report-to wandb needs the package 'wandb', which is not installed.",
            "pip install wandb",
        )
    board = find_spec("tensorboard") is not None
    if report_to == "tensorboard" and not board:
        raise MissingExtraError("tensorboard", "train", "--report-to tensorboard")
    if report_to == "auto":
        return "tensorboard" if board else None
    return None if report_to == "none" else report_to


def read_deepspeed(name: str | None) -> dict[str, Any] | None:
    """DeepSpeed's settings: bundled ones by their name, or those of a file.

    Raises:
        ConfigError: The file cannot be read, or sets what the options set.
        MissingExtraError: DeepSpeed is not installed.
    """
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
    for section in ("optimizer", "scheduler"):
        if section in found:
            raise ConfigError(
                f"'{path}' sets the {section}, which the options of the command set.",
                f"Remove '{section}' from the file.",
            )
    return found


def fill_deepspeed(settings: dict[str, Any], *, steps: StepOptions, width: int) -> dict[str, Any]:
    """DeepSpeed's settings with what the options decide where they say ``auto`` or nothing.

    accelerate fills in the precision and the batch of all processes itself. ``width`` is the
    hidden size of the language model.
    """
    values = {
        "train_micro_batch_size_per_gpu": steps.batch_size,
        "gradient_accumulation_steps": steps.gradient_accumulation_steps,
        "gradient_clipping": steps.max_grad_norm,
    }
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero = settings.get("zero_optimization", {})
    return (
        settings
        | {key: value for key, value in values.items() if settings.get(key, "auto") == "auto"}
        | {"zero_optimization": {k: sizes.get(k, v) if v == "auto" else v for k, v in zero.items()}}
    )


def make_accelerator(
    run: RunOptions | StageRunOptions, precision: str, deepspeed: dict[str, Any] | None = None
) -> Accelerator:
    """The Accelerator of a run; a second one in a process may differ from the first.

    ``precision`` is as ``pick_precision`` gives it, ``deepspeed`` as ``fill_deepspeed`` does.
    """
    device = pick_device(run.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    if run.deterministic:
        enable_full_determinism(run.seed)
    forget_accelerator()
    PartialState(cpu=device.type == "cpu")  # the processes: under DeepSpeed not asked for a CPU
    return Accelerator(
        cpu=device.type == "cpu" and deepspeed is None,
        mixed_precision=_PRECISIONS[precision],
        log_with=pick_tracker(run.report_to),
        project_dir=state_folder(run.output),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed) if deepspeed else None,
    )
