"""A tiny explainer with every part the large one has, and its processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2f2cli.checkpoints import io
from m2f2cli.data.transforms import explainer_views
from m2f2cli.models.explainer import Explainer, ExplainerConfig
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import load_tokenizer
from tests.conftest import randomise, tiny_fields

TOKENIZER = Path(__file__).parent.parent / "parity" / "golden" / "llava_tiny"
TEXT = {
    "vocab_size": 800,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
}
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def tiny_config(**changes: Any) -> ExplainerConfig:
    return ExplainerConfig(detector_config=tiny_fields(), text_config=TEXT, **changes)


def tiny_explainer(**changes: Any) -> Explainer:
    model = randomise(Explainer(tiny_config(**changes)))
    model.language_model.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = None  # random answers must not end at once
    return model.eval()


def tiny_processor(**changes: Any) -> ExplainerProcessor:
    return ExplainerProcessor(load_tokenizer(TOKENIZER), tiny_config(**changes), explainer_views)


def picture(seed: int, width: int = 40, height: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_explainer(folder: Path, *, change: Any = None, **fields: Any) -> Explainer:
    """A checkpoint folder; ``change`` may spoil the tensors before they are written."""
    model = tiny_explainer(**fields)
    tensors = dict(model.state_dict())
    if change:
        change(tensors)
    config = json.loads(model.config.to_json_string(use_diff=False))
    io.write_checkpoint(folder, config=config, tensors=tensors, stage={"stage": "test"})
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, folder)
    return model


def logits_of(model: Explainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, -1]
