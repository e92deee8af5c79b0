from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.cli.app import run
from tests.checkpoints import llavas, published

PREFIX = "base_model.model."
RANK = 2
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 4,
    "bias": "none",
    "use_rslora": False,
    "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "stage-2",
}
TOWER = "model.vision_tower.vision_tower.vision_model.encoder.layers"
TEXT = "deepfake_encoder.clip_text_encoder.model.text_model.encoder.layers"


def projector(name: str, inputs: int, prefix: str = "") -> dict[str, torch.Tensor]:
    width = llavas.WIDTH
    shapes = {
        "0.weight": (width, inputs),
        "0.bias": (width,),
        "2.weight": (width, width),
        "2.bias": (width,),
    }
    return {
        f"{prefix}{name}.{part}": llavas.random(shape, name + part, torch.bfloat16)
        for part, shape in shapes.items()
    }


def pair(module: str, shape: tuple[int, int], *, trained: bool = True) -> dict[str, torch.Tensor]:
    up = llavas.random((shape[0], RANK), module + "B", torch.bfloat16)
    return {
        f"{PREFIX}{module}.lora_A.weight": llavas.random((RANK, shape[1]), module, torch.bfloat16),
        f"{PREFIX}{module}.lora_B.weight": up if trained else torch.zeros_like(up),
    }


def adapter(*, frozen_zero: bool = True) -> dict[str, torch.Tensor]:
    """An adapter as the published stage 3 leaves it: CLIP's q/k/v are wrapped too, untrained."""
    square, clip = (llavas.WIDTH, llavas.WIDTH), (published.WIDTH, published.WIDTH)
    found = {}
    for n in range(llavas.LAYERS):
        found |= pair(f"model.layers.{n}.self_attn.q_proj", square)
        found |= pair(f"model.layers.{n}.mlp.up_proj", (llavas.INNER, llavas.WIDTH))
    for n in range(published.BLOCKS):
        found |= pair(f"{TOWER}.{n}.self_attn.q_proj", clip, trained=not frozen_zero)
        found |= pair(f"{TEXT}.{n}.self_attn.q_proj", clip, trained=not frozen_zero)
    return found


def both(prefix: str = PREFIX) -> dict[str, torch.Tensor]:
    vision = projector("model.mm_projector", published.WIDTH, prefix)
    return {**vision, **projector("deepfake_projector", 2, prefix)}


