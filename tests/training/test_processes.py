from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from m2f2cli.checkpoints import io
from m2f2cli.training.detector import prepare, train_detector
from tests.training.conftest import TOY_KINDS

pytestmark = pytest.mark.slow  # starts processes, each of which loads torch

# Two processes at batch 3 are one at batch 6.
SCENARIOS = {
    # Nothing is normalised over a batch: the same gradients, so the same weights. The last step
    # of an epoch has three pictures: two here, one there.
    "equal": {"freeze_batch_norm": True, "epochs": 2, "limit": 18},
    # BatchNorm sees three pictures instead of six.
    "balanced": {
        "balance": True,
        "epochs": 2,
        "ema_decay": 0.5,
        "mixup": 0.2,
        "gradient_accumulation_steps": 2,
    },
    "resumed": {
        "balance": True,
        "epochs": 2,
        "ema_decay": 0.5,
        "mixup": 0.2,
        "gradient_accumulation_steps": 2,
    },
}


def start(*command: str, count: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **os.environ, **found, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory, toy_ffpp, toy_data, clip_folder):
    """Every scenario trained by two processes: the settings, what each saw, the folder."""
    from tests.training.conftest import options as fixture

    folder = tmp_path_factory.mktemp("together")
    build = fixture.__wrapped__(toy_data, clip_folder, folder)
    settings = {}
    (folder / "runs").mkdir()
    for name, changes in SCENARIOS.items():
        settings[name] = build(
            data=[f"ffpp:{toy_ffpp}", str(toy_data)],
            manipulations=list(TOY_KINDS),
            validation_frames=2,
            frames_per_video=1,
            batch_size=3,
            save_steps=3,
            output=folder / "runs" / name,
            **changes,
        )
        (folder / "runs" / f"{name}.yaml").write_text(settings[name].to_yaml())
    processes = start("-m", "tests.training.together", str(folder / "runs"))
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    seen = {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
        for name in SCENARIOS
    }
    return settings, seen, folder


def alone(settings, folder, **changes):
    given = settings.to_flat() | {"batch-size": 6, "output": str(folder)} | changes
    return type(settings).from_flat(given)


@pytest.mark.parametrize("name", ["equal", "balanced"])
def test_every_item_is_seen_exactly_once_an_epoch(together, tmp_path, name):
    settings, seen, _ = together
    run = prepare(alone(settings[name], tmp_path / "alone"))
    assert len(run.dataset) % 6 == 3 * (name == "equal")
    length, epochs = len(run.dataset), settings[name].optimizer.epochs
    both = [[i for batch in rank["seen"] for i in batch] for rank in seen[name]]
    assert not set(both[0]) & set(both[1])
    assert sorted(both[0] + both[1]) == list(range(epochs * length))
    assert (
        abs(len(both[0]) - len(both[1]))
        <= epochs * settings[name].optimizer.gradient_accumulation_steps
    )
    measured = len(run.measured)
    assert measured <= sum(rank["measured"] for rank in seen[name]) / epochs <= measured + 3


def test_two_processes_train_what_one_does(together, tmp_path):
    settings, _, folder = together
    lone = train_detector(alone(settings["equal"], tmp_path / "alone"))
    one, two = (load_file(f / "model.safetensors") for f in (lone, folder / "runs" / "equal"))
    apart = max(float((one[key].float() - two[key].float()).abs().max()) for key in one)
    assert apart < 2e-3  # two steps' worth of Adam where a gradient is nothing but rounding
    moved = [float((one[key] - two[key]).abs().mean()) for key in one if "head" in key]
    assert max(moved) < 1e-5
    figures = [io.read_stage(f)["metrics"]["epochs"] for f in (lone, folder / "runs" / "equal")]
    for a, b in zip(*figures, strict=True):
        assert a["step"] == b["step"]
        assert np.isclose(a["loss"], b["loss"], atol=1e-4)
        assert np.isclose(a["validation_loss"], b["validation_loss"], atol=1e-4)
        assert np.isclose(a["auc"], b["auc"], atol=0.02)


def test_figures_are_alike_with_batch_norm(together, tmp_path):
    settings, _, folder = together
    lone = train_detector(alone(settings["balanced"], tmp_path / "alone"))
    figures = [io.read_stage(f)["metrics"]["epochs"] for f in (lone, folder / "runs" / "balanced")]
    for a, b in zip(*figures, strict=True):
        assert abs(a["loss"] - b["loss"]) < 0.1
        assert abs(a["validation_loss"] - b["validation_loss"]) < 0.1


def test_resumed_in_two_processes_ends_bit_equal(together):
    _, seen, folder = together
    whole, resumed = (
        (folder / "runs" / name / "model.safetensors").read_bytes()
        for name in ("balanced", "resumed")
    )
    assert whole == resumed
    twice = [batch for rank in seen["resumed"] for batch in rank["seen"]]
    assert len(twice) > len([batch for rank in seen["balanced"] for batch in rank["seen"]])


def test_only_the_first_process_writes(together):
    _, seen, folder = together
    for name in SCENARIOS:
        first, second = (rank["written"] for rank in seen[name])
        assert any("checkpoint-" in path for path in first)
        assert second == []
        assert not (folder / "runs" / f"{name}.training").exists()


def test_torchrun(options, tmp_path):
    wanted = options(epochs=2, batch_size=3, ema_decay=0.9)
    (tmp_path / "settings.yaml").write_text(wanted.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "m2f2cli", "train-detector", "--config", str(tmp_path / "settings.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [str(wanted.run.output)]
    assert done.stderr.count("epoch 2/2: loss") == 1
    assert load_file(wanted.run.output / "model.safetensors")
