from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from m2f2cli.errors import CheckpointError, ConfigError, UsageError
from m2f2cli.training.detector import prepare, state_folder, train_detector

# Everything that has a state: dropout and drop-path draws, mixup, average, schedule, best epoch.
STATEFUL = {
    "epochs": 3,
    "save_steps": 1,
    "ema_decay": 0.9,
    "mixup": 0.3,
    "dropout": 0.2,
    "label_smoothing": 0.05,
    "self_blend": 0.4,
    "balance": True,
    "learning_rate": 3e-3,
}


class Crash:
    """Interrupts a run once so many of its steps are done: given as ``advance``."""

    def __init__(self, step):
        self.step = step
        self.done = 0

    def __call__(self, steps, words):
        self.done += steps
        if words and self.done == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({"schedule": "plateau", "plateau_patience": 0, "plateau_cooldown": 0}, (1, 4)),
        (
            {
                "schedule": "cosine",
                "warmup_ratio": 0.2,
                "gradient_accumulation_steps": 2,
                "save_steps": 2,
            },
            (3,),
        ),
    ],
)
def test_interrupted_and_resumed_run_ends_bit_equal(options, tmp_path, schedule, steps):
    settings = STATEFUL | schedule
    whole = train_detector(options(**settings, output=tmp_path / "whole"))
    for step in steps:
        output = tmp_path / f"cut{step}"
        run = prepare(options(**settings, output=output))
        with pytest.raises(KeyboardInterrupt):
            run.run(advance=Crash(step))
        assert not output.exists()
        resumed = train_detector(options(**settings, output=output, resume=True, workers=step % 2))
        assert weights(resumed) == weights(whole), step
        assert not state_folder(output).exists()


@pytest.mark.slow
def test_sigkill_then_the_same_command_with_resume(options, tmp_path):
    settings = STATEFUL | {"epochs": 4}
    whole = train_detector(options(**settings, output=tmp_path / "whole"))
    killed = options(**settings, output=tmp_path / "killed")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(killed.to_yaml())
    command = [sys.executable, "-m", "m2f2cli", "train-detector", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    states = state_folder(killed.run.output)
    deadline = time.monotonic() + 120
    while not list(states.glob("checkpoint-*/complete")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.run.output.exists()
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, check=True, env=environment
    )
    assert "Going on after step" in done.stderr
    assert done.stdout.strip() == str(killed.run.output)
    assert weights(killed.run.output) == weights(whole)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
@pytest.mark.parametrize("name", ["optimizer.pt", "progress.json", "model.safetensors"])
def test_a_damaged_state_is_said(options, tmp_path, name, damage):
    run = prepare(options(save_steps=1, epochs=2))
    with pytest.raises(KeyboardInterrupt):
        run.run(advance=Crash(1))
    (file,) = state_folder(run.options.run.output).glob(f"checkpoint-*/{name}")
    content = file.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "changed": b"[1]" + content[3:]}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=r"The saved state '.*checkpoint-1' is damaged"):
        train_detector(options(save_steps=1, epochs=2, resume=True))


@pytest.mark.slow
def test_half_written_state_is_ignored(options, tmp_path):
    run = prepare(options(save_steps=1))
    with pytest.raises(KeyboardInterrupt):
        run.run(advance=Crash(2))
    states = state_folder(run.options.run.output)
    broken = states / "checkpoint-99"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    train_detector(options(save_steps=1, resume=True))
    whole = train_detector(options(output=tmp_path / "whole"))
    assert weights(run.options.run.output) == weights(whole)


@pytest.mark.slow
def test_disk_full_while_saving_keeps_the_state_before(options, tmp_path, monkeypatch):
    saves = []

    def full_at_the_third(value, path, *_, **__):
        if str(path).endswith("optimizer.pt"):
            saves.append(path)
            if len(saves) == 3:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(value, path)

    original = torch.save
    monkeypatch.setattr(torch, "save", full_at_the_third)
    with pytest.raises(CheckpointError, match=r"cannot be saved .* No space left") as refused:
        train_detector(options(save_steps=1))
    assert "--resume" in refused.value.hint
    monkeypatch.undo()
    lines: list[str] = []
    folder = train_detector(options(save_steps=1, resume=True), notify=lines.append)
    assert "Going on after step 2 of 6." in lines
    assert weights(folder) == weights(train_detector(options(output=tmp_path / "whole")))


def test_unfinished_run_is_not_lost_by_accident(options, monkeypatch):
    run = prepare(options(save_steps=1))
    with pytest.raises(KeyboardInterrupt):
        run.run(advance=Crash(2))
    with pytest.raises(UsageError, match="unfinished") as refused:
        prepare(options(save_steps=1))
    assert "--resume" in refused.value.hint
    with pytest.raises(ConfigError, match=r"--learning-rate is 0\.5"):
        prepare(options(resume=True, learning_rate=0.5))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"has 2 processes, .* begun with 1"):
        prepare(options(resume=True))


def test_finished_output_is_kept(options):
    folder = train_detector(options(epochs=1))
    before = weights(folder)
    with pytest.raises(CheckpointError, match="not empty"):
        train_detector(options(epochs=1))
    lines: list[str] = []
    assert train_detector(options(epochs=1, resume=True), notify=lines.append) == folder
    assert "finished already" in lines[0]
    assert weights(folder) == before
    train_detector(options(epochs=1, overwrite=True, seed=1))
    assert weights(folder) != before
    assert load_file(folder / "model.safetensors")
