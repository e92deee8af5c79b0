"""Names in published backbone files (ImageNet classifiers) and timm's, as literal tables.

Pure functions from state dict to state dict; a key that no table knows is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from m2f2cli.errors import CheckpointError

Tensor = TypeVar("Tensor")

# The layout of EfficientNet-PyTorch (``efficientnet-b4-….pth``, ``efficientnet-lite0-….pth``).
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_PLAIN_BLOCK = {  # without an expansion, as in the first stage
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
# torchvision's densenet files still say norm.1 where the network says norm1.
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(\d+)\.")


def to_timm(
    found: Mapping[str, Tensor], wanted: Sequence[str], classifier: Sequence[str]
) -> dict[str, Tensor]:
    """Rename a backbone's tensors to timm's names and drop its classifier.

    Args:
        found: A file's tensors: timm's or torchvision's densenet names, or EfficientNet-PyTorch's,
            perhaps all under ``module.``.
        wanted: The names timm's network has.
        classifier: The modules that are the classifier in timm's network.

    Returns:
        Tensors under timm's names, without the classifier; names are not checked against
        ``wanted`` beyond what renaming needs.

    Raises:
        CheckpointError: A tensor's name is in no table.
    """
    if found and all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): tensor for key, tensor in found.items()}
    found = {_DENSE_LAYER.sub(r"\1\2.", key): tensor for key, tensor in found.items()}
    if "_conv_stem.weight" in found:
        found = _from_efficientnet_pytorch(found, wanted)
    return {
        key: tensor
        for key, tensor in found.items()
        if not any(key == name or key.startswith(f"{name}.") for name in classifier)
    }


def _from_efficientnet_pytorch(
    found: Mapping[str, Tensor], wanted: Sequence[str]
) -> dict[str, Tensor]:
    places = sorted({(int(s), int(b)) for s, b in _TIMM_BLOCK.findall(" ".join(wanted))})
    expanded = {key.split(".")[1] for key in found if "._expand_conv." in key}
    renamed = {}
    for key, tensor in found.items():
        if match := _BLOCK.fullmatch(key):
            number, part, rest = match.groups()
            table = _EXPANDED_BLOCK if number in expanded else _PLAIN_BLOCK
            if part in table and int(number) < len(places):
                stage, block = places[int(number)]
                renamed[f"blocks.{stage}.{block}.{table[part]}.{rest}"] = tensor
                continue
        else:
            module, _, rest = key.partition(".")
            if module in _STEM_AND_HEAD:
                renamed[f"{_STEM_AND_HEAD[module]}.{rest}"] = tensor
                continue
        raise CheckpointError(
            f"The tensor '{key}' has no place in this backbone.",
            "The weights are of another architecture than --backbone says.",
        )
    return renamed
