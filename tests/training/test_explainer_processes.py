"""Stages 2 and 3 in two processes, with and without DeepSpeed, equal one of the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from m2f2cli.checkpoints import io
from m2f2cli.training.explainer import prepare
from m2f2cli.training.states import state_folder
from tests.training.talks import stage_options, write_all
from tests.training.test_processes import start

STAGES = ("align", "lora")
SETTINGS = {
    "epochs": 2,
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "validation_share": 0.3,
    "answer_tokens": 4,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
}
PLAIN = {"align": {}, "lora": {"lora_dropout": 0.0, "projector_lr": 1e-3}}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("talks"))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """Each stage trained by one process at twice the batch size: its folder and its log."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for stage in STAGES:
        settings = SETTINGS | PLAIN[stage] | {"batch_size": 6}
        run = prepare(stage_options(stage, root, folder / stage, **settings))
        found[stage] = run.run(), run.history
    return found


def together(root: Path, folder: Path, **changes: object) -> dict[str, tuple[Path, list]]:
    """Each stage trained by two processes."""
    for stage in STAGES:
        settings = SETTINGS | PLAIN[stage] | changes
        options = stage_options(stage, root, folder / stage, **settings)
        (folder / f"{stage}.yaml").write_text(options.to_yaml())
    launch(folder)
    logs = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in STAGES}
    return {stage: (folder / stage, logs[stage]) for stage in STAGES}


def launch(folder: Path, *more: str) -> None:
    processes = start("-m", "tests.training.stages_together", str(folder), *more)
    told = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told


def check(one, two, *, weights: float, loss: float) -> None:
    (first, log), (second, other) = one, two
    names = [file.name for file in first.glob("*.safetensors")]
    a, b = (load_file(folder / names[0]) for folder in (first, second))
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < weights
    for key in ("loss", "eval_loss", "eval_judged_accuracy", "learning_rate"):
        curves = [[entry[key] for entry in each if key in entry] for each in (log, other)]
        assert curves[0]
        assert np.allclose(*curves, atol=loss), key
    assert io.read_stage(second)["processes"] == 2


@pytest.mark.slow
def test_two_processes_train_what_one_does(root, alone, tmp_path):
    """The last step of an epoch is uneven, and both stages accumulate."""
    two = together(root, tmp_path)
    for stage in STAGES:
        check(alone[stage], two[stage], weights=1e-4, loss=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "count", "zero"),
    [
        (("torch.distributed.run", "--nproc-per-node", "2"), 2, None),
        (("accelerate.commands.launch", "--cpu", "--num_processes", "1"), 1, None),
        pytest.param(
            ("torch.distributed.run", "--nproc-per-node", "2"), 2, "zero2", marks=needs_deepspeed
        ),
    ],
)
def test_launchers(root, tmp_path, launcher, count, zero):
    options = stage_options("align", root, tmp_path / "delta", deepspeed=zero)
    (tmp_path / "align.yaml").write_text(options.to_yaml())
    command = [sys.executable, "-m", *launcher, "-m", "m2f2cli", "align"]
    done = subprocess.run(
        [*command, "--config", str(tmp_path / "align.yaml")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == [str(tmp_path / "delta")]
    assert io.read_stage(tmp_path / "delta")["processes"] == count


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_deepspeed_trains_what_one_process_does(root, alone, tmp_path, zero):
    two = together(root, tmp_path, deepspeed=zero)
    for stage in STAGES:
        check(alone[stage], two[stage], weights=1e-3, loss=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "zero", ["none", *(pytest.param(z, marks=needs_deepspeed) for z in ("zero2", "zero3"))]
)
def test_resumed_in_two_processes_ends_bit_equal(root, tmp_path, stage, zero):
    settings = {"epochs": 2, "save_steps": 1, "deepspeed": None if zero == "none" else zero}
    for name in ("whole", "cut"):
        options = stage_options(stage, root, tmp_path / name / "delta", **settings)
        (tmp_path / name).mkdir()
        file = tmp_path / name / f"{stage}.yaml"
        file.write_text(options.to_yaml())
        if name == "cut":
            launch(tmp_path / name, "4")
            assert not options.run.output.exists()
            states = list(state_folder(options.run.output).glob("checkpoint-3/**/*"))
            assert sum(file.stat().st_size for file in states if file.is_file()) < 400_000
            file.write_text(file.read_text().replace("resume: false", "resume: true"))
        launch(tmp_path / name)
    whole, cut = (
        [file.read_bytes() for file in (tmp_path / name / "delta").glob("*.safetensors")]
        for name in ("whole", "cut")
    )
    assert len(whole) == 1
    assert whole == cut
