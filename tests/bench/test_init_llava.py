"""``m2f2 init-llava`` on a base of about 3 GB in shards of 1 GB: peak memory and time.

Run with: pytest tests/bench/test_init_llava.py -m bench -s --basetemp FOLDER-WITH-12-GB
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m2f2cli.checkpoints import io
from m2f2cli.files import json_bytes
from m2f2cli.models.detector import Detector, DetectorConfig
from tests.checkpoints import llavas
from tests.conftest import TINY_CLIP, randomise

pytestmark = pytest.mark.bench
WORDS, WIDTH, INNER, LAYERS = 32000, 2048, 5632, 28
TOWER = {**TINY_CLIP["vision"], "hidden_size": 1024, "image_size": 336, "patch_size": 14}
ROUNDS = 3
GB = 1e9


def detector(folder: Path) -> Path:
    config = DetectorConfig(
        clip={"library": "transformers", "vision": TOWER, "text": TINY_CLIP["text"]},
        hidden_size=64,
    )
    model = randomise(Detector(config))
    processor = io.preprocessor_config(336, config.image_mean, config.image_std)
    io.write_checkpoint(
        folder,
        config=config.to_dict(),
        tensors=model.state_dict(),
        stage={"stage": "bench"},
        extra_files={"preprocessor_config.json": json_bytes(processor)},
    )
    return folder


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, WIDTH),
        "lm_head.weight": (WORDS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "model.mm_projector.0.weight": (WIDTH, 1024),
        "model.mm_projector.0.bias": (WIDTH,),
        "model.mm_projector.2.weight": (WIDTH, WIDTH),
        "model.mm_projector.2.bias": (WIDTH,),
    }
    for n in range(LAYERS):
        begin = f"model.layers.{n}."
        found |= {f"{begin}self_attn.{k}_proj.weight": (WIDTH, WIDTH) for k in "qkvo"}
        found |= {f"{begin}mlp.{k}_proj.weight": (INNER, WIDTH) for k in ("gate", "up")}
        found[f"{begin}mlp.down_proj.weight"] = (WIDTH, INNER)
        found |= {f"{begin}{k}_layernorm.weight": (WIDTH,) for k in ("input", "post_attention")}
    return found


def base(folder: Path, layout: str) -> Path:
    """A LLaVA of random float16 in shards of about 1 GB, in its own layout."""
    config = llavas.ORIGINAL_CONFIG | {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": WORDS,
        "mm_hidden_size": 1024,
    }
    llavas.write(folder, {"x": torch.ones(1)}, config, layout=layout)
    stem, suffix = ("model", "safetensors") if layout == "safetensors" else ("pytorch_model", "bin")
    (folder / f"{stem}.{suffix}").unlink()
    noise = torch.randn(WORDS * WIDTH, dtype=torch.float32).half()
    groups: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for key, shape in shapes().items():
        count = int(torch.Size(shape).numel())
        size += 2 * count
        if size > GB:
            groups.append({})
            size = 2 * count
        groups[-1][key] = (noise[:count] + len(key) % 3).reshape(shape)
    mapping = {}
    for n, group in enumerate(groups, start=1):
        name = f"{stem}-{n:05d}-of-{len(groups):05d}.{suffix}"
        save_file(group, folder / name) if suffix == "safetensors" else torch.save(
            group, folder / name
        )
        mapping |= dict.fromkeys(group, name)
        group.clear()
    index = {"metadata": {}, "weight_map": mapping}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


# A process inherits the peak of the one that started it; so a small one stands between.
STARTER = (
    "import os, resource, sys, time\n"
    "begin = time.perf_counter()\n"
    "pid = os.fork()\n"
    "pid or os.execvp(sys.argv[1], sys.argv[1:])\n"
    "_, status, usage = os.wait4(pid, 0)\n"
    "spent = usage.ru_utime + usage.ru_stime\n"
    "print('measured', status, time.perf_counter() - begin, spent, usage.ru_maxrss * 1024)\n"
)


def measured(*command: str) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak GB of a process (mapped files included)."""
    starter = [sys.executable, "-c", STARTER, *command]
    out = subprocess.run(starter, check=True, capture_output=True, text=True).stdout
    status, seconds, spent, peak = out.splitlines()[-1].split()[1:]
    assert status == "0"
    return float(seconds), float(spent), float(peak) / GB


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_memory_and_time_against_copying(tmp_path, layout):
    source = base(tmp_path / "base", layout)
    judge = detector(tmp_path / "detector")
    size = sum(file.stat().st_size for file in source.iterdir())
    largest = 2 * WORDS * WIDTH / GB
    ours, copies, starts = [], [], []
    for _ in range(ROUNDS):
        copy, out = tmp_path / "copy", tmp_path / "out"
        script = f"cp -r {source} {copy} && find {copy} -type f -exec sync {{}} +"
        copies.append(measured("sh", "-c", script))
        shutil.rmtree(copy)
        command = ("init-llava", "--llava", source, "--detector", judge, "--output", out)
        ours.append(measured(sys.executable, "-m", "m2f2cli", *map(str, command), "--quiet"))
        assert size < sum(file.stat().st_size for file in out.iterdir()) < 1.2 * size
        shutil.rmtree(out)
        starts.append(measured(sys.executable, "-c", "import m2f2cli.checkpoints.initialize"))
    shutil.rmtree(source)
    peak = max(row[2] for row in ours)
    print(
        f"\ninit-llava, base of {size / GB:.2f} GB ({layout}), largest tensor {largest:.2f} GB: "
        f"peak memory {peak:.2f} GB; {middle(ours)}, of that start-up {middle(starts)}; "
        f"cp -r and sync {middle(copies)} (medians of {ROUNDS})"
    )
    assert peak < largest + 1.0


def middle(rows: list[tuple[float, float, float]]) -> str:
    wall, spent = (statistics.median(row[column] for row in rows) for column in (0, 1))
    return f"{wall:.1f} s ({spent:.1f} s of processor time)"
