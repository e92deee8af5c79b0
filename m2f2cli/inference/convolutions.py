"""Convolutions of a network that only judges, on a CPU: fewer copies, fused clamps.

For EfficientNets whose batch norms are folded. As in ``packing``, the operators are the ones
torch.compile emits; where a torch build lacks them, layers stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from m2f2cli.inference.packing import can_pack

_HALVINGS = 32  # sizes divisible by this stay even through the five halvings of a backbone


def hasten_convolutions(network: nn.Module, size: int) -> nn.Module:
    """Give a pooled EfficientNet without batch norms faster convolutions.

    Args:
        network: In evaluation mode, float32, on the CPU; changed.
        size: Edge of its pictures, in pixels.

    Returns:
        What to call instead.
    """
    turned = size % _HALVINGS == 0 and even_out_padding(network)
    pack_convolutions(network, size)
    return nn.Sequential(HalfTurn(), network) if turned else network


class HalfTurn(nn.Module):
    """Turns pictures (B, C, H, W) by 180 degrees."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return values.flip(2, 3)


def even_out_padding(network: nn.Module) -> bool:
    """Let convolutions pad both sides alike that pad the far side more, in place.

    TensorFlow's networks pad a picture of even size by one more pixel at the far side where they
    halve it, which torch does by copying. In a picture turned by 180 degrees, with turned filters,
    that is ordinary padding. All maps are turned then; their mean, the answer, is the same.

    Args:
        network: For pictures whose edge is even at every halving.

    Returns:
        Whether it was changed, and so wants its pictures turned.
    """
    if not any(isinstance(module, Conv2dSame) for module in network.modules()):
        return False
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d):
                setattr(parent, name, _turned(conv))
    return True


def _turned(conv: nn.Conv2d) -> nn.Conv2d:
    with torch.device("meta"):
        turned = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            tuple(edge // 2 for edge in conv.kernel_size),  # type: ignore[arg-type]
            groups=conv.groups,
        )
    weight = conv.weight.detach().flip(2, 3).contiguous(memory_format=torch.channels_last)
    turned.weight, turned.bias = nn.Parameter(weight, requires_grad=False), conv.bias
    return turned


class PackedConvolution(nn.Module):
    """A convolution with packed weights, its result clamped to [0, 6] where wanted; on a CPU.

    Args:
        conv: The layer to take the weights from.
        shape: Of an input the packing is chosen for; others work too.
        clamp: Whether a ReLU6 follows.
    """

    def __init__(self, conv: nn.Conv2d, shape: Sequence[int], clamp: bool) -> None:
        super().__init__()
        self.places = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), *self.places, list(shape)
        )
        self.bias = conv.bias
        self.then = ("hardtanh", [0.0, 6.0]) if clamp else ("none", [])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Apply the layer to (B, C, H, W)."""
        result: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            values, self.packed, self.bias, *self.places, *self.then, ""
        )
        return result


def pack_convolutions(network: nn.Module, size: int) -> int:
    """Pack the convolutions of a network whose batch norms are folded, in place.

    Args:
        network: In evaluation mode, float32, on the CPU; a ReLU6 registered right behind a
            convolution is taken to follow it.
        size: Edge of its pictures, in pixels.

    Returns:
        How many were packed; those that pad their sides unlike stay.
    """
    if not can_pack(torch.float32) or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return 0
    shapes = _input_shapes(network, size)
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (name, conv), (later, act) in zip_longest(children, children[1:], fillvalue=("", None)):
            if not isinstance(conv, nn.Conv2d) or conv not in shapes:
                continue
            clamp = isinstance(act, nn.ReLU6)
            setattr(parent, name, PackedConvolution(conv, shapes[conv], clamp))
            if clamp:
                setattr(parent, later, nn.Identity())
    return len(shapes)


def _input_shapes(network: nn.Module, size: int) -> dict[nn.Module, list[int]]:
    """Of every plain convolution, (1, C, H, W) of what it is given."""
    shapes: dict[nn.Module, list[int]] = {}

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        shapes[module] = list(inputs[0].shape)

    plain = [module for module in network.modules() if type(module) is nn.Conv2d]
    hooks = [module.register_forward_pre_hook(note) for module in plain]
    with torch.inference_mode():
        network(torch.zeros(1, 3, size, size).to(memory_format=torch.channels_last))
    for hook in hooks:
        hook.remove()
    return shapes
