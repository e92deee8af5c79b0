"""Where m2f2 touches what a library does not offer publicly, or sets for a whole process.

Each function names the version it was seen in and the reason; ``tests/test_compat.py`` fails when
the library moves.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch


def leave(code: int) -> NoReturn:
    """End the process: run the exit hooks, flush, and do not take modules apart.

    Python's own way takes torch and transformers apart, which costs a second after everything has
    been written. CPython 3.10 to 3.13 run exit hooks early by ``atexit._run_exitfuncs`` alone.

    Args:
        code: The exit code of the process.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def silence_tiff() -> bool:
    """Let libtiff not write to standard error what it finds in damaged files.

    Pillow 12.3 lets it print through the C library, past ``warnings`` and ``sys.stderr``, and has
    no way to switch that off; libtiff's own ``TIFFSetErrorHandler`` is reached through the module
    that is linked to it. Whether a file is damaged is raised all the same.

    Returns:
        Whether it was found; not where libtiff is linked in statically.
    """
    from PIL import _imaging

    try:
        library = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)
    except (AttributeError, OSError, TypeError):
        return False
    return True


def configure_gradio(folder: Path) -> None:
    """Keep gradio's files in one folder, and let it neither report to its makers nor count visits.

    gradio 6.24 takes these from the environment alone, when it is imported and when an upload is
    read; there is no parameter for them.

    Args:
        folder: For the pictures of the page and for uploads.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def forget_accelerator() -> None:
    """Let the next ``Accelerator`` of this process choose device and precision anew.

    accelerate 1.15 keeps both for the whole process and refuses others; ``Accelerator`` has no
    public way to put them back. transformers' ``TrainingArguments`` calls the same method.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def attention_of(config: Any) -> str | None:
    """The attention implementation of a model's configuration.

    ``PretrainedConfig._attn_implementation`` (transformers 5.6 to 5.24): the public argument
    ``attn_implementation`` sets it, nothing public reads it.
    """
    found: str | None = config._attn_implementation
    return found


def set_attention(config: Any, name: str) -> None:
    """Choose the attention of blocks built from a configuration without its model.

    ``PretrainedConfig._attn_implementation`` (transformers 5.6 to 5.24): the public
    ``set_attn_implementation`` is a method of models, and blocks are built here without one.
    """
    config._attn_implementation = name


@contextlib.contextmanager
def tokenizer_faults() -> Iterator[None]:
    """Turn what tokenizers raises at a damaged file into a ``ValueError``.

    tokenizers 0.23 raises ``Exception`` itself, and where its Rust code panics pyo3's
    ``PanicException``, which is no ``Exception`` and has no public name.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from error
        raise


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch build and CPU pack layers of a dtype in oneDNN's order.

    torch 2.13 has no public way: MKL multiplies float32 matrices, which leaves a good part of an
    AMD CPU unused, and half-precision weights are reordered at every call. The operators below are
    the ones that torch.compile emits; where a build lacks them, layers stay as they are. On the
    bundled detector they make 1.5 times the pictures a second of what folding alone does.
    """
    import torch

    operators = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_convolution_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operators, n) for n in names):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linear(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight (outputs, inputs) in the order that suits inputs of so many rows."""
    import torch

    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def packed_linear(
    values: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """``activation(values @ weight.T + bias)``; the activation is ``none`` or ``swish``."""
    import torch

    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        values, packed, bias, activation, [], ""
    )
    return result


def pack_convolution(
    weight: torch.Tensor, geometry: Sequence[Any], shape: Sequence[int]
) -> torch.Tensor:
    """Filters in the order that suits inputs of a shape; geometry as in ``packed_convolution``."""
    import torch

    packed: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, *geometry, list(shape)
    )
    return packed


def packed_convolution(
    values: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Sequence[Any],
    clamp: bool,
) -> torch.Tensor:
    """A convolution of (B, C, H, W), clamped to [0, 6] where wanted.

    Args:
        values: The input.
        packed: From ``pack_convolution``.
        bias: (outputs,), or None.
        geometry: Padding, stride and dilation as lists, and groups.
        clamp: Whether a ReLU6 follows.
    """
    import torch

    then = ("hardtanh", [0.0, 6.0]) if clamp else ("none", [])
    result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
        values, packed, bias, *geometry, *then, ""
    )
    return result
