from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m2f2cli import environment
from m2f2cli.checkpoints import configs, io, keymaps
from m2f2cli.cli.app import run
from m2f2cli.options.train_detector import ModelOptions
from m2f2cli.training.detector import build_detector
from tests.checkpoints import published
from tests.conftest import write_detector


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]):
    def go(*arguments: object) -> tuple[int, str, str]:
        code = run(["info", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


@pytest.fixture
def as_json(info):
    def go(*arguments: object) -> dict:
        code, out, err = info(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return go


def test_the_installation(info, as_json):
    code, out, err = info()
    assert code == 0
    assert err == ""
    assert f"torch            {version('torch')}" in out
    assert "cpu" in out
    found = as_json()
    assert found["packages"]["torch"] == version("torch")
    assert found["devices"][0]["name"] == "cpu"
    assert "float32" in found["devices"][0]["dtypes"]
    extras = {extra["name"]: extra for extra in found["extras"]}
    assert extras["test"]["present"]
    assert extras["quant"]["install"] == "pip install 'm2f2cli[quant]'"
    assert "all" not in extras


def test_a_license_is_shown_inherited_and_no_part_of_the_fingerprint(
    info, as_json, tmp_path, tiny_detector_folder
):
    said = "For research and non-commercial use: learnt from FF++."
    folder = write_detector(tmp_path / "licensed", license=said, kind_margin=1.0)
    assert said in info(folder)[1]
    assert as_json(folder)["license"] == said
    assert "license" not in info(tiny_detector_folder)[1]
    assert as_json(tiny_detector_folder)["license"] is None
    written = io.read_config(folder)
    assert io.combine(written, {}) == io.combine(written | {"license": None}, {})
    assert io.combine(written, {}) != io.combine(written | {"kind_margin": None}, {})
    child = build_detector(ModelOptions(model=str(folder)), 0.3).config
    assert (child.license, child.kind_margin) == (said, None)
    around = configs.explainer_config(detector=written, text={}, aspect="square", dtype="float32")
    (folder / "config.json").write_text(json.dumps(around))
    assert said in info(folder)[1]


@pytest.mark.parametrize("license", [3, ["research"], {"a": 1}])
def test_a_license_that_is_no_sentence_is_said(info, tmp_path, license):
    folder = write_detector(tmp_path / "d")
    (folder / "config.json").write_text(json.dumps(io.read_config(folder) | {"license": license}))
    code, out, err = info(folder)
    assert (code, err) == (0, "")
    assert "license is" in out


def test_extras_are_read_from_the_metadata(monkeypatch):
    lines = [
        "torch>=2.6",
        'deepspeed>=0.16; extra == "train"',
        "pytest ; extra == 'test'",
        'm2f2cli[train]; extra == "all"',
        'odd[x]>=1; python_version < "3.12" and extra == "train"',
    ]
    monkeypatch.setattr(environment, "requires", lambda name: lines)
    found = {extra["name"]: list(extra["packages"]) for extra in environment.describe_extras()}
    assert found == {"train": ["deepspeed", "odd"], "test": ["pytest"]}


def test_it_needs_no_heavy_package_but_torch():
    script = (
        "import sys\n"
        "from m2f2cli.cli.app import run\n"
        "assert run(['info']) == 0\n"
        "heavy = {'transformers', 'timm', 'open_clip', 'torchvision', 'peft', 'dlib'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_broken_torch_is_reported(monkeypatch, info):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = info()
    assert code == 0
    assert "transformers" in out
    assert "torch cannot be imported" in err


def test_a_detector_folder(info, as_json, tiny_detector_folder):
    found = as_json(tiny_detector_folder, "--verify")
    assert found["kind"] == keymaps.DETECTOR
    tensors = io.read_tensors(tiny_detector_folder)
    assert found["tensors"] == len(tensors)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["fingerprint"] == io.fingerprint(tiny_detector_folder)
    assert found["stage"]["stage"] == "test"
    assert found["shapes"]["head.weight"] == [list(tensors["head.weight"].shape), "float32"]
    code, out, _ = info(tiny_detector_folder)
    assert code == 0
    assert "backbone" in out
    assert found["fingerprint"] in out
    code, out, _ = info(tiny_detector_folder, "--verbose")
    assert "head.weight" in out


@pytest.fixture
def broken(tiny_detector_folder, tmp_path):
    """A copy of the tiny detector with changed tensors or without some files."""

    def make(change=lambda tensors: None, without: tuple[str, ...] = ()) -> Path:
        tensors = io.read_tensors(tiny_detector_folder)
        change(tensors)
        config = io.read_config(tiny_detector_folder)
        folder = tmp_path / "broken"
        io.write_checkpoint(folder, config=config, tensors=tensors, stage={})
        for name in without:
            (folder / name).unlink()
        return folder

    return make


def test_missing_tensors_of_a_detector_are_named(as_json, broken):
    missing = as_json(broken(lambda tensors: tensors.pop("head.bias")))["missing"]
    assert any("1 missing: head.bias" in line for line in missing)


def test_misshapen_tensors_of_a_detector_are_named(as_json, broken):
    def change(tensors):
        tensors["alpha_text"] = torch.ones(3)

    missing = as_json(broken(change))["missing"]
    assert any("alpha_text is [3], not []" in line for line in missing)


def test_missing_files_of_a_detector_are_named(as_json, broken):
    found = as_json(broken(without=("stage.json", "model.safetensors")))
    assert found["kind"] == keymaps.DETECTOR
    assert {"stage.json", "preprocessor_config.json", "any weights"} <= set(found["missing"])


def test_verify_finds_a_changed_weight(info, broken):
    folder = broken()
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert info(folder)[0] == 0
    code, _, err = info(folder, "--verify")
    assert code == 1
    assert "was changed" in err


def test_published_detectors(as_json, info, tmp_path):
    first, second = published.detector("detector_a"), published.detector("detector_b")
    torch.save(published.stage_1(first), tmp_path / "x.bin")
    found = as_json(tmp_path / "x.bin")
    assert found["kind"] == keymaps.DETECTOR_A
    assert found["missing"] == []
    assert "torch.optim.lr_scheduler.ReduceLROnPlateau" in found["foreign"]
    assert any("module." in note for note in found["notes"])
    assert found["fingerprint"].startswith("sha256:")
    rest, tower = published.split_tower(second)
    torch.save(rest, tmp_path / "b.pth")
    found = as_json(tmp_path / "b.pth")
    assert found["kind"] == keymaps.DETECTOR_B
    assert len(found["missing"]) == 1
    assert "vision tower" in found["missing"][0]
    torch.save(tower, tmp_path / "t.pth")
    assert as_json(tmp_path / "t.pth")["kind"] == keymaps.TOWER


ONE = torch.ones(1)
KINDS = {
    keymaps.EXPLAINER: [
        "model.layers.0.x",
        "deepfake_encoder.clip_vision_alpha",
        "lm_head.weight",
    ],
    keymaps.LLAVA: ["model.layers.0.x", "model.mm_projector.0.weight", "lm_head.weight"],
    keymaps.LLAVA_HF: ["language_model.model.layers.0.x", "multi_modal_projector.linear_1.weight"],
    keymaps.STAGE_2: ["deepfake_projector.0.weight", "deepfake_projector.2.bias"],
    keymaps.STAGE_3_PART: ["base_model.model.deepfake_projector.0.weight"],
    keymaps.PEFT: ["base_model.model.model.layers.0.q_proj.lora_A.weight"],
    keymaps.CLIP: ["vision_model.embeddings.class_embedding", "text_model.x", "logit_scale"],
    keymaps.TOWER: ["vision_tower.vision_model.embeddings.class_embedding"],
    keymaps.LANGUAGE: ["model.layers.0.x", "model.embed_tokens.weight"],
    keymaps.UNKNOWN: ["fc.weight"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_by_tensor_names(as_json, tmp_path, kind):
    torch.save(dict.fromkeys(KINDS[kind], ONE), tmp_path / "any.name")
    assert as_json(tmp_path / "any.name")["kind"] == kind


def test_folders_of_other_layouts(as_json, tmp_path):
    def folder(name: str, config: dict, tensors: list[str], file: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / ("adapter_config.json" if "peft_type" in config else "config.json")).write_text(
            json.dumps(config)
        )
        if file.endswith(".safetensors"):
            save_file({key: ONE.clone() for key in tensors}, path / file)
        else:
            torch.save(dict.fromkeys(tensors, ONE), path / file)
        return path

    lora = folder("x1", {"peft_type": "LORA"}, KINDS[keymaps.PEFT], "adapter_model.safetensors")
    assert as_json(lora)["kind"] == keymaps.PEFT
    torch.save(dict.fromkeys(KINDS[keymaps.STAGE_3_PART], ONE), lora / "non_lora_trainables.bin")
    found = as_json(lora)
    assert found["kind"] == keymaps.STAGE_3
    assert found["missing"] == []
    (lora / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in as_json(lora)["missing"]
    llama = {"model_type": "llava_llama"}
    stage_2 = folder("x2", llama, KINDS[keymaps.STAGE_2], "mm_projector.bin")
    assert as_json(stage_2)["kind"] == keymaps.STAGE_2
    llava = folder("x3", llama, KINDS[keymaps.LLAVA], "pytorch_model.bin")
    found = as_json(llava)
    assert found["kind"] == keymaps.LLAVA
    assert any("vision tower" in line for line in found["missing"])
    explainer = folder("x4", llama, KINDS[keymaps.EXPLAINER], "model.safetensors")
    assert as_json(explainer)["kind"] == keymaps.EXPLAINER


def test_a_missing_shard_is_named(as_json, tmp_path, small_shards):
    found = as_json(small_shards)
    assert found["missing"] == []
    gone = sorted(small_shards.glob("model-*.safetensors"))[0]
    gone.unlink()
    missing = as_json(small_shards)["missing"]
    assert f"the shard {gone.name}" in missing


@pytest.fixture
def small_shards(tmp_path):
    folder = tmp_path / "shards"
    tensors = {key: torch.ones(8) for key in KINDS[keymaps.TOWER] + ["vision_model.x"]}
    config = {"model_type": "clip_vision_model"}
    io.write_checkpoint(folder, config=config, tensors=tensors, stage={}, max_shard_bytes=40)
    return folder


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "nothing at"), (b"", "is empty"), (b"hello " * 9, "no PyTorch or safetensors file")],
)
def test_things_that_are_no_checkpoint(info, tmp_path, content, words):
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    code, out, err = info(path)
    assert code == 1
    assert out == ""
    assert words in err


def test_an_empty_folder(as_json, tmp_path):
    found = as_json(tmp_path)
    assert found["kind"] == keymaps.UNKNOWN
    assert found["missing"] == ["any weights"]