def stage_2(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    torch.save(tensors or projector("deepfake_projector", 2), folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    return folder


def stage_3(folder: Path, *, binary: bool = False, config: Any = None, **tensors: Any) -> Path:
    folder.mkdir()
    state = {**adapter(), **tensors}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    if binary:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    torch.save(both(), folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config or ADAPTER))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    return folder


@pytest.fixture
def do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def go(source: Path, *extra: str) -> tuple[int, str, str]:
        code = run(["import", str(source), "--output", str(tmp_path / "out"), *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("alone", [False, True])
def test_stage_2_becomes_a_delta(do, tmp_path, alone):
    source = stage_2(tmp_path / "in")
    code, out, err = do(source / "mm_projector.bin" if alone else source, "--verify")
    assert code == 0, err
    assert "4 tensors read back, largest difference 0.0; a delta does not run alone" in out
    theirs = projector("deepfake_projector", 2)
    wanted = {key.replace("deepfake", "forgery"): tensor for key, tensor in theirs.items()}
    same(load_file(tmp_path / "out" / "delta.safetensors"), wanted)
    stage = io.read_stage(tmp_path / "out")
    assert stage["parent"] is None
    assert stage["fingerprint"].startswith("sha256:")
    assert run(["info", str(tmp_path / "out"), "--json"]) == 0


def test_projectors_of_a_training_checkpoint_are_a_delta_too(do, tmp_path):
    code, _, err = do(stage_2(tmp_path / "in", both()))
    assert code == 0, err
    found = load_file(tmp_path / "out" / "delta.safetensors")
    renamed = {
        key.removeprefix(PREFIX)
        .removeprefix("model.")
        .replace("deepfake_projector", "forgery_projector"): tensor
        for key, tensor in both().items()
    }
    same(found, renamed)


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True])
def test_stage_3_becomes_an_adapter_that_peft_loads(do, tmp_path, binary):
    source = stage_3(tmp_path / "in", binary=binary)
    code, out, err = do(source, "--verify")
    assert code == 0, err
    assert "frozen in training: its update is exactly zero" in out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    begin = "language_model.model.layers"
    assert sorted(config["target_modules"]) == sorted(
        f"{begin}.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert config["modules_to_save"] == ["mm_projector", "forgery_projector"]
    assert config["lora_alpha"] == 4
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = {
        key.replace(f"{PREFIX}model.layers", f"{PREFIX}{begin}"): tensor
        for key, tensor in adapter().items()
        if ".model.layers." in key
    }
    assert {k: v for k, v in found.items() if "lora_" in k}.keys() == wanted.keys()
    same({key: found[key] for key in wanted}, wanted)
    _check_with_peft(tmp_path, found)


def _check_with_peft(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    from peft import PeftModel

    from m2f2cli.checkpoints.load import load_explainer

    (tmp_path / "clip.json").write_text(json.dumps(published.CLIP_CONFIG))
    base = llavas.write(tmp_path / "base", llavas.explainer(), llavas.ORIGINAL_CONFIG)
    import_weights([base], tmp_path / "explainer", clip_config=tmp_path / "clip.json")
    model, _ = load_explainer(str(tmp_path / "explainer"), device="cpu")
    inside = PeftModel.from_pretrained(model, str(tmp_path / "out")).state_dict()
    for key, tensor in saved.items():
        if "lora_" in key:
            name = key.replace(".weight", ".default.weight")
        else:
            module = key.removeprefix(PREFIX).split(".")[0]
            name = key.replace(module, f"{module}.modules_to_save.default")
        assert torch.equal(inside[name], tensor.float()), key


def test_updates_of_clip_that_are_not_zero_are_kept(do, tmp_path):
    tensors = adapter(frozen_zero=False)
    code, out, err = do(stage_3(tmp_path / "in", **tensors))
    assert code == 0, err
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    clip = sorted(t for t in targets if t.startswith("detector.clip."))
    name = "detector.clip.{}.encoder.layers.{}.self_attn.q_proj"
    assert clip == sorted(
        [name.format("text", n) for n in range(3)] + [name.format("vision", n) for n in range(2)]
    )
    assert "above the hidden state" in out


def test_json_lists_every_key_once(do, tmp_path):
    code, out, _ = do(stage_3(tmp_path / "in"), "--json")
    assert code == 0
    keys = [row["key"] for row in json.loads(out)["keys"]]
    assert sorted(keys) == sorted({**adapter(), **both()})


Q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({f"{Q}B.weight": None}, "only one half of its update"),
    "rank": ({f"{Q}A.weight": torch.ones(3, llavas.WIDTH)}, "not of rank 2"),
    "unknown": ({f"{PREFIX}model.layers.0.x.lora_C": torch.ones(1)}, "model.layers.0.x.lora_C"),
    "nan": ({f"{Q}B.weight": torch.full((llavas.WIDTH, RANK), float("nan"))}, "holds NaN"),
    "rslora": ({"config": ADAPTER | {"use_rslora": True}}, "use_rslora = True"),
    "dora": ({"config": ADAPTER | {"use_dora": True}}, "use_dora = True"),
    "kind": ({"config": ADAPTER | {"peft_type": "LOHA"}}, "peft_type = LOHA"),
    "patterns": ({"config": ADAPTER | {"rank_pattern": {"x": 4}}}, "rank_pattern"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_adapter_is_one_sentence(do, tmp_path, name):
    changes, words = BAD[name]
    code, out, err = do(stage_3(tmp_path / "in", **changes))
    assert (code, out) == (1, "")
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_nothing(do, tmp_path):
    zero = {k: torch.zeros_like(t) for k, t in adapter().items() if ".lora_B." in k}
    code, _, err = do(stage_3(tmp_path / "in", **zero))
    assert code == 1
    assert "changes nothing" in err


def test_missing_parts(do, tmp_path):
    source = stage_3(tmp_path / "in")
    (source / "non_lora_trainables.bin").unlink()
    code, _, err = do(source)
    assert code == 1
    assert "non_lora_trainables.bin" in err
    tensors = projector("deepfake_projector", 2)
    del tensors["deepfake_projector.2.bias"]
    code, _, err = do(stage_2(tmp_path / "in-2", tensors))
    assert code == 1
    assert "lacks the tensors forgery_projector.2.bias" in err
    tensors = projector("deepfake_projector", 2) | {"deepfake_projector.5.bias": torch.ones(2)}
    code, _, err = do(stage_2(tmp_path / "in-3", tensors))
    assert code == 1
    assert "deepfake_projector.5.bias" in err


@pytest.mark.parametrize("all_of_them", [True, False])
def test_placeholders_of_sharded_weights_are_named(do, tmp_path, all_of_them):
    """DeepSpeed ZeRO-3 leaves an empty tensor where each process has its own part."""
    tensors = projector("deepfake_projector", 2)
    for key in list(tensors)[: None if all_of_them else 1]:
        tensors[key] = torch.zeros(0, dtype=tensors[key].dtype)
    source = stage_2(tmp_path / "in", tensors)
    code, out, err = do(source)
    assert (code, out) == (1, "")
    assert "placeholders that DeepSpeed ZeRO-3 or FSDP leaves" in err
    assert "zero_to_fp32.py" in err
    assert not (tmp_path / "out").exists()
    assert run(["info", str(source)]) == 0


def test_a_folder_of_a_sharded_run_says_how_to_gather_it(do, tmp_path):
    (tmp_path / "in" / "global_step9").mkdir(parents=True)
    (tmp_path / "in" / "zero_to_fp32.py").write_text("")
    code, _, err = do(tmp_path / "in")
    assert code == 1
    assert "holds no weights" in err
    assert "zero_to_fp32.py" in err


def test_a_delta_of_ours_is_no_import(do, tmp_path):
    assert do(stage_3(tmp_path / "in"))[0] == 0
    (tmp_path / "out").rename(tmp_path / "ours")
    code, _, err = do(tmp_path / "ours")
    assert code == 1
    assert "nothing to import" in err


def test_a_delta_takes_nothing_beside_it(tmp_path, capsys):
    sources = [str(stage_2(tmp_path / "a")), str(stage_3(tmp_path / "b"))]
    assert run(["import", *sources, "--output", str(tmp_path / "out")]) == 2
    assert "do not make one checkpoint" in capsys.readouterr().err
