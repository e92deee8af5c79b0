"""Damaged checkpoints by the thousand: each must be read, or refused in one sentence.

    python -m tests.bench.mutate_checkpoints --seed 1 --inputs 2000

Files of every format that a checkpoint has are changed by structure (another type, a huge number, a
name of code, a level of nesting) or by bytes, and given to the commands that read them, in a child
with little memory and a time-out. One row is printed: inputs, how many were read and refused,
unexpected errors, hangs, crashes and the peak memory of a child; before it, one line a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m2f2cli.runtime import cure_torchvision

cure_torchvision()

from m2f2cli.checkpoints import io  # noqa: E402
from m2f2cli.checkpoints.adapters import open_delta  # noqa: E402
from m2f2cli.checkpoints.convert import import_weights  # noqa: E402
from m2f2cli.checkpoints.initialize import init_llava  # noqa: E402
from m2f2cli.checkpoints.inspect import inspect_checkpoint  # noqa: E402
from m2f2cli.checkpoints.load import load_detector, load_explainer  # noqa: E402
from m2f2cli.errors import M2F2Error  # noqa: E402
from m2f2cli.models.tokenizer import load_tokenizer  # noqa: E402
from tests.checkpoints import llavas, merges, published  # noqa: E402
from tests.conftest import write_detector  # noqa: E402

SECONDS, BATCH = 60, 25
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**9, 10**40, -(2**63), 0.5, -0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "auto", "../..", "/etc/passwd", "owner/model", "\ud800", "a" * 10_000),
    *([], [[]], [1, 2, 3], [0.5] * 3, ["x"], {}, {"a": 1}, {"a": {"b": []}}, [None], ["\0"]),
)
NAMES = (
    *("checkpoint_path", "pretrained", "auto_map", "attn_implementation", "_attn_implementation"),
    *("quantization_config", "hf_model_name", "trust_remote_code", "torch_dtype", "dtype", "peft"),
    *("model_type", "peft_type", "text_config", "vision_config", "fingerprint", "legacy", "added"),
)


def make(folder: Path) -> dict[str, tuple[Path, str, Callable[[Path], object]]]:
    """Good files: for each kind its folder (or file), the file that is changed, and a reader."""
    detector = write_detector(folder / "detector")
    explainer = merges.base(folder / "explainer")
    pair = folder / "pair"
    write_detector(pair / "detector")
    io.share(detector, pair / "shared", begin="", source=pair / "detector")
    adapter = merges.stage_3(folder / "adapter", explainer)
    llava = llavas.write(folder / "llava", llavas.original(), llavas.ORIGINAL_CONFIG)
    llavas.detector(folder / "judge")
    foreign = folder / "foreign"
    foreign.mkdir()
    torch.save(published.stage_1(published.detector("detector_b")), foreign / "x.pth")
    torch.save(
        published.detector("detector_b"),
        foreign / "y.pth",
        _use_new_zipfile_serialization=False,
    )
    clip = folder / "clip.json"

    def judge(path: Path) -> None:
        inspect_checkpoint(str(path), verify=True)
        load_detector(str(path))

    def explain(path: Path) -> None:
        inspect_checkpoint(str(path), verify=True)
        load_explainer(str(path))

    def build(path: Path) -> None:
        init_llava(str(path), str(folder / "judge"), path.parent / "built", overwrite=True)

    def take(path: Path) -> None:
        inspect_checkpoint(str(path))
        import_weights([path], path.parent / "taken", clip_config=clip, overwrite=True)

    def merge(path: Path) -> None:
        inspect_checkpoint(str(path))
        open_delta(path)

    weights = "model.safetensors"
    return {
        "detector config": (detector, "config.json", judge),
        "detector stage": (detector, "stage.json", judge),
        "detector safetensors": (detector, weights, judge),
        "shared": (pair, "shared/shared.json", lambda path: judge(path / "shared")),
        "explainer config": (explainer, "config.json", explain),
        "explainer tokenizer": (explainer, "tokenizer_config.json", load_tokenizer),
        "sentencepiece": (explainer, "tokenizer.model", load_tokenizer),
        "explainer safetensors": (explainer, weights, explain),
        "adapter config": (adapter, "adapter_config.json", merge),
        "adapter safetensors": (adapter, "adapter_model.safetensors", merge),
        "adapter stage": (adapter, "stage.json", merge),
        "llava config": (llava, "config.json", build),
        "llava tokenizer": (llava, "tokenizer.json", build),
        "tokenizer": (llava, "tokenizer.json", load_tokenizer),
        "pickle": (foreign, "x.pth", lambda path: take(path / "x.pth")),
        "old pickle": (foreign, "y.pth", lambda path: take(path / "y.pth")),
    }


def change_json(value: Any, dice: random.Random) -> Any:
    """Change one place of plain data."""
    places: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        part = rest.pop()
        keys = part if isinstance(part, dict) else range(len(part))
        for key in keys:
            places.append((part, key))
            if isinstance(part[key], dict | list) and len(places) < 20_000:
                rest.append(part[key])
    if not places:
        return copy.deepcopy(dice.choice(ODD))
    part, key = dice.choice(places)
    way = dice.random()
    if way < 0.6:
        part[key] = copy.deepcopy(dice.choice(ODD))
    elif way < 0.7:
        del part[key]
    elif way < 0.85 and isinstance(part, dict):
        part[dice.choice(NAMES)] = copy.deepcopy(dice.choice(ODD))
    elif way < 0.95:
        for _ in range(dice.choice((1, 5, 200))):
            part[key] = [part[key]] if dice.random() < 0.5 else {"a": part[key]}
    else:
        return copy.deepcopy(dice.choice(ODD))
    return value


def change_bytes(data: bytes, dice: random.Random, limit: int | None = None) -> bytes:
    """Flip, cut, double or fill some bytes, of the first ``limit`` ones."""
    content = bytearray(data)
    end = min(len(content), limit or len(content))
    for _ in range(dice.choice((1, 1, 2, 8))):
        place = dice.randrange(max(1, end))
        length = dice.choice((1, 1, 4, 64))
        way = dice.random()
        if way < 0.6:
            content[place : place + length] = dice.randbytes(length)
        elif way < 0.75:
            content[place:place] = content[place : place + length]
        elif way < 0.9:
            del content[place : place + length]
        else:
            del content[place:]
    return bytes(content)


def change(path: Path, dice: random.Random) -> None:
    """Change a file in the way of its format, or some of its bytes."""
    data = path.read_bytes()
    if path.suffix == ".json" and dice.random() < 0.9:
        value = json.loads(data)
        for _ in range(dice.choice((1, 1, 1, 3))):
            value = change_json(value, dice) if isinstance(value, dict | list) else value
        data = json.dumps(value).encode()
    elif path.suffix == ".safetensors" and dice.random() < 0.8:
        length = int.from_bytes(data[:8], "little")
        if dice.random() < 0.6:
            header = json.dumps(change_json(json.loads(data[8 : 8 + length]), dice)).encode()
        else:
            header = change_bytes(data[8 : 8 + length], dice)
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    elif path.suffix == ".pth":
        begin = max(0, data.find(b"\x80\x02"))
        data = data[:begin] + change_bytes(data[begin:], dice, dice.choice((200, 4000, None)))
    else:
        data = change_bytes(data, dice)
    path.write_bytes(data)


def attempt(home: Path, kind: str, seed: str, readers: dict[str, Any]) -> str:
    """Change one file and read it: ``read``, ``refused``, or the unexpected error in words."""
    source, name, read = readers[kind]
    room = home / "room"
    shutil.rmtree(room, ignore_errors=True)
    folder = shutil.copytree(source, room / source.name)
    change(folder / name, random.Random(seed))
    try:
        read(folder)
    except M2F2Error as error:
        return f"more than a line: {error.message!r}" if "\n" in error.message else "refused"
    except Exception as error:  # noqa: BLE001 - any other is a fault
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def batch(home: Path, jobs: list[tuple[str, str]], readers: dict[str, Any], report: int) -> None:
    """Work through some inputs in this process, one line of JSON each."""
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    for kind, seed in jobs:
        said = attempt(home, kind, seed, readers)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        os.write(report, (json.dumps([said, peak]) + "\n").encode())


def run(home: Path, jobs: list[tuple[str, str]], readers: dict[str, Any]) -> Counter[str]:
    """Every input in a child; a child that hangs or dies is replaced behind its input."""
    counts: Counter[str] = Counter()
    while jobs:
        chunk, (begin, end) = jobs[:BATCH], os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                batch(home, chunk, readers, end)
            finally:
                os._exit(0)  # the parent removes the folder
        os.close(end)
        done, text = 0, b""
        while done < len(chunk):
            ready = select.select([begin], [], [], SECONDS)[0]
            piece = os.read(begin, 1 << 16) if ready else b""
            text += piece
            *lines, text = text.split(b"\n")
            for line in lines:
                said, peak = json.loads(line)
                outcome = said if said in ("read", "refused") else "unexpected"
                counts[outcome] += 1
                counts["peak"] = max(counts["peak"], peak)
                if outcome == "unexpected":
                    sys.stdout.write(f"{chunk[done]}: {said}\n")
                done += 1
            if not piece:
                outcome = "crash" if ready else "hang"
                counts[outcome] += 1
                sys.stdout.write(f"{chunk[done]}: {outcome}\n")
                done += 1
                break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(begin)
        sys.stdout.flush()
        jobs = jobs[done:]
    return counts


def main() -> None:
    """Make good files, change them, print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--begin", type=int, default=0, help="the first input to run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        readers = make(Path(place))
        kinds = [kind for kind in readers if given.only in kind]
        jobs = [(kinds[n % len(kinds)], f"{given.seed}-{n}") for n in range(given.inputs)]
        counts = run(Path(place), jobs[given.begin :], readers)
    names = ("read", "refused", "unexpected", "hang", "crash")
    row = "  ".join(f"{name} {counts[name]}" for name in names)
    sys.stdout.write(f"inputs {len(jobs) - given.begin}  {row}  peak {counts['peak']} MB\n")


if __name__ == "__main__":
    main()
