"""Start-up, memory and throughput of ``m2f2 detect``.

Run with: pytest tests/bench/test_detect_speed.py -m bench -s
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
from PIL import Image

from m2f2cli.inference.detect import DetectOptions, detect, load
from tests.inference.conftest import noise_picture

pytestmark = pytest.mark.bench
EXAMPLES = Path(__file__).parents[2] / "examples"
YARDSTICK = (
    "from m2f2cli.runtime import cure_torchvision; cure_torchvision();"
    "from transformers import CLIPModel"
)
ROUNDS = 5


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall time of a command and its largest memory in MB."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def test_a_cold_detect_of_one_photo() -> None:
    command = [sys.executable, "-m", "m2f2cli", "detect", str(EXAMPLES / "astronaut.jpg")]
    ours, theirs, memory = [], [], 0.0
    for _ in range(ROUNDS):
        theirs.append(seconds([sys.executable, "-c", YARDSTICK])[0])
        wall, used = seconds(command)
        ours.append(wall)
        memory = max(memory, used)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"\ncold detect {statistics.median(ours):.2f} s, importing CLIPModel "
        f"{statistics.median(theirs):.2f} s, ratio {ratio:.2f}; peak memory {memory:.0f} MB"
    )
    assert ratio <= 1.3
    assert memory < 900


def test_crops_a_second(tmp_path: Path) -> None:
    """The 144 test crops when M2F2_DDVQA names the data set, else as many of their size."""
    if root := os.environ.get("M2F2_DDVQA"):
        paths = sorted(map(str, (Path(root) / "images" / "c40" / "test").rglob("*.jpg")))
        paths = paths or sorted(map(str, (Path(root) / "images" / "c40" / "test").rglob("*.png")))
    else:
        paths = [str(noise_picture(tmp_path / f"{i}.jpg", i, (224, 224))) for i in range(144)]
        assert Image.open(paths[0]).size == (224, 224)
    options = DetectOptions(faces="none")
    model = load("lite", options)
    list(detect(paths[:16], model=model, options=options))
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        count = len(list(detect(paths, model=model, options=options)))
        rates.append(count / (time.perf_counter() - start))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(
        f"\n{len(paths)} crops: median {statistics.median(rates):.0f}, best {max(rates):.0f} "
        f"crops/s; peak memory {memory:.0f} MB"
    )
    assert max(rates) >= 60
