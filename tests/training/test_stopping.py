from __future__ import annotations

import pytest
from safetensors.torch import load_file

from m2f2cli.checkpoints import io
from m2f2cli.errors import ConfigError, M2F2Error
from m2f2cli.training import states
from m2f2cli.training.detector import DetectorTrainer, prepare, state_folder, train_detector
from tests.training.test_resume import Crash, weights

# Nothing moves, so no epoch is better than the first.
STILL = {"learning_rate": 0.0, "prompt_lr": 0.0, "vision_alpha_lr": 0.0, "text_alpha_lr": 0.0,
         "freeze_batch_norm": True, "epochs": 9, "early_stopping_patience": 2,
         "save_steps": 1}  # fmt: skip


def test_a_run_that_gets_no_better_stops_and_says_so(options):
    lines: list[str] = []
    folder = train_detector(options(**STILL), notify=lines.append)
    metrics = io.read_stage(folder)["metrics"]
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2, 3]
    assert metrics["stopped_after"] == 3
    assert metrics["selected"]["epoch"] == 1
    assert "Stopped after epoch 3: no better auc for 2 epochs." in lines
    assert not state_folder(folder).exists()


def test_a_run_that_gets_better_goes_on(options):
    folder = train_detector(
        options(epochs=4, early_stopping_patience=3, select="loss", learning_rate=1e-3)
    )
    metrics = io.read_stage(folder)["metrics"]
    assert len(metrics["epochs"]) == 4
    assert "stopped_after" not in metrics


@pytest.mark.slow
def test_an_interrupted_run_stops_where_it_would_have(options, tmp_path):
    whole = train_detector(options(**STILL, output=tmp_path / "whole"))
    run = prepare(options(**STILL))
    with pytest.raises(KeyboardInterrupt):
        run.run(advance=Crash(7))
    resumed = train_detector(options(**STILL, resume=True))
    assert weights(resumed) == weights(whole)
    figures = [io.read_stage(folder)["metrics"] for folder in (whole, resumed)]
    assert figures[0] == figures[1]


def test_a_stopped_run_that_could_not_write_trains_no_further(options, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(DetectorTrainer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_detector(options(**STILL))
    monkeypatch.undo()
    run = prepare(options(**STILL, resume=True))
    folder = run.run(advance=Crash(10))
    assert io.read_stage(folder)["metrics"]["stopped_after"] == 3


def test_there_must_be_a_figure_to_watch(options):
    with pytest.raises(ConfigError, match=r"--early-stopping-patience .* --select last"):
        options(early_stopping_patience=1, select="last")


@pytest.mark.slow
def test_two_small_batches_make_one_step_of_a_large_one(options, tmp_path):
    given = {"freeze_batch_norm": True, "epochs": 2, "limit": 7}  # 14 pictures: 6, 6 and 2
    given |= {"weight_decay": 0.0, "validation_share": 0.25, "seed": 2}
    one = train_detector(options(**given, batch_size=6, output=tmp_path / "one"))
    two = train_detector(
        options(**given, batch_size=3, gradient_accumulation_steps=2, output=tmp_path / "two")
    )
    other = train_detector(options(**given, batch_size=3, output=tmp_path / "other"))
    first, second, third = (load_file(f / "model.safetensors") for f in (one, two, other))
    names = [name for name, tensor in first.items() if tensor.is_floating_point()]
    near = max(float((first[name] - second[name]).abs().mean()) for name in names)
    far = max(float((first[name] - third[name]).abs().mean()) for name in names)
    assert near < 1e-5 < 1e-4 < far
    epochs = [io.read_stage(folder)["metrics"]["epochs"] for folder in (one, two)]
    for a, b in zip(*epochs, strict=True):
        assert a["step"] == b["step"]
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["validation_loss"] - b["validation_loss"]) < 1e-4


def test_a_second_training_into_one_output_is_told(options):
    chosen = options(**STILL)
    with states.claim_output(chosen):
        for more in ({}, {"overwrite": True}):
            with pytest.raises(M2F2Error, match="Another process is training into"):
                train_detector(options(**STILL, **more))
        assert (state_folder(chosen.run.output) / "options.json").exists()
    with states.claim_output(options(**STILL, overwrite=True)):
        pass
