"""The commands of this checkout against those of an older one, run in turn, as whole processes.

    M2F2_DDVQA=FOLDER python tests/bench/against.py OLD-CHECKOUT [--rounds 5] [--only merge …]

Prints, for each command, the median seconds and the largest peak of memory of both, and the median
of the ratios pair by pair (new / old). Both run with this Python, so with the same libraries.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHOTO = str(ROOT / "examples" / "astronaut.jpg")
STEPS, BATCH, HELD = 20, 16, 32


def run(checkout: Path, arguments: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak GB of ``m2f2`` from a checkout."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("M2F2_")}
    variables["PYTHONPATH"] = str(checkout)
    if arguments[0] == "train-detector" and not (checkout / "m2f2cli" / "options").exists():
        arguments = ["--init" if text == "--model" else text for text in arguments]  # before 0.2
    with (folder / "log").open("wb") as log:
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "m2f2cli", *arguments],
            cwd=folder,
            env=variables,
            stdout=log,
            stderr=log,
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        text = (folder / "log").read_text()[-2000:]
        raise SystemExit(f"{checkout}: m2f2 {' '.join(arguments)}\n{text}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def crops(part: str) -> list[Path]:
    return sorted((Path(os.environ["M2F2_DDVQA"]) / "images" / "c40" / part).glob("*.jpg"))


def help_page(folder: Path) -> list[str]:
    return ["--help"]


def detect_cold(folder: Path) -> list[str]:
    return ["detect", PHOTO]


def detect_144(folder: Path) -> list[str]:
    return ["detect", str(crops("test")[0].parent), "--faces", "none", "--output", "out/r.jsonl"]


def explain_one(folder: Path) -> list[str]:
    return ["explain", PHOTO]


def explain_20(folder: Path) -> list[str]:
    (folder / "twenty").mkdir()
    for file in crops("test")[::7][:20]:
        shutil.copy(file, folder / "twenty")
    return ["explain", "twenty", "--faces", "none", "--output", "out/r.jsonl"]


def merge(folder: Path) -> list[str]:
    from tests.bench import test_merge

    base = test_merge.base(folder / "base", test_merge.LAYERS)
    test_merge.adapter(folder / "adapter", base)
    return ["merge", "--base", "base", "--delta", "adapter", "--output", "out"]


def train(folder: Path) -> list[str]:
    """20 steps of 16 pictures; real ones begin with 5, as the data set names them."""
    for part, count in (("train", STEPS * BATCH), ("held", HELD)):
        for label, keep in (("real", True), ("fake", False)):
            (folder / part / label).mkdir(parents=True)
            files = [f for f in crops("train") if (f.name[0] == "5") is keep]
            begin = 0 if part == "train" else STEPS * BATCH // 2
            for number, file in enumerate(files[begin : begin + count // 2]):
                shutil.copy(file, folder / part / label / f"{part}{number}.jpg")
    options = {"data": "train", "validation": "held", "model": "lite", "epochs": 1}
    options |= {"batch-size": BATCH, "output": "out", "recipe": "published"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["train-detector", *flags]


CASES: dict[str, Callable[[Path], list[str]]] = {
    "m2f2 --help": help_page,
    "detect, one photo": detect_cold,
    "detect, 144 crops": detect_144,
    "explain, one photo": explain_one,
    "explain, 7 questions x 20": explain_20,
    "merge, 3.57 GB": merge,
    "train-detector, 20 steps": train,
}


def compare(name: str, old: Path, rounds: int) -> str:
    """Run one case in turn in both checkouts; gives its row."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arguments = CASES[name](folder)
        seen: dict[Path, list[tuple[float, float, float]]] = {old: [], ROOT: []}
        for turn in range(rounds + 1):
            for checkout, measured in seen.items():
                measured.append(run(checkout, arguments, folder))
                shutil.rmtree(folder / "out", ignore_errors=True)
            if not turn:
                for measured in seen.values():
                    measured.clear()  # the first one filled the disk's cache
    wall = [new[0] / before[0] for before, new in zip(seen[old], seen[ROOT], strict=True)]
    work = [new[1] / before[1] for before, new in zip(seen[old], seen[ROOT], strict=True)]
    times = [statistics.median(run[0] for run in measured) for measured in seen.values()]
    peaks = [max(run[2] for run in measured) for measured in seen.values()]
    return (
        f"{name:28} {times[0]:7.2f} s -> {times[1]:7.2f} s   wall {statistics.median(wall):.3f}   "
        f"processor {statistics.median(work):.3f}   peak {peaks[0]:.2f} -> {peaks[1]:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    arguments = parser.parse_args()
    for name in CASES:
        if not arguments.only or any(word in name for word in arguments.only):
            print(compare(name, arguments.old.resolve(), arguments.rounds), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
