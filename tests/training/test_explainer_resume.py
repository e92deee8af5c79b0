"""A stage that is killed goes on and ends with the bits of one that was not."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.io import write_tensor_file
from m2f2cli.errors import CheckpointError, ConfigError, UsageError
from m2f2cli.training import trainer
from m2f2cli.training.explainer import prepare
from m2f2cli.training.states import state_folder
from tests.training.talks import stage_options, train, write_all
from tests.training.test_resume import Crash

STAGES = ("align", "lora")
STATEFUL = {
    "epochs": 3,
    "save_steps": 1,
    "gradient_accumulation_steps": 2,
    "batch_size": 2,
    "weight_decay": 0.1,
    "validation_share": 0.3,
    "answer_tokens": 3,
    "eval_steps": 2,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("talks"))


def bits(folder):
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_and_resumed_stage_ends_bit_equal(stage, root, tmp_path):
    """Interrupted inside an epoch and right after one, resumed with other worker processes."""
    whole = train(stage_options(stage, root, tmp_path / "whole", **STATEFUL))
    figures = io.read_stage(whole)["metrics"]
    for step in (2, 8):
        output = tmp_path / f"cut{step}"
        run = prepare(stage_options(stage, root, output, **STATEFUL))
        with pytest.raises(KeyboardInterrupt):
            run.run(advance=Crash(step))
        assert not output.exists()
        options = stage_options(stage, root, output, **STATEFUL, resume=True, workers=step % 2)
        assert bits(train(options)) == bits(whole), step
        assert io.read_stage(output)["metrics"] == figures
        assert not state_folder(output).exists()
    if stage == "lora":
        others = STATEFUL | {"seed": 1}
        assert bits(train(stage_options(stage, root, tmp_path / "x", **others))) != bits(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_then_the_same_command_with_resume(stage, root, tmp_path):
    settings = STATEFUL | {"validation_share": 0.0, "eval_steps": 0}
    whole = train(stage_options(stage, root, tmp_path / "whole", **settings))
    killed = stage_options(stage, root, tmp_path / "killed", **settings)
    file = tmp_path / "stage.yaml"
    file.write_text(killed.to_yaml())
    command = [sys.executable, "-m", "m2f2cli", stage, "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    folder, wanted = state_folder(killed.run.output), random.randint(1, 14)
    deadline = time.monotonic() + 120
    while not any(int(s.parent.name[11:]) >= wanted for s in folder.glob("checkpoint-*/complete")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.run.output.exists()
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, check=True, env=environment
    )
    assert "Going on after step" in done.stderr
    assert done.stdout.strip() == str(killed.run.output)
    assert bits(killed.run.output) == bits(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_costs_no_step_that_was_saved(stage, root, tmp_path, monkeypatch):
    """Full while a state is saved, then while the delta is written."""
    saved = []

    def full(path, tensors):
        saved.append(path)
        if len(saved) < 3:
            return write_tensor_file(path, tensors)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def wanted(**changes):
        return stage_options(stage, root, tmp_path / "out", save_steps=1, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_tensor_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be saved .* No space left") as refused:
            train(wanted())
    assert "--resume" in refused.value.hint
    lines: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(io, "write_tensor_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            train(wanted(resume=True), notify=lines.append)
    assert "Going on after step 2 of 6." in lines
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]
    whole = train(stage_options(stage, root, tmp_path / "whole"))
    assert bits(train(wanted(resume=True))) == bits(whole)


@pytest.mark.slow
def test_unfinished_and_finished_stages_are_kept(root, tmp_path, monkeypatch):
    def wanted(**changes):
        return stage_options("align", root, tmp_path / "out", **changes)

    run = prepare(wanted(save_steps=1))
    with pytest.raises(KeyboardInterrupt):
        run.run(advance=Crash(2))
    with pytest.raises(UsageError, match="unfinished"):
        prepare(wanted())
    with pytest.raises(ConfigError, match=r"--learning-rate is 0\.5"):
        prepare(wanted(resume=True, learning_rate=0.5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="has 2 processes"):
        prepare(wanted(resume=True))
    monkeypatch.delenv("WORLD_SIZE")
    folder = train(wanted(resume=True))
    before = bits(folder)
    with pytest.raises(CheckpointError, match="not empty"):
        prepare(wanted())
    lines: list[str] = []
    assert train(wanted(resume=True), notify=lines.append) == folder
    assert "finished already" in lines[0]
    assert bits(folder) == before
    train(wanted(overwrite=True, learning_rate=1e-3))
    assert bits(folder) != before
