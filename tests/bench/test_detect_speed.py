"""Start-up, memory and throughput of ``m2f2 detect`` with the bundled model.

Run with: M2F2_DDVQA=FOLDER pytest tests/bench/test_detect_speed.py -m bench -s
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
BASE = (
    "from m2f2cli.runtime import cure_torchvision; cure_torchvision(); "
    "from transformers import CLIPModel"
)
ROUNDS = 5


def seconds(*arguments: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd="/")
    return time.perf_counter() - begin


def test_a_cold_start_against_importing_clip():
    photo = str(ROOT / "examples" / "astronaut.jpg")
    base, ours = [], []
    for _ in range(ROUNDS):
        base.append(seconds("-c", BASE))
        ours.append(seconds("-m", "m2f2cli", "detect", photo))
    ratio = statistics.median(ours) / statistics.median(base)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"\ncold detect {statistics.median(ours):.2f} s, import of CLIPModel "
        f"{statistics.median(base):.2f} s, ratio {ratio:.2f}; largest peak memory {peak:.0f} MiB"
    )
    assert ratio <= 1.3
    assert peak * 1.048576 < 900


@pytest.mark.skipif("M2F2_DDVQA" not in os.environ, reason="M2F2_DDVQA is not set")
def test_pictures_a_second_after_start_up():
    from m2f2cli.inference.pipeline import DetectPipeline, detect
    from m2f2cli.options.detect import DetectOptions

    folder = Path(os.environ["M2F2_DDVQA"]) / "images" / "c40" / "test"
    options = DetectOptions(faces="none", device="cpu")
    model = DetectPipeline("lite", options).detector
    spent = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        records = list(detect([str(folder)], model=model, options=options))
        spent.append(time.perf_counter() - begin)
    assert len(records) == 144
    rate = len(records) / statistics.median(spent)
    print(f"\n{rate:.0f} pictures/s over {len(records)} crops, decoding included")
    assert rate >= 60


def test_optimized_networks_against_plain_torch():
    """What ``optimize_for_cpu`` is worth: without a tenth gained it would not be kept."""
    import torch

    from m2f2cli import load_detector
    from m2f2cli.inference.optimize_cpu import fold_batch_norms, optimize_for_cpu

    networks = {name: load_detector("lite", device="cpu") for name in ("plain", "folded", "all")}
    fold_batch_norms(networks["folded"].backbone.net)
    optimize_for_cpu(networks["all"])
    size = networks["plain"].config.image_size
    pictures = torch.randn(16, 3, size, size)
    spent: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for name, network in networks.items():
                begin = time.process_time()
                network(pictures)
                spent[name].append(time.process_time() - begin)
    median = {name: statistics.median(seen[1:]) for name, seen in spent.items()}
    rows = [f"{name} {seconds:.2f} s" for name, seconds in median.items()]
    print(f"\nprocessor seconds of a batch of 16: {', '.join(rows)}")
    assert median["plain"] > 1.1 * median["all"]
