"""The same answers from less work on a CPU: folded batch norms and activations, short attention.

For networks that are only judged with: a folded one has other tensors than its checkpoint, so it
must not be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from m2f2cli.models.detector import Detector

_QUICK_GELU = 1.702
_HEADS_AT_ONCE = 4  # their scores stay in a core's cache
_ATTENTION = "m2f2_few_heads"


def hasten(detector: Detector) -> Detector:
    """Prepare a loaded detector for judging, in place; see the module for what that costs."""
    import torch

    from m2f2cli.inference.convolutions import hasten_convolutions
    from m2f2cli.inference.packing import pack_linears
    from m2f2cli.models.clip import VisionPart

    folded = fold_batch_norms(detector.backbone.net)
    if folded and detector.device.type == "cpu" and detector.config.bridge is None:
        detector.backbone.net = hasten_convolutions(
            detector.backbone.net, detector.config.image_size
        )
    vision = detector.clip.vision
    if detector.device.type == "cpu" and isinstance(vision, VisionPart):
        layers = list(vision.encoder.layers)
        fold_quick_gelu(layers)
        pack_linears(layers, rows=4 * (vision.grid**2 + 1))
        if detector.dtype != torch.float32:
            _attend_by_few_heads(layers)
    return detector


def fold_quick_gelu(layers: Sequence[Any]) -> int:
    """Turn x · sigmoid(1.702 x) into one fused SiLU by scaling the weights around it.

    Args:
        layers: transformers' CLIP encoder layers.

    Returns:
        How many activations were folded; those of other kinds stay.
    """
    from torch import nn
    from transformers.activations import QuickGELUActivation

    count = 0
    for layer in layers:
        first, second = layer.mlp.fc1, layer.mlp.fc2
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            # New tensors: the loaded ones may be mapped from the checkpoint's file.
            first.weight = nn.Parameter(first.weight.detach() * _QUICK_GELU, requires_grad=False)
            first.bias = nn.Parameter(first.bias.detach() * _QUICK_GELU, requires_grad=False)
            second.weight = nn.Parameter(second.weight.detach() / _QUICK_GELU, requires_grad=False)
            layer.mlp.activation_fn = nn.SiLU(inplace=True)
            count += 1
    return count


def _attend_by_few_heads(layers: Sequence[Any]) -> None:
    """Let half-precision layers attend in slices; torch's fused kernel is slower on a CPU."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, few_heads_attention)
    for layer in layers:
        layer.self_attn.config._attn_implementation = _ATTENTION


def few_heads_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention without gradients, a few heads of one picture at a time.

    Args:
        module: Unused; transformers passes it.
        query: (B, heads, T, d); ``key`` and ``value`` alike.
        key: See ``query``.
        value: See ``query``.
        attention_mask: Must be None.
        **options: ``scaling`` multiplies the scores.

    Returns:
        (B, T, heads, d), and None for the weights.
    """
    import torch

    batch, heads, length, width = query.shape
    result = query.new_empty(batch, length, heads, width)
    query = (query * options["scaling"]).contiguous()
    key, value = key.contiguous(), value.contiguous()
    for row in range(batch):
        for first in range(0, heads, _HEADS_AT_ONCE):
            some = slice(first, first + _HEADS_AT_ONCE)
            scores = torch.matmul(query[row, some], key[row, some].transpose(1, 2))
            mixed = torch.matmul(scores.softmax(-1), value[row, some])
            result[row, :, some] = mixed.transpose(0, 1)
    return result, None


def fold_batch_norms(network: nn.Module) -> int:
    """Fold each batch norm that stands right behind a convolution, in place.

    Only timm's EfficientNets in float32 and evaluation mode are touched: their blocks register
    their layers in the order they run, so neighbours are known to be connected, and half precision
    would round the products.

    Args:
        network: A backbone.

    Returns:
        How many were folded.
    """
    import torch
    from timm.models.efficientnet import EfficientNet
    from torch import nn

    first = next(network.parameters())
    if not isinstance(network, EfficientNet) or network.training or first.dtype != torch.float32:
        return 0
    count = 0
    for parent in network.modules():
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                _fold(conv, norm)
                setattr(parent, name, getattr(norm, "act", nn.Identity()))
                count += 1
    return count


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give a convolution the weights of itself followed by a batch norm with fixed statistics."""
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    assert norm.running_mean is not None and norm.running_var is not None  # noqa: PT018
    with torch.no_grad():
        weight, bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
