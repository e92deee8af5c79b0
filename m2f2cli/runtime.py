"""The machine: devices, dtypes, seeds and the debug switch. Imports torch only when called."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from m2f2cli import compat
from m2f2cli.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Called with what is done and how many steps it has; gives what is called with (steps, note=words).
Advance = Callable[..., None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]
_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def no_progress(label: str, total: int) -> AbstractContextManager[Advance]:
    """A ``Progress`` that shows nothing."""
    return nullcontext(lambda steps=1, note="": None)


def debug() -> bool:
    """Whether ``M2F2_DEBUG`` asks for tracebacks."""
    return os.environ.get("M2F2_DEBUG", "") not in ("", "0")


def cure_torchvision() -> None:
    """Let ``import torchvision`` succeed beside a torch that its compiled extension does not fit.

    timm, open_clip and transformers import torchvision, whose Python code refers to two operators
    that only its extension defines. When that extension cannot be loaded, their schemas are
    declared here; nothing in m2f2 calls them. Call this before importing any of those packages.
    """
    if "torchvision" in sys.modules:
        return
    import importlib.util
    from pathlib import Path

    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    extension = next(iter(Path(next(iter(spec.submodule_search_locations))).glob("_C*.so")), None)
    if extension is not None:
        try:
            torch.ops.load_library(str(extension))
            return
        except OSError:
            pass
    for name in ("nms", "qnms"):
        if not _operator_exists(f"torchvision::{name}"):
            torch.library.define(f"torchvision::{name}", _NMS_SCHEMA)


def _operator_exists(qualified: str) -> bool:
    import torch

    namespace, name = qualified.split("::")
    return hasattr(getattr(torch.ops, namespace), name)


def pick_device(name: str = "auto") -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` to a usable device.

    Raises:
        UsageError: The name is unknown or this machine has no such device.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"Unknown device '{name}'.", "Use auto, cpu, cuda, cuda:N or mps."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"Device '{name}' was asked for; torch sees {torch.cuda.device_count()} CUDA devices.",
            "Use --device cpu, or install a CUDA build of torch.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(
            "Device 'mps' was asked for, but this torch has no Metal support.",
            "Use --device cpu.",
        )
    return device


def pick_dtype(name: str, device: torch.device, stored: str | None = None) -> torch.dtype:
    """Resolve a dtype name; ``auto`` is bfloat16 on CUDA and float32 elsewhere.

    On a CPU that multiplies bfloat16 itself, ``auto`` is bfloat16 for what is ``stored`` as such.

    Raises:
        UsageError: The name is not one of ``DTYPES``.
    """
    import torch

    if name == "auto":
        native = device.type == "cpu" and stored == "bfloat16" and compat.can_pack(torch.bfloat16)
        return torch.bfloat16 if device.type == "cuda" or native else torch.float32
    if name not in DTYPES:
        raise UsageError(f"Unknown dtype '{name}'.", f"Use one of: {', '.join(DTYPES)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that tensors free, for the next ones of the same size.

    By default it gives large blocks back to the kernel, which clears them again for the next step:
    40 % of a training step on a CPU. For programs that allocate the same sizes again and again.

    Returns:
        Whether the C library is glibc and took the setting.
    """
    import ctypes

    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # M_… of malloc.h; bytes
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, most) for name in (mmap_threshold, trim_threshold))


def first_process() -> bool:
    """Whether this is the only process of a run, or the first that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
