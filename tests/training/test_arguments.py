"""Learning rates follow the schedule that was asked for."""

from __future__ import annotations

import math

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau

from m2f2cli.training import detector, explainer
from tests.training.talks import stage_options, write_all


def rates(run) -> list[float]:
    """The learning rate of each step of a run, as a share of the highest."""
    found = []
    for _ in range(run.steps):
        found.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        if not isinstance(run.scheduler, ReduceLROnPlateau):  # which waits for an epoch's loss
            run.scheduler.step()
    return [rate / max(found) for rate in found]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("schedules"))


@pytest.mark.parametrize("asked", ["cosine", "linear", "constant"])
def test_the_schedule_of_a_stage(root, tmp_path, asked):
    settings = {"schedule": asked, "warmup_ratio": 0.5, "learning_rate": 1e-2, "epochs": 4}
    found = rates(explainer.prepare(stage_options("align", root, tmp_path / "delta", **settings)))
    top = found.index(1.0)
    assert found[0] == 0
    assert found[:top] == sorted(found[:top])
    wanted = {
        "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
        "linear": lambda share: 1 - share,
        "constant": lambda share: 1.0,
    }[asked]
    left = len(found) - top
    assert found[top:] == pytest.approx([wanted(n / left) for n in range(left)])


@pytest.mark.parametrize("asked", ["cosine", "constant", "plateau"])
def test_the_schedule_of_a_detector(options, asked):
    warmup = 0.0 if asked == "plateau" else 0.5
    found = rates(detector.prepare(options(schedule=asked, warmup_ratio=warmup, epochs=4)))
    assert (found[0] == 0) == bool(warmup)
    assert (found[-1] < 0.5) == (asked == "cosine")
