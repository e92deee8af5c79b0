from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from m2f2cli.checkpoints import keymaps
from m2f2cli.errors import CheckpointError
from m2f2cli.runtime import cure_torchvision
from tests.checkpoints import published
from tests.conftest import randomise

cure_torchvision()

import timm  # noqa: E402
import torchvision  # noqa: E402

PUBLISHED = (
    (keymaps.DETECTOR_A, "efficientnet_b4", "detector_a"),
    (keymaps.DETECTOR_B, "densenet121", "detector_b"),
)
ARCHITECTURES = pytest.mark.parametrize(("kind", "backbone", "name"), PUBLISHED)


@ARCHITECTURES
def test_every_published_key_is_known_and_lands_once(kind, backbone, name):
    keys = published.manifest(name)
    folded = keymaps.FOLDED if kind == keymaps.DETECTOR_A else ()
    found = keymaps.look_up(set(keys) - set(folded), keymaps.detector_map(kind, backbone), what="x")
    targets = [entry.to for entry in found if entry.to is not None]
    assert len(targets) == len(set(targets))
    assert all(entry.why for entry in found if entry.action == "dropped")
    assert len(found) + len(folded) == len(keys)


@ARCHITECTURES
def test_backbone_names_and_shapes_are_exactly_timms(kind, backbone, name):
    wanted = timm.create_model(backbone, num_classes=0).state_dict()
    keys = published.manifest(name)
    found = {
        entry.to.removeprefix("backbone.net."): tuple(keys[entry.key][0])
        for entry in keymaps.look_up(
            [k for k in keys if k.startswith("deepfake_encoder.")],
            keymaps.detector_map(kind, backbone),
            what="x",
        )
        if entry.to is not None
    }
    assert found == {key: tuple(tensor.shape) for key, tensor in wanted.items()}


@ARCHITECTURES
def test_backbone_numbers_are_torchvisions(kind, backbone, name):
    """torchvision's network with random weights, renamed, gives timm's network the same maps."""
    theirs = randomise(getattr(torchvision.models, backbone)(weights=None)).eval()
    prefixed = {
        f"deepfake_encoder.{key.removeprefix('features.')}": tensor
        for key, tensor in theirs.state_dict().items()
        if key.startswith("features.")
    }
    renamed = keymaps.rename(prefixed, keymaps.detector_map(kind, backbone), what="x")
    ours = timm.create_model(backbone, num_classes=0).eval()
    ours.load_state_dict({k.removeprefix("backbone.net."): v for k, v in renamed.items()})
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.features(pixels)
        if backbone == "densenet121":  # timm's last normalisation includes the activation
            expected = expected.relu()
        found = ours.forward_features(pixels)
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_shuffled_map_would_be_noticed():
    """The numbers above tell two equally shaped tensors apart."""
    theirs = randomise(torchvision.models.densenet121(weights=None)).eval()
    state = theirs.state_dict()
    first = "features.denseblock1.denselayer1.norm2.weight"
    second = "features.denseblock1.denselayer2.norm2.weight"
    swapped = {**state, first: state[second], second: state[first]}
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = theirs.features(pixels).clone()
        theirs.load_state_dict(swapped)
        assert (theirs.features(pixels) - before).abs().max() > 1e-3


@ARCHITECTURES
def test_the_inverse_undoes_the_map(kind, backbone, name):
    rows = keymaps.detector_map(kind, backbone)
    folded = keymaps.FOLDED if kind == keymaps.DETECTOR_A else ()
    state = {key: object() for key in published.manifest(name) if key not in folded}
    kept = [f.key for f in keymaps.look_up(state, rows, what="x") if f.to is not None]
    back = keymaps.to_published(keymaps.rename(state, rows, what="x"), rows)
    assert back == {key: state[key] for key in kept}


def test_an_unknown_key_is_an_error():
    rows = keymaps.detector_map(keymaps.DETECTOR_B, "densenet121")
    with pytest.raises(CheckpointError, match=r"1 tensors .*: mystery\.weight"):
        keymaps.rename({"mystery.weight": 1, "clip_text_alpha": 2}, rows, what="'x'")


def test_position_ids_of_older_files_are_dropped():
    rows = keymaps.detector_map(keymaps.DETECTOR_B, "densenet121")
    keys = [
        "clip_text_encoder.model.text_model.embeddings.position_ids",
        "clip_vision_encoder.model.vision_model.embeddings.position_ids",
    ]
    assert [f.action for f in keymaps.look_up(keys, rows, what="x")] == ["dropped", "dropped"]


def test_folding_the_bridge_keeps_the_logits():
    """The folded head equals the published arithmetic on random features, to rounding."""
    state = published.detector("detector_a")
    hidden, size = 12, 128
    folded = keymaps.fold_bridge(state)
    assert set(state) - set(folded) == set(keymaps.FOLDED)
    vision, backbone = torch.randn(2, 5, hidden, generator=torch.Generator().manual_seed(3))
    tokens = torch.randn(5, 2731, 64)
    adapter = "bridge_adapter_proj.bridge_adapter_"
    values = tokens @ state[f"{adapter}proj.1.weight"].T + state[f"{adapter}proj.1.bias"]
    normal = torch.nn.functional.layer_norm(
        values, (1,), state[f"{adapter}proj.2.weight"], state[f"{adapter}proj.2.bias"]
    )[..., 0]
    reduced = torch.nn.functional.linear(
        normal, state[f"{adapter}reduction.0.weight"], state[f"{adapter}reduction.0.bias"]
    )
    bridge = torch.nn.functional.layer_norm(
        reduced,
        (size,),
        state[f"{adapter}reduction.1.weight"],
        state[f"{adapter}reduction.1.bias"],
    )
    features = torch.cat([vision, state["clip_text_alpha"] * bridge, backbone], 1)
    expected = features @ state["output.weight"].T + state["output.bias"]
    found = torch.cat([vision, backbone], 1) @ folded["output.weight"].T + folded["output.bias"]
    assert (found - expected).abs().max() < 2e-6
    plain = state["output.bias"]
    assert (folded["output.bias"] - plain).abs().max() > 1e-2  # the constant matters


def test_a_head_of_another_width_is_not_folded():
    state = dict(published.detector("detector_a"))
    state["output.weight"] = state["output.weight"][:, :-1]
    with pytest.raises(CheckpointError, match="cannot be folded"):
        keymaps.fold_bridge(state)


def test_tables_have_no_row_twice():
    for kind, backbone, _ in PUBLISHED:
        rows = sorted(row[0] for row in keymaps.detector_map(kind, backbone))
        assert all(first != second for first, second in pairwise(rows))
