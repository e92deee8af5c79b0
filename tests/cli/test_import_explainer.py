from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.cli.app import run
from tests.checkpoints import golden, llavas, published


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published explainer with and without its tower, and towers from elsewhere."""
    home = tmp_path_factory.mktemp("explainers")
    (home / "clip.json").write_text(json.dumps(published.CLIP_CONFIG))
    llavas.write(home / "whole", llavas.explainer(), llavas.ORIGINAL_CONFIG)
    bare = llavas.explainer(with_tower=False)
    llavas.write(home / "shards", bare, llavas.ORIGINAL_CONFIG, layout="bin shards")
    torch.save(
        {f"vision_tower.vision_model.{k}": t.half() for k, t in llavas.tower().items()},
        home / "tower.pth",
    )
    clip = {f"vision_model.{k}": t.half() for k, t in llavas.tower().items()}
    clip |= {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)}
    config = {"model_type": "clip", "vision_config": llavas.CLIP}
    llavas.write(home / "clip", clip, config, tokenizer=False)
    return home


@pytest.fixture
def do(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def go(*names: object, extra: tuple[str, ...] = ()) -> tuple[int, str, str]:
        paths = [str(name if isinstance(name, Path) else folders / str(name)) for name in names]
        arguments = ["--output", str(tmp_path / "out"), "--clip-config", str(folders / "clip.json")]
        code = run(["import", *paths, *arguments, *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def expected(source: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """What an import must hold, by the table, without the tower's unused end."""
    renamed = keymaps.rename(source, keymaps.PUBLISHED, what="x")
    unused = tuple(
        f"{keymaps.TOWER_PART}{part}."
        for part in ("post_layernorm", f"encoder.layers.{blocks - 1}")
    )
    return {key: tensor for key, tensor in renamed.items() if not key.startswith(unused)}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_every_tensor_lands_bit_by_bit_and_the_model_runs(do, tmp_path):
    code, out, err = do("whole", extra=("--verify",))
    assert code == 0, err
    found = llavas.stored(tmp_path / "out")
    same(found, expected(llavas.explainer(), published.BLOCKS))
    assert f"{len(found)} tensors read back, largest difference 0.0" in out
    assert "all finite" in out
    config = io.read_config(tmp_path / "out")
    text = config["text_config"]
    assert (text["num_key_value_heads"], text["head_dim"], text["rms_norm_eps"]) == (2, 4, 1e-5)
    assert text["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    assert config["image_aspect"] == "pad"
    assert config["detector_config"]["clip"]["vision"]["num_attention_heads"] == 2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= files
    assert not any(name.startswith(".") for name in files)


def test_the_source_is_named_by_its_fingerprint(do, tmp_path, folders):
    assert do("whole")[0] == 0
    stage = io.read_stage(tmp_path / "out")
    assert stage["stage"] == "import"
    assert stage["sources"][0]["fingerprint"] == io.fingerprint(folders / "whole")
    assert io.fingerprint(tmp_path / "out", verify=True) == stage["fingerprint"]


@pytest.mark.parametrize(
    "names",
    [
        ("shards", "tower.pth"),
        ("shards", "clip"),
        ("clip", "shards"),
        ("shards/pytorch_model-00001-of-00002.bin", "tower.pth"),
        ("whole", "tower.pth"),
        ("whole/model.safetensors",),
    ],
)
def test_the_tower_may_come_from_elsewhere(do, names, tmp_path):
    code, _, err = do(*names)
    assert code == 0, err
    same(llavas.stored(tmp_path / "out"), expected(llavas.explainer(), published.BLOCKS))


def test_a_base_llava_brings_the_tower_too(do, tmp_path):
    base = llavas.write(tmp_path / "base", llavas.hugging_face("5"), llavas.HF_CONFIG)
    code, out, err = do("shards", base)
    assert code == 0, err
    assert "not part of the vision tower" in out
    same(llavas.stored(tmp_path / "out"), expected(llavas.explainer(), published.BLOCKS))


def test_a_missing_tower_is_one_sentence_with_the_download(do, tmp_path):
    code, out, err = do("shards")
    assert (code, out) == (1, "")
    assert "without its CLIP vision tower (./clip)" in err
    assert "openai/clip-vit-large-patch14-336" in err
    assert not (tmp_path / "out").exists()


def test_another_tower_than_its_own(do, tmp_path):
    other = {f"vision_model.{k}": t + (t.ndim == 1) for k, t in llavas.tower().items()}
    torch.save(other, tmp_path / "other.pth")
    code, _, err = do("whole", tmp_path / "other.pth")
    assert code == 2
    assert "brings its own CLIP vision tower" in err


def test_json_lists_every_key_once(do, folders):
    code, out, _ = do("shards", "clip", extra=("--json", "--verify"))
    assert code == 0
    account = json.loads(out)
    assert account["verified"]["difference"] == 0
    assert account["verified"]["logits"] > 0
    by_file: dict[str, list[str]] = {}
    for row in account["keys"]:
        by_file.setdefault(Path(row["file"]).name, []).append(row["key"])
        assert (row["to"] is None) == (row["action"] == "dropped")
        assert row["to"] or row["why"]
    assert sorted(by_file["shards"]) == sorted(llavas.explainer(with_tower=False))
    clip = {f"vision_model.{k}" for k in llavas.tower()} | {"text_model.x", "logit_scale"}
    assert sorted(by_file["clip"]) == sorted(clip)


def changed(tmp_path: Path, **tensors: torch.Tensor | None) -> Path:
    state = llavas.explainer()
    for key, tensor in tensors.items():
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return llavas.write(tmp_path / "bad", state, llavas.ORIGINAL_CONFIG)


NAN = torch.full((llavas.WIDTH,), float("nan"))
BAD = {
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight"),
    "missing projector": ({"deepfake_projector.2.bias": None}, "deepfake_projector.2.bias"),
    "missing in the detector": (
        {"deepfake_encoder.deepfake_encoder.norm0.bias": None},
        "deepfake_encoder.deepfake_encoder.norm0.bias",
    ),
    "missing layer": (
        {k: None for k in llavas.explainer() if k.startswith("model.layers.0.")},
        "lacks its layers [0]",
    ),
    "a layer far away": (
        {f"model.layers.{10**15}.x": torch.ones(2)},
        f"lacks its layers [{llavas.LAYERS}]",
    ),
    "extra": ({"model.image_newline": torch.ones(2)}, "model.image_newline"),
    "shape": ({"lm_head.weight": torch.ones(3, 3)}, "lm_head.weight is [3, 3], not [64, 16]"),
    "width": ({"model.embed_tokens.weight": torch.ones(64, 8)}, "hidden_size 16"),
    "nan": ({"model.norm.weight": NAN}, "model.norm.weight' holds NaN"),
    "nan in the detector": (
        {"deepfake_encoder.vision_proj.1.bias": torch.full((12,), float("inf"))},
        "vision_proj.1.bias' holds NaN",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_explainer_is_one_sentence_that_names_the_tensor(do, tmp_path, name):
    changes, words = BAD[name]
    code, out, err = do(changed(tmp_path, **changes))
    assert (code, out) == (1, "")
    assert words in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_broken_folders(do, folders, tmp_path):
    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return Path(shutil.copytree(folders / name, tmp_path / "bad"))

    bad = copy("whole")
    (bad / "config.json").unlink()
    assert "has no config.json" in do(bad)[2]
    bad = copy("whole")
    (bad / "tokenizer.json").unlink()
    assert "has no tokenizer" in do(bad)[2]
    bad = copy("shards")
    (bad / "pytorch_model-00002-of-00002.bin").unlink()
    code, _, err = do(bad, "clip")
    assert code == 1
    assert "names the shard pytorch_model-00002-of-00002.bin, which is not there" in err
    bad = copy("shards")
    shard = bad / "pytorch_model-00001-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-3000])
    code, _, err = do(bad, "clip")
    assert code == 1
    assert "pytorch_model-00001-of-00002.bin" in err
    assert "truncated" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", 3, "num_hidden_layers 3"),
        ("num_attention_heads", 5, "5 attention heads"),
        ("model_type", "llava_mistral", "'llava_mistral', not of the LLaMA family"),
        ("mm_projector_type", "linear", "mm_projector_type linear"),
        ("mm_vision_select_layer", -1, "mm_vision_select_layer -1"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end True"),
    ],
)
def test_a_configuration_that_does_not_fit(do, tmp_path, field, value, words):
    config = llavas.ORIGINAL_CONFIG | {field: value}
    code, _, err = do(llavas.write(tmp_path / "bad", llavas.explainer(), config))
    assert code == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_things_that_are_no_import(do, tmp_path, folders):
    code, _, err = do("shards", "whole/model.safetensors")
    assert code == 2
    assert "do not make one checkpoint" in err
    base = llavas.write(tmp_path / "base", llavas.original(), llavas.ORIGINAL_CONFIG)
    code, _, err = do(base)
    assert code == 2
    assert "m2f2 init-llava --llava" in err
    assert do("whole")[0] == 0
    again = shutil.copytree(tmp_path / "out", tmp_path / "ours")
    code, _, err = do(Path(again), extra=("--overwrite",))
    assert code == 1
    assert "nothing to import" in err


def test_an_existing_checkpoint_is_kept(do, tmp_path):
    assert do("whole")[0] == 0
    before = io.fingerprint(tmp_path / "out", verify=True)
    code, _, err = do("whole")
    assert code == 1
    assert "--overwrite" in err
    (tmp_path / "sub").mkdir()
    bad = changed(tmp_path / "sub", **{"model.norm.weight": NAN})
    assert do(bad, extra=("--overwrite",))[0] == 1
    assert io.fingerprint(tmp_path / "out", verify=True) == before
    assert do("whole", extra=("--overwrite",))[0] == 0


def test_info_explains_it(do, tmp_path, capsys, folders):
    def info(path: Path) -> dict:
        assert run(["info", str(path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert do("whole")[0] == 0
    found = info(tmp_path / "out")
    assert found["kind"] == "explainer"
    assert found["missing"] == []
    assert "2 layers of width 16" in found["notes"][0]
    assert "asked with the template vicuna_v1" in found["notes"]
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "tokenizer.model or tokenizer.json" in info(tmp_path / "out")["missing"]
    theirs = info(folders / "shards")
    assert theirs["kind"] == "published explainer (LLaVA layout)"
    assert any("CLIP vision tower" in line for line in theirs["missing"])
    assert "2 layers of width 16" in theirs["notes"][0]


def test_the_golden_explainer_lands_bit_by_bit_and_loads_strictly(tmp_path, capsys):
    folder = golden.write(tmp_path / "in", golden.as_saved(), "model.safetensors")
    arguments = ["--output", str(tmp_path / "out"), "--clip-config", str(golden.CLIP_CONFIG)]
    assert run(["import", str(folder), *arguments, "--quiet"]) == 0, capsys.readouterr().err
    same(llavas.stored(tmp_path / "out"), expected(golden.as_saved(), 3))
    model, _ = load_explainer(str(tmp_path / "out"), device="cpu")
    assert model.fingerprint == io.fingerprint(tmp_path / "out", verify=True)
