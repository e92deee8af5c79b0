"""Folders that would run code, reach the network, hang, or say other than their fingerprint."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.inspect import inspect_checkpoint
from m2f2cli.checkpoints.load import load_detector, load_explainer
from m2f2cli.cli.app import run
from m2f2cli.errors import CheckpointError
from tests.conftest import TINY_CLIP
from tests.models.explainers import write_explainer

OPEN_CLIP_AFAR = {
    "library": "open_clip",
    "embed_dim": 16,
    "vision": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text": {"hf_model_name": "owner/model", "hf_tokenizer_name": "owner/model"},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("builtins.input", refuse)


def changed(source: Path, folder: Path, change: dict[str, Any]) -> Path:
    """A copy whose ``config.json`` has other values; a name may be a path of keys with dots."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in change.items():
        *way, last = name.split(".")
        part = config
        for key in way:
            part = part[key]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def explainer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explainers") / "tiny"
    write_explainer(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone_kwargs": {"checkpoint_path": "w.pth"}}, "'backbone_kwargs.checkpoint_path'"),
        ({"backbone_kwargs": {"pretrained": True}}, "'backbone_kwargs.pretrained'"),
        ({"backbone_kwargs": {"act_layer": "/etc/passwd"}}, "a name of letters"),
        ({"backbone": "hf-hub:owner/model"}, "backbone is 'hf-hub:owner/model'"),
        ({"clip": OPEN_CLIP_AFAR}, "'clip.text.hf_model_name' is not a field"),
        ({"clip.vision._attn_implementation": "a/b"}, "'clip.vision._attn_implementation'"),
        ({"attn_implementation": "owner/kernel"}, "attn_implementation is 'owner/kernel'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "'auto_map' is not a field"),
        ({"quantization_config": {"quant_method": "x"}}, "'quantization_config' is not a field"),
        ({"trust_remote_code": True}, "'trust_remote_code' is not a field"),
        ({"clip.vision.num_hidden_layers": 10**9}, "is 1000000000; it must be a whole number from"),
        ({"clip.vision.hidden_size": 10**40}, "it must be a whole number from 1 to 65536"),
        ({"clip": [1]}, "clip is a list of 1, not a mapping"),
        ({"clip.vision": None}, "clip.vision is None, not a mapping"),
        ({"score_temperature": -1}, "score_temperature is -1; it must be a number above 0"),
        ({"score_temperature": 0}, "it must be a number above 0"),
        ({"score_temperature": float("nan")}, "score_temperature is nan"),
        ({"threshold": True}, "threshold is True; it must be a number from 0 up to 1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"threshold": None}, "threshold is None"),
        ({"uncertain": [0.9, 0.1]}, "uncertain begins above its end"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is a list of 3"),
        ({"domain": {"mean": [0], "basis": [], "limit": 1}}, "domain.mean is a list of 1"),
        ({"kinds": "abc"}, "kinds is 'abc'"),
        ({"image_size": 64}, "image_size is 64, that of its CLIP tower 32"),
        ({"prompt_tokens": 1000}, "its text tower reads 1 to 16"),
        ({"vision_layer": 9}, "vision_layer 9 does not exist"),
        ({"clip_blocks": [3]}, "block 3 is read of a tower that is run up to block 2"),
        ({"clip.vision.num_attention_heads": 5}, "heads do not divide"),
        ({"crop": {"detector": "dlib", "margin": "wide"}}, "crop.margin is 'wide'"),
        ({"surprise": 1}, "'surprise' is not a field"),
    ],
)
def test_a_detector_takes_only_what_its_schema_names(tmp_path, tiny_detector_folder, change, words):
    folder = changed(tiny_detector_folder, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        load_detector(str(folder))
    assert words in caught.value.message
    assert caught.value.message.count("\n") == 0
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config._attn_implementation": "a/b"}, "'text_config._attn_implementation'"),
        ({"text_config.num_hidden_layers": 10**9}, "text_config.num_hidden_layers is 1000000000"),
        ({"text_config.hidden_act": "os.system"}, "text_config.hidden_act is 'os.system'"),
        ({"text_config.vocab_size": "many"}, "text_config.vocab_size is 'many'"),
        ({"text_config.num_attention_heads": 5}, "5 heads do not divide hidden_size"),
        ({"text_config.rope_parameters": {"rope_type": ["x"]}}, "rope_parameters.rope_type"),
        ({"text_config": []}, "text_config is a list of 0"),
        ({"detector_config": [1]}, "detector_config is a list of 1, not a mapping"),
        ({"detector_config.score_temperature": -1}, "detector_config.score_temperature is -1"),
        ({"detector_config.auto_map": {"AutoModel": "x.Y"}}, "'detector_config.auto_map'"),
        ({"image_token_id": 5}, "words or equal"),
        ({"template": {}}, "template is a mapping of 0"),
    ],
)
def test_an_explainer_takes_only_what_its_schema_names(tmp_path, explainer_folder, change, words):
    folder = changed(explainer_folder, tmp_path / "model", change)
    with pytest.raises(CheckpointError) as caught:
        load_explainer(str(folder))
    assert words in caught.value.message
    assert any(words in fault for fault in inspect_checkpoint(str(folder)).missing)


def test_reading_commands_ask_neither_the_network_nor_the_user(
    tmp_path, tiny_detector_folder, explainer_folder, capsys
):
    """Good folders and hostile ones: an answer or one sentence, and no traceback."""
    picture = tmp_path / "face.png"
    Image.new("RGB", (48, 48), "gray").save(picture)
    afar = changed(tiny_detector_folder, tmp_path / "afar", {"clip": OPEN_CLIP_AFAR})
    kernel = changed(explainer_folder, tmp_path / "kernel", {"attn_implementation": "owner/kernel"})
    for command, code in (
        (["info", tiny_detector_folder], 0),
        (["info", explainer_folder], 0),
        (["info", afar], 0),
        (["info", kernel], 0),
        (["detect", picture, "--faces", "none", "--model", tiny_detector_folder], 0),
        (["detect", picture, "--faces", "none", "--model", afar], 1),
        (["explain", picture, "--faces", "none", "--model", kernel], 1),
        (["init-llava", "--llava", explainer_folder, "--detector", afar, "--output", "x"], 1),
        (["merge", "--base", kernel, "--delta", explainer_folder, "--output", "x"], 1),
        (["import", afar, "--output", tmp_path / "x"], 1),
    ):
        assert run([str(word) for word in command]) == code, command
        said = capsys.readouterr()
        assert "Unexpected" not in said.err
        if code == 0 and command[1] in (afar, kernel):
            assert "cannot be built" in said.out or "config.json" in said.out


def test_an_adapter_beside_a_model_is_an_error(tmp_path, explainer_folder, tiny_detector_folder):
    for source, load in ((explainer_folder, load_explainer), (tiny_detector_folder, load_detector)):
        folder = shutil.copytree(source, tmp_path / source.parent.name)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        with pytest.raises(CheckpointError, match=r"beside it, an adapter \(adapter_config\.json"):
            load(str(folder))


def test_a_generation_config_beside_a_model_changes_nothing(tmp_path, explainer_folder):
    plain, _ = load_explainer(str(explainer_folder))
    folder = shutil.copytree(explainer_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0}')
    loaded, _ = load_explainer(str(folder))
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    assert loaded.fingerprint == plain.fingerprint == io.fingerprint(explainer_folder, verify=True)


def test_the_fingerprint_is_of_what_was_loaded_not_of_what_stage_json_says(
    tmp_path, tiny_detector_folder
):
    folder = changed(tiny_detector_folder, tmp_path / "model", {"score_temperature": 2.0})
    loaded = load_detector(str(folder))
    assert io.fingerprint(folder) == io.fingerprint(tiny_detector_folder)
    assert loaded.fingerprint != io.fingerprint(folder)
    same = load_detector(str(tiny_detector_folder))
    assert same.fingerprint == io.fingerprint(tiny_detector_folder)


@pytest.mark.parametrize("name", ["config.json", "stage.json"])
@pytest.mark.parametrize("depth", [150, 5000])
def test_deep_json_is_one_sentence(tmp_path, tiny_detector_folder, name, depth):
    folder = shutil.copytree(tiny_detector_folder, tmp_path / "model")
    (folder / name).write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(CheckpointError, match=r"is not readable JSON \(nested"):
        io.open_weights(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.": {"folder": ".", "fingerprint": "x"}}, "shares tensors itself"),
        ({"a.": {"folder": 5, "fingerprint": "x"}}, "does not say what is shared"),
        ({"a.": "elsewhere"}, "does not say what is shared"),
        ({"a.": {"folder": "nowhere", "fingerprint": "x"}}, "which is not there"),
    ],
)
def test_what_shared_json_may_say(tmp_path, tiny_detector_folder, content, words):
    folder = shutil.copytree(tiny_detector_folder, tmp_path / "model")
    (folder / "shared.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        io.open_tensors(folder)


@pytest.mark.parametrize("code", ["U16", "U32", "C64", "F8_E8M0"])
def test_safetensors_of_types_that_no_model_has(tmp_path, code):
    width = {"U16": 2, "U32": 4, "C64": 8, "F8_E8M0": 1}[code]
    header = {"w": {"dtype": code, "shape": [2], "data_offsets": [0, 2 * width]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * width))
    with pytest.raises(CheckpointError, match=rf"holds w of type {code}, which no model has"):
        io.open_weight_file(path)


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_a_second_form_of_the_weights_must_agree(tmp_path, tiny_detector_folder, form):
    folder = shutil.copytree(tiny_detector_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")

    def write(factor: float) -> None:
        other = {key: tensor * factor for key, tensor in tensors.items()}
        other = {key: tensor.to(tensors[key].dtype) for key, tensor in other.items()}
        if form.endswith(".bin"):
            torch.save(other, folder / form)
        else:
            save_file(other, folder / "part.safetensors")
            index = {"weight_map": dict.fromkeys(other, "part.safetensors")}
            (folder / form).write_text(json.dumps(index))

    write(1.0)
    assert set(io.open_tensors(folder)) == set(tensors)
    write(2.0)
    with pytest.raises(CheckpointError, match=rf"holds its weights twice, and {form} differs"):
        io.open_tensors(folder)


def test_a_file_given_for_a_folder_says_what_to_do(tmp_path, tiny_detector_folder, capsys):
    weights = tiny_detector_folder / "model.safetensors"
    picture = tmp_path / "face.png"
    Image.new("RGB", (48, 48)).save(picture)
    assert run(["detect", str(picture), "--model", str(weights)]) == 1
    said = capsys.readouterr().err
    assert "is a file, not a checkpoint folder" in said
    assert f"Give its folder: {tiny_detector_folder}" in " ".join(said.split())


def test_a_published_file_given_for_a_folder_is_imported_first(tmp_path):
    from tests.checkpoints import published

    torch.save(published.detector("detector_b"), tmp_path / "published.pth")
    with pytest.raises(CheckpointError) as caught:
        load_detector(str(tmp_path / "published.pth"))
    assert "import it first: m2f2 import" in str(caught.value.hint)


def test_a_backbone_of_a_fixed_size_names_it():
    from m2f2cli.errors import ConfigError
    from m2f2cli.models.backbone import check_backbone

    with pytest.raises(ConfigError, match="takes pictures of 224 pixels, not 64") as caught:
        check_backbone("vit_tiny_patch16_224", 64)
    assert "--image-size 224" in str(caught.value.hint)
    check_backbone("vit_tiny_patch16_224", 224)
    check_backbone("test_efficientnet", 64)


def test_clip_folders_that_name_code_are_refused(tmp_path):
    from m2f2cli.errors import ConfigError
    from m2f2cli.models.clip import load_clip

    for fields in (
        {"attn_implementation": "owner/kernel"},
        {"vision_config": {"_attn_implementation": "owner/kernel"}},
        {"auto_map": {"AutoModel": "code.Model"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **fields}))
        with pytest.raises(ConfigError, match="can load code; it is not read"):
            load_clip(str(tmp_path))


def test_open_clip_towers_of_the_hub_are_no_towers_here():
    from m2f2cli.errors import ConfigError
    from m2f2cli.models.clip import ClipTower

    with pytest.raises(ConfigError, match="hf_model_name"):
        ClipTower(OPEN_CLIP_AFAR, -2)
    assert ClipTower(TINY_CLIP, -2).block == 2
