"""The Trainer gets the learning-rate schedule that was asked for."""

from __future__ import annotations

import pytest

from m2f2cli.training.explainer_settings import stage_arguments
from m2f2cli.training.settings import trainer_arguments
from tests.training.talks import stage_options


@pytest.mark.parametrize(
    ("asked", "told"),
    [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")],
)
def test_the_schedule_of_a_stage(tmp_path, asked, told):
    options = stage_options("align", tmp_path, tmp_path / "delta", schedule=asked)
    assert stage_arguments(options, tmp_path, measures=False).lr_scheduler_type == told


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("cosine", "cosine"),
        ("constant", "constant_with_warmup"),
        ("plateau", "constant_with_warmup"),
    ],
)
def test_the_schedule_of_a_detector(options, tmp_path, asked, told):
    warmup = 0.0 if asked == "plateau" else 0.1
    arguments = trainer_arguments(options(schedule=asked, warmup_ratio=warmup), tmp_path)
    assert arguments.lr_scheduler_type == told
