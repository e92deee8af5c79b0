"""``m2f2 merge`` of an r = 128 adapter into a base of about 3.5 GB: time and peak memory.

Run with: pytest tests/bench/test_merge.py -m bench -s --basetemp FOLDER-WITH-16-GB
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch

from m2f2cli.checkpoints import adapters, io
from m2f2cli.checkpoints.load import build_empty
from m2f2cli.models.explainer import ExplainerConfig
from tests.bench.test_init_llava import measured
from tests.conftest import tiny_fields

pytestmark = pytest.mark.bench
WORDS, WIDTH, INNER, RANK = 32000, 2048, 5632, 128
LAYERS, FEWER = 32, 8
ROUNDS = 2
GB = 1e9
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The usual way: everything in memory, merged there, saved.
WITH_PEFT = """
import sys
from m2f2cli.checkpoints.load import load_explainer
from peft import PeftModel

base, adapter, output = sys.argv[1:4]
model, _ = load_explainer(base, device="cpu", dtype="float16")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def base(folder: Path, layers: int) -> Path:
    """An explainer of random float16 with a tiny detector."""
    text = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    config = ExplainerConfig(detector_config=tiny_fields(), text_config=text)
    noise = (0.02 * torch.randn(WORDS * WIDTH)).half()
    tensors = {
        key: noise[: tensor.numel()].reshape(tensor.shape)
        if tensor.is_floating_point()
        else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for key, tensor in build_empty(config).state_dict().items()
    }
    fields = json.loads(config.to_json_string(use_diff=False))
    io.write_checkpoint(folder, config=fields, tensors=tensors, stage={"stage": "bench"})
    return folder


def adapter(folder: Path, parent: Path) -> Path:
    """Updates of every linear layer, and both projectors."""
    prefix = "base_model.model."
    noise = (0.02 * torch.randn(RANK * INNER)).bfloat16()
    tensors = {}
    for key, stored in io.open_tensors(parent).items():
        module = key.removesuffix(".weight")
        if key.startswith("language_model.") and module.endswith(LINEAR):
            outputs, inputs = stored.shape
            down = noise[: RANK * inputs].reshape(RANK, inputs)
            up = noise[: outputs * RANK].reshape(outputs, RANK)
            tensors |= {f"{prefix}{module}.lora_A.weight": down}
            tensors |= {f"{prefix}{module}.lora_B.weight": up}
        elif key.startswith(("mm_projector.", "forgery_projector.")):
            tensors[prefix + key] = stored.load().bfloat16()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": rf"language_model\..*\.({'|'.join(LINEAR)})",
        "modules_to_save": ["mm_projector", "forgery_projector"],
    }
    stage = {"stage": "lora", "parent": io.fingerprint(parent)}
    adapters.write_delta(folder, tensors=tensors, stage=stage, adapter=config)
    return folder


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / GB


def ours(source: Path, update: Path, output: Path) -> tuple[float, float, float]:
    command = ("merge", "--base", source, "--delta", update, "--output", output, "--quiet")
    result = measured(sys.executable, "-m", "m2f2cli", *map(str, command))
    assert size(output) > 0.99 * size(source)
    shutil.rmtree(output)
    return result


def test_time_and_memory_against_copying_and_peft(tmp_path):
    source = base(tmp_path / "base", LAYERS)
    update = adapter(tmp_path / "adapter", source)
    total = size(source)
    few = base(tmp_path / "few", FEWER)
    small = size(few)
    few_peak = ours(few, adapter(tmp_path / "few-adapter", few), tmp_path / "out")[-1]
    shutil.rmtree(few)
    copies, synced, mine, theirs = [], [], [], []
    for _ in range(ROUNDS):
        copy, out = tmp_path / "copy", tmp_path / "out"
        copies.append(measured("cp", "-r", str(source), str(copy)))
        shutil.rmtree(copy)
        script = f"cp -r {source} {copy} && find {copy} -type f -exec sync {{}} +"
        synced.append(measured("sh", "-c", script))
        shutil.rmtree(copy)
        mine.append(ours(source, update, out))
        theirs.append(measured(sys.executable, "-c", WITH_PEFT, str(source), str(update), str(out)))
        shutil.rmtree(out)
    shutil.rmtree(source)
    rows = {"cp -r": copies, "cp -r and sync": synced, "m2f2 merge": mine, "peft": theirs}
    seconds = {name: statistics.median(r[0] for r in runs) for name, runs in rows.items()}
    spent = {name: statistics.median(r[1] for r in runs) for name, runs in rows.items()}
    peaks = {name: max(r[2] for r in runs) for name, runs in rows.items()}
    print(f"\nbase of {total:.2f} GB, {LAYERS} layers, adapter r = {RANK} (medians of {ROUNDS})")
    for name, runs in rows.items():
        ratio = seconds[name] / seconds["cp -r and sync"]
        print(
            f"{name}: {seconds[name]:.1f} s ({ratio:.2f} of the synced copy; "
            f"{[round(r[0], 1) for r in runs]}), {spent[name]:.1f} processor seconds, peak "
            f"{peaks[name]:.2f} GB"
        )
    print(f"m2f2 merge, base of {small:.2f} GB, {FEWER} layers: peak {few_peak:.2f} GB")
    assert peaks["m2f2 merge"] < 1.5
    assert abs(peaks["m2f2 merge"] - few_peak) < 0.1
    assert seconds["m2f2 merge"] <= 1.5 * seconds["cp -r and sync"]
