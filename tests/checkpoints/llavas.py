"""Small LLaVA bases and explainers on disk, in every published layout, with random tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from m2f2cli.checkpoints import io
from tests.checkpoints import published

WORDS, WIDTH, INNER, LAYERS, HEADS = 64, 16, 24, 2, 4
TOWER_WIDTH = published.WIDTH
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": TOWER_WIDTH,
    "intermediate_size": published.INNER,
    "num_hidden_layers": published.BLOCKS,
    "num_attention_heads": 2,
    "image_size": published.SIDE,
    "patch_size": published.PATCH,
}
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
ORIGINAL_CONFIG: dict[str, Any] = {
    "model_type": "llava_llama",
    **LLAMA,
    "image_aspect_ratio": "pad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": TOWER_WIDTH,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "./clip",
    "mm_use_im_start_end": False,
    "rope_theta": 5000.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
HF_CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", **LLAMA},
    "vision_config": CLIP,
}
_TOWER_BEGIN = "clip_vision_encoder.model.vision_model."
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(("<unk>", "<s>", "</s>"))
    ],
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {
            t: n for n, t in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"])
        },
        "merges": [],
    },
}


def random(shape: Iterable[int], name: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()) * 7919 + len(name))
    return (0.1 * torch.randn(tuple(shape), generator=generator)).to(dtype)


def llama(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The language model and the projector, in LLaVA's own names."""
    keys = 2 * WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (WORDS, WIDTH),
        "model.mm_projector.0.weight": (WIDTH, TOWER_WIDTH),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
    }
    for n in range(LAYERS):
        inside = {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (keys, WIDTH),
            "self_attn.v_proj": (keys, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }
        shapes |= {f"model.layers.{n}.{key}.weight": shape for key, shape in inside.items()}
    return {key: random(shape, key, dtype) for key, shape in shapes.items()}


def tower() -> dict[str, torch.Tensor]:
    """The CLIP tower of ``published.detector("detector_b")``, named from ``embeddings.`` on."""
    return {
        key.removeprefix(_TOWER_BEGIN): tensor
        for key, tensor in published.detector("detector_b").items()
        if key.startswith(_TOWER_BEGIN)
    }


def original(*, with_tower: bool = True) -> dict[str, torch.Tensor]:
    """A base in LLaVA's own layout."""
    begin = "model.vision_tower.vision_tower.vision_model."
    mine = {f"{begin}{k}": t.half() for k, t in tower().items()} if with_tower else {}
    return {**llama(), **mine}


# How each serialisation of transformers names what LLaVA's own layout calls otherwise.
HF_NAMES = {
    "4": ("language_model.model.", "language_model.", "", "vision_tower.vision_model."),
    "5": ("language_model.model.", "language_model.", "", "vision_tower."),
    "4 in memory": ("model.language_model.", "", "model.", "model.vision_tower.vision_model."),
    "5 in memory": ("model.language_model.", "", "model.", "model.vision_tower."),
}


def hugging_face(version: str) -> dict[str, torch.Tensor]:
    """The same base in one of Hugging Face's layouts."""
    inside, head, projector, vision = HF_NAMES[version]
    linear = {"0": "linear_1", "2": "linear_2"}
    found = {f"{vision}{key}": tensor.half() for key, tensor in tower().items()}
    for key, tensor in llama().items():
        if key.startswith("model.mm_projector."):
            _, _, number, part = key.split(".")
            found[f"{projector}multi_modal_projector.{linear[number]}.{part}"] = tensor
        elif key == "lm_head.weight":
            found[f"{head}lm_head.weight"] = tensor
        else:
            found[inside + key.removeprefix("model.")] = tensor
    return found


def explainer(*, with_tower: bool = True) -> dict[str, torch.Tensor]:
    """The published merged explainer, cut down."""
    detector = {
        f"deepfake_encoder.{key}": tensor.bfloat16() if tensor.is_floating_point() else tensor
        for key, tensor in published.detector("detector_b").items()
        if not key.startswith("clip_vision_encoder.")
    }
    projector = {
        f"deepfake_projector.{key}": random(shape, key)
        for key, shape in {
            "0.weight": (WIDTH, 2),
            "0.bias": (WIDTH,),
            "2.weight": (WIDTH, WIDTH),
            "2.bias": (WIDTH,),
        }.items()
    }
    return {**original(with_tower=with_tower), **detector, **projector}


def write(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    layout: str = "safetensors",
    tokenizer: bool = True,
) -> Path:
    """A model's folder.

    Args:
        folder: To make.
        tensors: Its weights.
        config: Its ``config.json``.
        layout: ``safetensors``, ``bin``, or one of them with ``shards`` behind.
        tokenizer: Whether it brings one.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder)
    stem, suffix = ("model", "safetensors") if "safe" in layout else ("pytorch_model", "bin")
    names = sorted(tensors)
    groups = [names[0::2], names[1::2]] if "shards" in layout else [names]
    files = [f"{stem}-{n:05d}-of-00002.{suffix}" for n in (1, 2)]
    files = files if "shards" in layout else [f"{stem}.{suffix}"]
    for file, group in zip(files, groups, strict=True):
        part = {key: tensors[key].contiguous() for key in group}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if "shards" in layout:
        mapping = {key: file for file, group in zip(files, groups, strict=True) for key in group}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": mapping}))
    return folder


def write_tokenizer(folder: Path, **changes: Any) -> None:
    """A tokeniser of a few letters with LLaMA's special tokens."""
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    fields = {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def detector(folder: Path, **changes: Any) -> Path:
    """``published.detector("detector_b")`` imported into a checkpoint folder."""
    from m2f2cli.checkpoints.convert import import_weights

    source = folder.parent / f"{folder.name}.pth"
    torch.save({**published.detector("detector_b"), **changes}, source)
    (folder.parent / "clip.json").write_text(json.dumps(published.CLIP_CONFIG))
    import_weights([source], folder, clip_config=folder.parent / "clip.json")
    return folder


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, read by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return io.read_tensors(folder, finite=True)
