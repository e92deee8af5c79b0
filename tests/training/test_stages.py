from __future__ import annotations

import pytest
import torch

from m2f2cli.training.detector import prepare
from m2f2cli.training.objective import PARAMETER_GROUPS, STAGES, group_of


def one_step(options):
    """Train one step: the objective, its tensors before and after, and what got gradients."""
    run = prepare(options)
    objective = run.model
    before = {name: t.clone() for name, t in objective.state_dict().items()}
    objective.train()
    batch = next(iter(run.loader))
    objective(**batch)["loss"].backward()
    with_gradient = {n for n, p in objective.named_parameters() if p.grad is not None}
    run.optimizer.step()
    return objective, before, dict(objective.state_dict()), with_gradient


def trainable(objective) -> set[str]:
    return {name for name, p in objective.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bridge", [False, True])
def test_after_a_step_exactly_the_stage_moved(options, stage, bridge):
    changes = {"train": stage, "bridge": bridge, "vision_layer": -1, "kind_weight": 0.1}
    objective, before, after, with_gradient = one_step(options(**changes, label_smoothing=0.1))
    moving = {
        name
        for name, _ in objective.named_parameters()
        if group_of(name.removeprefix("detector.")) in STAGES[stage]
    }
    assert trainable(objective) == moving
    assert with_gradient == moving
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    parameters = {name for name, _ in objective.named_parameters()}
    assert changed & parameters == moving
    statistics = changed - parameters
    assert all(name.startswith("detector.backbone.") for name in statistics)
    assert bool(statistics) == ("backbone" in STAGES[stage])


def test_frozen_stages_keep_weights_and_statistics(options):
    objective, before, after, with_gradient = one_step(options(freeze_stages=2))
    first = tuple(
        f"detector.backbone.net.{n}" for n in ("conv_stem", "bn1", "blocks.0", "blocks.1")
    )
    frozen = {name for name in before if name.startswith(first)}
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not trainable(objective) & frozen
    assert with_gradient == trainable(objective)
    assert any(".blocks.2." in name for name in with_gradient)


def test_frozen_batch_norm_keeps_statistics_but_trains(options):
    _, before, after, with_gradient = one_step(options(freeze_batch_norm=True))
    running = [name for name in before if "running_" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert "detector.backbone.net.bn1.weight" in with_gradient


def test_groups_cover_every_trainable_parameter_once(options):
    objective = prepare(options(layer_decay=0.8, decay_all=False, weight_decay=0.1)).model
    named = objective.named_weights()
    groups = objective.optimizer_groups()
    name_of = {id(parameter): name for name, parameter in named.items()}
    names = [name_of[id(parameter)] for group in groups for parameter in group["params"]]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, p in named.items() if p.requires_grad}
    assert {group["group"] for group in groups} == set(STAGES["published"]) - {
        "auxiliary",
        "clip_lora",
    }
    by_name = {name_of[id(p)]: group for group in groups for p in group["params"]}
    assert by_name["alpha_text"]["lr"] == 3e-3
    assert by_name["alpha_vision"]["weight_decay"] == 0
    assert by_name["head.weight"]["weight_decay"] == 0.1
    stem, later = (
        by_name[f"backbone.net.{name}.weight"]["lr"]
        for name in ("conv_stem", "blocks.1.0.conv_exp")
    )
    assert stem < later < 1e-3


def test_unknown_parameter_is_an_error():
    with pytest.raises(LookupError, match="0 groups"):
        group_of("surprise.weight")
    assert sorted(PARAMETER_GROUPS) == sorted(STAGES["everything"])


def test_auxiliary_heads_stay_out_of_the_detector(options):
    objective = prepare(options(kind_weight=0.5)).model
    assert "heads.kind.weight" in objective.state_dict()
    assert not [name for name in objective.result() if "heads" in name]
