from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.cli.app import run
from tests.checkpoints import published


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder with every published layout, CLIP cut down."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "clip.json").write_text(json.dumps(published.CLIP_CONFIG))
    first, second = published.detector("detector_a"), published.detector("detector_b")
    rest, tower = published.split_tower(second)
    torch.save(second, folder / "b.pth")
    torch.save(published.stage_1(first), folder / "a.pth")
    torch.save(rest, folder / "b_bare.pth")
    torch.save(tower, folder / "tower.pth")
    torch.save(tower, folder / "tower_again.pth")
    save_file(second, folder / "b.safetensors")
    wrapped = {"state_dict": {f"module.{k}": v for k, v in second.items()}}
    torch.save(wrapped, folder / "b_wrapped.pth", _use_new_zipfile_serialization=False)
    yield folder
    shutil.rmtree(folder)  # 180 MB


@pytest.fixture(scope="module")
def same(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of detector B, imported from its plain file."""
    folder = tmp_path_factory.mktemp("same") / "b"
    made = import_weights([files / "b.pth"], folder, clip_config=files / "clip.json")
    assert io.fingerprint(folder, verify=True) == made.fingerprint
    return made.fingerprint


@pytest.fixture
def do(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def go(*names: str, extra: tuple[str, ...] = (), clip: bool = True):
        paths = [name if "/" in name else str(files / name) for name in names]
        config = ("--clip-config", str(files / "clip.json")) if clip else ()
        code = run(["import", *paths, "--output", str(tmp_path / "out"), *config, *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return io.read_tensors(folder, finite=True)


def test_detector_b_becomes_a_checkpoint_that_loads(do, tmp_path, files):
    code, out, _ = do("b.pth")
    assert code == 0
    assert "detector B" in out
    assert "above the hidden state" in out
    model = load_detector(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert model.config.backbone == "densenet121"
    assert model.config.forgery_map
    assert model.config.clip["vision"]["num_attention_heads"] == 2
    assert model.config.clip["text"]["num_attention_heads"] == 4
    assert len(model.clip.vision.encoder.layers) == published.BLOCKS - 1
    state = published.detector("detector_b")
    ours = tensors(tmp_path / "out")
    assert torch.equal(ours["head.weight"], state["output.weight"])
    assert torch.equal(ours["alpha_text"], state["clip_text_alpha"])
    assert torch.equal(
        ours["backbone.net.features.norm5.weight"], state["deepfake_encoder.norm5.weight"]
    )
    preprocessor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] == "CLIPImageProcessor"
    assert preprocessor["crop_size"] == {"height": published.SIDE, "width": published.SIDE}
    stage = io.read_stage(tmp_path / "out")
    assert stage["sources"][0]["file"] == "b.pth"
    assert len(stage["sources"][0]["sha256"]) == 64
    pixels = torch.randn(2, 3, published.SIDE, published.SIDE)
    with torch.no_grad():
        assert model(pixels).logits.shape == (2, 2)


@pytest.mark.parametrize(
    "names", [("b.safetensors",), ("b_wrapped.pth",), ("b_bare.pth", "tower.pth"),
              ("tower.pth", "b_bare.pth"), ("b.pth", "tower.pth")],
)  # fmt: skip
def test_every_container_gives_the_same_detector(do, tmp_path, same, names):
    code, _, err = do(*names)
    assert code == 0, err
    assert io.fingerprint(tmp_path / "out") == same


def test_detector_a_loads_with_the_same_logits(do, tmp_path):
    code, out, _ = do("a.pth")
    assert code == 0
    assert "folded" in out
    model = load_detector(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert model.config.backbone == "efficientnet_b4"
    assert not model.config.forgery_map
    state = published.detector("detector_a")
    pixels = torch.randn(3, 3, published.SIDE, published.SIDE)
    with torch.no_grad():
        output = model(pixels)
    features, half = output.features, output.features.shape[1] // 2
    from m2f2cli.checkpoints.keymaps import bridge_constant

    constant = bridge_constant(state).expand(3, -1)
    whole = torch.cat([features[:, :half], constant, features[:, half:]], 1)
    expected = whole @ state["output.weight"].T + state["output.bias"]
    assert (output.logits - expected).abs().max() < 2e-6


def test_json_lists_every_key_once(do, files):
    code, out, _ = do("a.pth", extra=("--json",))
    assert code == 0
    account = json.loads(out)
    state = published.detector("detector_a")
    keys = [row["key"] for row in account["keys"]]
    assert len(keys) == len(set(keys))
    extras = {"epoch", "optimizer_state_dict", "iter", "scheduler", "val_loss"}
    assert set(keys) == {f"module.{key}" for key in state} | extras
    for row in account["keys"]:
        assert row["action"] in ("mapped", "dropped", "folded")
        assert (row["to"] is not None) == (row["action"] == "mapped")
        assert row["to"] or row["why"]
    assert account["fingerprint"].startswith("sha256:")


def test_verbose_lists_every_key(do):
    code, out, _ = do("b.pth", extra=("--verbose",))
    assert code == 0
    for key in published.detector("detector_b"):
        assert key in out


def save(state: dict[str, torch.Tensor], tmp_path: Path) -> str:
    torch.save(state, tmp_path / "bad.pth")
    return str(tmp_path / "bad.pth")


def changed(name: str = "detector_b", **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(published.detector(name))
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


BAD = {
    "missing": ({"deepfake_proj.1.bias": None}, "deepfake_proj.1.bias"),
    "missing in the backbone": (
        {"deepfake_encoder.denseblock4.denselayer16.conv2.weight": None},
        "deepfake_encoder.denseblock4.denselayer16.conv2.weight",
    ),
    "missing in the tower": (
        {"clip_vision_encoder.model.vision_model.encoder.layers.0.mlp.fc2.bias": None},
        "clip_vision_encoder.model.vision_model.encoder.layers.0.mlp.fc2.bias",
    ),
    "missing head": ({"output.bias": None}, "output.bias"),
    "missing prompt": ({"clip_text_encoder.prompt_tokens": None}, "forgery_prompt.tokens"),
    "extra": ({"surprise.weight": torch.ones(2)}, "surprise.weight"),
    "extra in the backbone": ({"deepfake_encoder.more": torch.ones(2)}, "deepfake_encoder.more"),
    "a layer far away": (
        {f"clip_vision_encoder.model.vision_model.encoder.layers.{10**15}.x": torch.ones(2)},
        f"lacks its layers [{published.BLOCKS}]",
    ),
    "shape": ({"output.weight": torch.ones(2, 5)}, "output.weight is [2, 5]"),
    "nan": ({"vision_proj.1.bias": torch.full((12,), float("nan"))}, "vision_proj.1.bias"),
    "inf": ({"clip_vision_alpha": torch.tensor(float("inf"))}, "clip_vision_alpha"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_detector_is_one_sentence_that_names_the_tensor(do, tmp_path, name):
    changes, words = BAD[name]
    code, out, err = do(save(changed(**changes), tmp_path))
    assert code == 1
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["bridge_adapter_proj.bridge_adapter_proj.2.bias", "output.weight"])
def test_a_detector_a_without_a_tensor_of_its_fold(do, tmp_path, key):
    code, _, err = do(save(changed("detector_a", **{key: None}), tmp_path))
    assert code == 1
    assert key in err


def test_a_tower_is_asked_for(do, tmp_path):
    code, _, err = do("b_bare.pth")
    assert code == 1
    assert "without its CLIP vision tower" in err
    assert "m2f2 import" in err


def test_head_counts_are_asked_for(do):
    code, _, err = do("b.pth", clip=False)
    assert code == 1
    assert "--clip-config" in err


def test_a_clip_configuration_that_contradicts_the_file(do, tmp_path):
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"vision_config": {"hidden_size": 99}, "text_config": {}}))
    code, _, err = do("b.pth", clip=False, extra=("--clip-config", str(config)))
    assert code == 1
    assert "hidden_size 99" in err
    config.write_text("{}")
    code, _, err = do("b.pth", clip=False, extra=("--clip-config", str(config)))
    assert code == 1
    assert "no CLIP configuration" in err


@pytest.mark.parametrize(
    "names", [("tower.pth",), ("a.pth", "b.pth"), ("b.pth", "tower.pth", "tower_again.pth")]
)
def test_files_that_make_no_detector(do, names, tmp_path):
    code, _, err = do(*names)
    assert code == 2
    assert "hint:" in err
    assert not (tmp_path / "out").exists()


def test_another_tower_than_the_detectors_own(do, tmp_path):
    tower = dict(published.split_tower(published.detector("detector_b"))[1])
    key = "vision_tower.vision_model.pre_layrnorm.bias"
    tower[key] = tower[key] + 1
    code, _, err = do("b.pth", save(tower, tmp_path))
    assert code == 2
    assert "pre_layrnorm.bias" in err


def test_unknown_and_truncated_files(do, tmp_path, files):
    code, _, err = do(save({"fc.weight": torch.ones(2)}, tmp_path))
    assert code == 1
    assert "neither a published detector nor a CLIP vision tower" in err
    cut = tmp_path / "cut.pth"
    cut.write_bytes((files / "b.pth").read_bytes()[:-1000])
    code, _, err = do(str(cut))
    assert code == 1
    assert "truncated" in err
    assert not (tmp_path / "out").exists()


def test_an_existing_checkpoint_is_kept(do, tmp_path):
    assert do("b.pth")[0] == 0
    before = io.fingerprint(tmp_path / "out", verify=True)
    code, _, err = do("a.pth")
    assert code == 1
    assert "--overwrite" in err
    assert io.fingerprint(tmp_path / "out", verify=True) == before


def test_a_failed_import_keeps_the_old_checkpoint(do, tmp_path):
    assert do("b.pth")[0] == 0
    before = io.fingerprint(tmp_path / "out", verify=True)
    bad = save(changed(**{"vision_proj.1.bias": torch.full((12,), float("nan"))}), tmp_path)
    assert do(bad, extra=("--overwrite",))[0] == 1
    assert io.fingerprint(tmp_path / "out", verify=True) == before


def test_a_detector_inside_a_larger_model(do, tmp_path):
    state = {f"deepfake_encoder.{k}": v for k, v in published.detector("detector_b").items()}
    assert do(save(state, tmp_path))[0] == 0
    state["model.layers.0.self_attn.q_proj.weight"] = torch.ones(2, 2)
    code, _, err = do(save(state, tmp_path), extra=("--overwrite",))
    assert code == 1
    assert "has no config.json, so its language model is unknown" in err
