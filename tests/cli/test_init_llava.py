from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f2cli.checkpoints import io, keymaps
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.cli.app import run
from tests.checkpoints import llavas, published


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector, and the same LLaVA in every layout."""
    folder = tmp_path_factory.mktemp("bases")
    llavas.detector(folder / "detector")
    original, hf = llavas.original(), llavas.hugging_face
    for layout in ("safetensors", "bin", "safetensors shards", "bin shards"):
        llavas.write(folder / layout, original, llavas.ORIGINAL_CONFIG, layout=layout)
    for version in llavas.HF_NAMES:
        llavas.write(folder / f"hf {version}", hf(version), llavas.HF_CONFIG)
    bare = llavas.original(with_tower=False)
    llavas.write(folder / "bare", bare, llavas.ORIGINAL_CONFIG, layout="bin shards")
    return folder


@pytest.fixture
def do(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def go(base: object, detector: object = "detector", *extra: str) -> tuple[int, str, str]:
        paths = [p if isinstance(p, Path) else home / str(p) for p in (base, detector)]
        arguments = ["--llava", str(paths[0]), "--detector", str(paths[1])]
        code = run(["init-llava", *arguments, "--output", str(tmp_path / "out"), *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def language(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    renamed = keymaps.rename(llavas.llama(), keymaps.ORIGINAL, what="x")
    return {key: tensor.to(dtype) for key, tensor in renamed.items()}


def of_detector(home: Path) -> dict[str, torch.Tensor]:
    return {f"detector.{k}": t for k, t in io.read_tensors(home / "detector").items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


LAYOUTS = [
    "safetensors",
    "bin",
    "safetensors shards",
    "bin shards",
    "bare",
    *(f"hf {version}" for version in llavas.HF_NAMES),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_explainer(do, home, tmp_path, layout):
    code, _, err = do(layout)
    assert code == 0, err
    assert "serves both" in err or "the same CLIP tower" in err
    found = llavas.stored(tmp_path / "out")
    wanted = {**language(), **of_detector(home)}
    same(found, wanted)
    rest = set(found) - set(wanted)
    assert rest == {f"forgery_projector.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}
    config = io.read_config(tmp_path / "out")
    assert config["detector_config"]["threshold"] == 0.5
    assert config["image_aspect"] == "pad"
    stage = io.read_stage(tmp_path / "out")
    assert stage["stage"] == "init-llava"
    assert stage["parents"]["detector"]["fingerprint"] == io.fingerprint(home / "detector")
    if layout in ("safetensors", "safetensors shards") or layout.startswith("hf"):
        assert stage["parents"]["llava"]["fingerprint"] == io.fingerprint(home / layout)
    assert io.fingerprint(tmp_path / "out", verify=True) == stage["fingerprint"]


def test_the_result_loads_strictly_and_runs(do, tmp_path, capsys):
    assert do("hf 5")[0] == 0
    model, _ = load_explainer(str(tmp_path / "out"), device="cpu")
    pixels = torch.randn(1, 3, published.SIDE, published.SIDE)
    ids = torch.tensor([[1, *[-200] * model.config.patches, -300, 5]])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, pixel_values=pixels).logits).all()
    assert run(["info", str(tmp_path / "out"), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["missing"]) == ("explainer", [])


def test_the_new_projector_is_drawn_by_the_seed(do, tmp_path):
    marks = []
    for seed in ("0", "0", "5"):
        assert do("bin", "detector", "--seed", seed, "--overwrite")[0] == 0
        tensors = llavas.stored(tmp_path / "out")
        marks.append(io.fingerprint(tmp_path / "out"))
        weight = torch.cat([tensors[f"forgery_projector.{n}.weight"].flatten() for n in (0, 2)])
        assert not tensors["forgery_projector.0.bias"].any()
        assert not tensors["forgery_projector.2.bias"].any()
        assert 0.08 < weight.float().std() < 0.12
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_is_that_of_language_model_and_projectors(do, home, tmp_path, dtype):
    assert do("bin", "detector", "--dtype", dtype)[0] == 0
    found = llavas.stored(tmp_path / "out")
    same(found, {**language(getattr(torch, dtype)), **of_detector(home)})
    assert found["forgery_projector.0.weight"].dtype == getattr(torch, dtype)
    assert io.read_config(tmp_path / "out")["dtype"] == dtype
    stage = io.read_stage(tmp_path / "out")
    assert stage["options"]["dtype"] == dtype


def test_the_bases_fingerprint_does_not_depend_on_the_type(do, home, tmp_path):
    assert do("safetensors", "detector", "--dtype", "float32")[0] == 0
    mark = io.read_stage(tmp_path / "out")["parents"]["llava"]["fingerprint"]
    assert mark == io.fingerprint(home / "safetensors")


def other_tower(tmp_path: Path) -> Path:
    state = llavas.original()
    key = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    state[key] = state[key] + 0.25
    return llavas.write(tmp_path / "base", state, llavas.ORIGINAL_CONFIG)


def test_a_tower_that_differs_is_reported_and_the_detectors_kept(do, home, tmp_path):
    code, _, err = do(other_tower(tmp_path))
    assert code == 0
    assert "warning: The CLIP tower of the LLaVA base differs from the detector's" in err
    assert "by up to 0.25" in err
    assert "--tower llava" in err
    same(llavas.stored(tmp_path / "out"), of_detector(home))
    report = io.read_stage(tmp_path / "out")["clip_tower"]
    assert (report["state"], report["kept"]) == ("differs", "detector")


def test_the_other_tower_can_be_kept(do, home, tmp_path):
    code, _, err = do(other_tower(tmp_path), "detector", "--tower", "llava")
    assert code == 0
    assert "the detector's verdicts change" in err
    found = llavas.stored(tmp_path / "out")
    bias = found["detector.clip.vision.pre_layrnorm.bias"]
    theirs = (llavas.tower()["pre_layrnorm.bias"].half() + 0.25).half()
    assert torch.equal(bias, theirs)
    rest = {k: t for k, t in of_detector(home).items() if not k.startswith(keymaps.TOWER_PART)}
    same(found, rest)


def test_settings_of_a_tower_count_too(do, home, tmp_path):
    config = llavas.HF_CONFIG | {"vision_config": llavas.CLIP | {"hidden_act": "gelu"}}
    base = llavas.write(tmp_path / "base", llavas.hugging_face("5"), config)
    _, _, err = do(base)
    assert "in hidden_act" in err


def test_a_base_without_tower_cannot_lend_it(do, tmp_path):
    code, _, err = do("bare", "detector", "--tower", "llava")
    assert code == 1
    assert "brings no CLIP tower" in err
    assert not (tmp_path / "out").exists()


def changed(tmp_path: Path, *, config: Any = None, tokenizer: bool = True, **tensors: Any) -> Path:
    state = {k: t for k, t in {**llavas.original(), **tensors}.items() if t is not None}
    config = llavas.ORIGINAL_CONFIG if config is None else config
    return llavas.write(tmp_path / "bad", state, config, tokenizer=tokenizer)


NAN = torch.full((llavas.WIDTH,), float("nan"))
HF7 = "openai/clip-vit-large-patch14"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, "layers.1.mlp.up_proj.weight"),
    "head": ({"lm_head.weight": None}, "1 missing: language_model.lm_head.weight"),
    "extra": ({"model.image_newline": torch.ones(2)}, "model.image_newline"),
    "shape": ({"model.norm.weight": torch.ones(3)}, "model.norm.weight is [3], not [16]"),
    "nan": ({"model.norm.weight": NAN}, "model.norm.weight' holds NaN"),
    "tokeniser": ({"tokenizer": False}, "has no tokenizer"),
    "width": ({"model.mm_projector.0.weight": torch.ones(16, 32)}, "has the width 24"),
    "picture size": (
        {"config": llavas.ORIGINAL_CONFIG | {"mm_vision_tower": HF7, "mm_hidden_size": 24}},
        "has the picture size 32",
    ),
    "positions": (
        {
            "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight": (
                torch.ones(10, 24)
            )
        },
        "position_embedding.weight is [10, 24], not [17, 24]",
    ),
    "mistral": (
        {"config": llavas.ORIGINAL_CONFIG | {"model_type": "llava_mistral"}},
        "not of the LLaMA family",
    ),
    "bos": (
        {"config": llavas.ORIGINAL_CONFIG | {"bos_token_id": 7}},
        "bos_token_id 1, config.json 7",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_base_is_one_sentence(do, tmp_path, name):
    changes, words = BAD[name]
    code, out, err = do(changed(tmp_path, **changes))
    assert (code, out) == (1, "")
    assert words in err
    assert "hint:" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize(
    ("part", "bits"), [("quant_state.bitsandbytes__nf4", "4"), ("absmax", "4"), ("SCB", "8")]
)
def test_a_base_that_bitsandbytes_has_quantized_is_named(do, tmp_path, part, bits):
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {name: torch.zeros(8, 1, dtype=torch.uint8), f"{name}.{part}": torch.ones(4)}
    code, out, err = do(changed(tmp_path, **packed))
    assert (code, out) == (1, "")
    assert f"bitsandbytes has quantized to {bits} bits" in err
    assert "in floating point" in err


def test_a_base_of_placeholders_is_named(do, tmp_path):
    code, _, err = do(changed(tmp_path, **{"model.norm.weight": torch.zeros(0)}))
    assert code == 1
    assert "1 empty tensors (model.norm.weight)" in err
    assert "zero_to_fp32.py" in err


def test_a_tied_head_becomes_one_of_its_own(do, tmp_path):
    config = llavas.ORIGINAL_CONFIG | {"tie_word_embeddings": True}
    code, _, err = do(changed(tmp_path, config=config, **{"lm_head.weight": None}))
    assert code == 0, err
    found = llavas.stored(tmp_path / "out")
    words = found["language_model.model.embed_tokens.weight"]
    assert torch.equal(found["language_model.lm_head.weight"], words)
    assert io.read_config(tmp_path / "out")["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_a_tokeniser_without_special_tokens(do, home, tmp_path, token):
    base = Path(shutil.copytree(home / "bin", tmp_path / "bad"))
    llavas.write_tokenizer(base, **{token: None})
    code, _, err = do(base)
    assert code == 1
    assert f"has no {token}" in err


def test_a_tokeniser_of_another_model(do, home, tmp_path):
    base = Path(shutil.copytree(home / "bin", tmp_path / "bad"))
    tokens = {**llavas.TOKENIZER, "model": dict(llavas.TOKENIZER["model"])}
    tokens["model"]["vocab"] = {**tokens["model"]["vocab"], **{f"x{n}": 40 + n for n in range(90)}}
    (base / "tokenizer.json").write_text(json.dumps(tokens))
    code, _, err = do(base)
    assert code == 1
    assert "tokens, the language model 64" in err


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
def test_half_downloaded_bases(do, home, tmp_path, layout):
    base = Path(shutil.copytree(home / layout, tmp_path / "bad"))
    shard = sorted(base.glob("*-00002-of-00002.*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    code, _, err = do(base)
    assert code == 1
    assert shard.name in err
    assert "download it again" in err
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    code, _, err = do(base)
    assert code == 1
    assert "git lfs pull" in err
    shard.unlink()
    code, _, err = do(base)
    assert code == 1
    assert f"names the shard {shard.name}, which is not there" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]


def test_an_index_that_does_not_agree(do, home, tmp_path):
    base = Path(shutil.copytree(home / "bin shards", tmp_path / "bad"))
    index = base / "pytorch_model.bin.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**mapping, "ghost": next(iter(mapping.values()))}}))
    code, _, err = do(base)
    assert code == 1
    assert "ghost" in err
    index.write_text("{")
    assert "not readable JSON" in do(base)[2]


@pytest.mark.parametrize(
    ("base", "detector", "words"),
    [
        ("detector", "detector", "no LLaVA base but: detector"),
        ("bin", "bin", "no detector folder but: LLaVA base"),
        ("detector", "bin", "no detector folder but: LLaVA base"),
        ("bin", "detector.pth", "m2f2 import"),
        ("nowhere", "detector", "no checkpoint at"),
        ("bin", "nowhere", "no checkpoint at"),
    ],
)
def test_folders_of_other_kinds(do, home, tmp_path, base, detector, words):
    code, _, err = do(base, detector)
    assert code == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_other_models_are_no_base(do, home, tmp_path):
    llama = {k: t for k, t in llavas.llama().items() if "mm_projector" not in k}
    base = llavas.write(tmp_path / "llama", llama, {"model_type": "llama", **llavas.LLAMA})
    assert "no LLaVA base but: language model" in do(base)[2]
    base = llavas.write(tmp_path / "explainer", llavas.explainer(), llavas.ORIGINAL_CONFIG)
    assert "m2f2 import" in do(base)[2]
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in do(tmp_path / "empty")[2]


def test_a_detector_with_nan(do, home, tmp_path):
    judge = Path(shutil.copytree(home / "detector", tmp_path / "judge"))
    tensors = io.read_tensors(judge)
    tensors = {k: t.clone() for k, t in tensors.items()}
    tensors["head.bias"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, judge / "model.safetensors")
    code, _, err = do("bin", judge)
    assert code == 1
    assert "detector.head.bias' holds NaN" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["judge"]


def test_an_existing_output_is_kept(do, tmp_path):
    assert do("bin")[0] == 0
    before = io.fingerprint(tmp_path / "out", verify=True)
    code, _, err = do("bin", "detector", "--seed", "3")
    assert code == 1
    assert "--overwrite" in err
    assert io.fingerprint(tmp_path / "out", verify=True) == before
    assert do("bin", "detector", "--seed", "3", "--overwrite")[0] == 0
    assert io.fingerprint(tmp_path / "out", verify=True) != before


def test_a_full_disk_leaves_nothing(do, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = do("bin")
    assert code == 1
    assert "No space left" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_loads(home, tmp_path):
    script = (
        "import contextlib, sys, time\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints.initialize import init_llava\n"
        "home, out = map(Path, sys.argv[1:])\n"
        "def slow(steps, note=''):\n"
        "    print('writing\\n', end='', flush=True); time.sleep(60)\n"  # by threads
        "init_llava(\n"
        "    str(home / 'bin'), str(home / 'detector'), out,\n"
        "    progress=lambda label, total: contextlib.nullcontext(slow),\n"
        ")\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(home), str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists()


def test_wrong_flags(do):
    assert do("bin", "detector", "--dtype", "int8")[0] == 2
    assert do("bin", "detector", "--tower", "both")[0] == 2
    assert do("bin", "detector", "--seed", "-1")[0] == 2


def test_json(do, tmp_path):
    code, out, _ = do("bin", "detector", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["fingerprint"] == io.fingerprint(tmp_path / "out")
    assert {part["part"] for part in found["parts"]} == {
        "detector",
        "detector.clip",
        "forgery_projector",
        "language_model",
        "mm_projector",
    }
