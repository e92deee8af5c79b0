"""Linear layers in oneDNN's own weight order, as torch's compiler packs them, without compiling.

torch multiplies float32 matrices through MKL, which leaves a good part of an AMD CPU unused, and
reorders half-precision weights at every call. Packed once, both are faster. The operators are the
ones torch.compile emits; where a torch build lacks them, layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

_SMALLEST = 512  # features; below, packing costs more than it saves


class PackedLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` with packed weights, for inference on a CPU.

    Args:
        linear: The layer to take the weights from; it is not needed afterwards.
        rows: Rows of the input the packing is chosen for; others work too.
        activation: ``none`` or ``swish``.
    """

    def __init__(self, linear: nn.Linear, rows: int, activation: str = "none") -> None:
        super().__init__()
        weight = linear.weight.detach().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = linear.bias
        self.activation = activation

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Apply the layer to (…, inputs), giving (…, outputs)."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            values, self.packed, self.bias, self.activation, [], ""
        )
        return result


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch build and CPU pack layers of a dtype."""
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_linear_pointwise"):
        return False
    if not hasattr(operators, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_linears(layers: Sequence[Any], rows: int) -> int:
    """Pack the linear layers of transformers' CLIP encoder layers, in place.

    Args:
        layers: In evaluation mode, frozen, on the CPU.
        rows: Tokens of a typical batch.

    Returns:
        How many linear layers were packed.
    """
    count = 0
    for layer in layers:
        fused = isinstance(layer.mlp.activation_fn, nn.SiLU)
        for parent, name in (
            *((layer.self_attn, n) for n in ("q_proj", "k_proj", "v_proj", "out_proj")),
            (layer.mlp, "fc1"),
            (layer.mlp, "fc2"),
        ):
            linear = getattr(parent, name)
            if linear.in_features >= _SMALLEST and can_pack(linear.weight.dtype):
                activation = "swish" if name == "fc1" and fused else "none"
                setattr(parent, name, PackedLinear(linear, rows, activation))
                count += 1
        if fused and isinstance(layer.mlp.fc1, PackedLinear):
            layer.mlp.activation_fn = nn.Identity()
    return count
