"""``m2f2 merge`` from the command line."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f2cli.checkpoints import adapters, io, verify
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.checkpoints.merge import Merge
from m2f2cli.cli.app import run
from m2f2cli.models.explainer import Explainer
from tests.checkpoints import merges


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a delta of stage 2 and one of stage 3, both trained on it."""
    place = tmp_path_factory.mktemp("merge")
    merges.base(place / "base", torch.float16)
    merges.stage_2(place / "delta", place / "base")
    merges.stage_3(place / "adapter", place / "base")
    return place


@pytest.fixture
def do(home, tmp_path, capsys):
    def go(*names: str, extra: tuple[str, ...] = ()) -> tuple[int, str, str]:
        deltas = [part for name in names for part in ("--delta", str(home / name))]
        arguments = ["--base", str(home / "base"), *deltas, "--output", str(tmp_path / "out")]
        code = run(["merge", *arguments, *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return go


def test_it_says_what_it_did(do, home, tmp_path):
    code, out, err = do("adapter")
    assert code == 0, err
    mark = io.read_stage(tmp_path / "out")["fingerprint"]
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert (rows["folded"], rows["replaced"]) == ("4", "8")
    assert mark in out
    assert run(["info", str(tmp_path / "out"), "--verify"]) == 0


def test_json(do, tmp_path):
    code, out, _ = do("delta", extra=("--json", "--verify"))
    said = json.loads(out)
    assert code == 0
    assert said["fingerprint"] == io.read_stage(tmp_path / "out")["fingerprint"]
    assert said["existed"] is False
    assert said["forced"] == []
    assert [a["tensors"] for a in said["actions"] if a["action"] == "replaced"] == [4]
    assert said["verified"]["tensors"] == 4
    again = json.loads(do("delta", extra=("--json",))[1])
    assert again["existed"] is True
    assert again["fingerprint"] == said["fingerprint"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(do, home, tmp_path, as_json):
    code, out, err = do("adapter", extra=("--dry-run", *(["--json"] if as_json else [])))
    assert code == 0, err
    assert not list(tmp_path.iterdir())
    if not as_json:
        assert "Nothing was written." in out
        assert "peak memory about" in out
        assert "folded: language_model.model.layers.0.mlp.down_proj.weight" in err
        return
    plan = json.loads(out)
    assert plan["bytes"] == sum(t.load().nbytes for t in io.open_tensors(home / "base").values())
    assert len(plan["tensors"]) == 12
    assert plan["peak_memory_bytes"] < 1.5e9


def test_verify_says_what_it_loaded(do, monkeypatch):
    code, out, _ = do("adapter", extra=("--verify",))
    assert code == 0
    assert "12 changed tensors read back" in out
    assert "Loaded: the whole model in float32, twice." in out
    monkeypatch.setattr(verify, "free_memory", lambda: 1000)
    code, out, _ = do("adapter", extra=("--verify",))
    assert code == 0
    assert "Loaded: one tensor at a time; running the whole model takes 0.0 GB" in out


@pytest.mark.parametrize("name", ["delta", "adapter"])
def test_verify_finds_a_wrong_value(home, tmp_path, name):
    """A merge with one value of one changed tensor off by a hundredth."""
    job = Merge(home / "base", [home / name], tmp_path / "out")
    job.write()
    tensors = {key: t.clone() for key, t in io.read_tensors(tmp_path / "out").items()}
    key = next(row.name for row in job.rows.values() if row.changes and len(row.result.shape) == 2)
    tensors[key][0, 0] += 0.01
    io.write_checkpoint(
        tmp_path / "out",
        config=io.read_config(tmp_path / "out"),
        tensors=tensors,
        stage={},
        overwrite=True,
    )
    with pytest.raises(verify.CheckpointError, match="is not base plus update"):
        verify.prove(job)


@pytest.fixture(scope="module")
def trained(home) -> Path:
    """An adapter that PEFT made: every linear layer of the language model, and both projectors."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    layers = r"language_model\.model\.layers\.\d+\..*_proj"
    projectors = ["mm_projector", "forgery_projector"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, modules_to_save=projectors)
    model = get_peft_model(loaded(home / "base"), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    adapters.write_delta(
        home / "trained",
        tensors=get_peft_model_state_dict(model),
        stage={"stage": "lora", "parent": io.fingerprint(home / "base")},
        adapter=adapters.adapter_fields(model.peft_config["default"].to_dict()),
    )
    return home / "trained"


def loaded(folder: Path) -> Explainer:
    return load_explainer(str(folder), device="cpu", dtype="float32")[0]


def logits(model: torch.nn.Module) -> torch.Tensor:
    config = model.config
    ids = [-200] * config.patches + [-300, 1, 7, 9, 30]
    side = config.detector_config.image_size
    pixels = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_merged_forward_is_the_adapter_s(home, trained, tmp_path, dtype, record_property):
    """PEFT's own merge in float64, each weight rounded once, has the same weights and logits."""
    from peft import PeftModel

    Merge(home / "base", [trained], tmp_path / "out", dtype=dtype).write()
    merged, kind = loaded(tmp_path / "out"), getattr(torch, dtype)
    apart = PeftModel.from_pretrained(loaded(home / "base"), str(trained)).eval()
    expected, found = logits(apart), logits(merged)
    exact = apart.double().merge_and_unload()
    for name, parameter in exact.named_parameters():
        if name.startswith("detector."):
            continue
        weight, value = merged.get_parameter(name).double(), parameter.data
        half_step = torch.finfo(kind).eps / 2 * value.abs() + torch.finfo(kind).tiny * 2**-11
        float_sums = 2**-21 * value.abs().max()
        assert ((weight - value).abs() <= half_step + float_sums).all(), name
        parameter.data = value.to(kind).double()
    same = float((found - logits(exact.float())).abs().max() / expected.abs().max())
    share = float((found - expected).abs().max() / expected.abs().max())
    record_property(f"logits, share of the largest, {dtype}", share)
    record_property(f"logits, from the exact weights rounded once, {dtype}", same)
    assert same <= 2**-16
    assert share <= {"float16": 2**-8, "bfloat16": 2**-6, "float32": 2**-16}[dtype]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_layer_is_within_one_rounding_of_its_adapter_s(home, trained, tmp_path, dtype):
    """On the inputs it meets in the forward pass, each output is as near as its weights can be."""
    from peft import PeftModel

    Merge(home / "base", [trained], tmp_path / "out", dtype=dtype).write()
    merged = loaded(tmp_path / "out")
    apart = PeftModel.from_pretrained(loaded(home / "base"), str(trained)).eval()
    unit = torch.finfo(getattr(torch, dtype)).eps / 2 + 2**-20
    names = []

    def compare(name, inputs, output) -> None:
        layer = merged.get_submodule(name)
        limit = unit * (inputs.abs() @ layer.weight.abs().T)
        assert ((layer(inputs) - output).abs() <= limit).all(), name
        names.append(name)

    for name, module in apart.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda m, i, o, name=name: compare(name, i[0], o))
    logits(apart)
    assert len(names) == 7 * merged.config.text_config.num_hidden_layers


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.merge import Merge

torch.set_num_threads(1)
base, delta, output = map(Path, sys.argv[1:4])
wanted = Merge(base, [delta], output.with_name("first")).write().fingerprint
begin = time.perf_counter()
if not (pid := os.fork()):
    Merge(base, [delta], output.with_name("second")).write()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
usual = time.perf_counter() - begin
random.seed(7)
absent = complete = 0
for _ in range(30):
    pid = os.fork()
    if not pid:
        Merge(base, [delta], output).write()
        os._exit(0)
    time.sleep(random.random() * 1.5 * usual)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if output.exists():
        assert io.fingerprint(output, verify=True) == wanted
        complete += 1
        Merge(base, [delta], output).write()
        os.rename(output, output.with_name(f"done-{complete}"))
    else:
        absent += 1
Merge(base, [delta], output).write()
assert io.fingerprint(output, verify=True) == wanted
assert not list(output.parent.glob(".*")), list(output.parent.glob(".*"))
print(absent, complete)
"""


@pytest.mark.slow
def test_thirty_kills_leave_no_half_written_result(home, tmp_path, record_property):
    paths = [str(p) for p in (home / "base", home / "adapter", tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    absent, complete = map(int, done.stdout.split())
    record_property("killed before, after the result was there", (absent, complete))
    assert absent + complete == 30
    assert absent >= 3


def test_a_file_that_cannot_grow_leaves_nothing(home, tmp_path):
    command = ("merge", "--base", home / "base", "--delta", home / "delta", "--output")
    done = subprocess.run(
        [sys.executable, "-m", "m2f2cli", *map(str, command), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    assert "Cannot write" in done.stderr
    assert "nothing half-written was left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_delta_of_another_base_is_forced_in_the_open(do, home, tmp_path):
    merges.base(tmp_path / "other", torch.bfloat16)
    merges.stage_2(home / "stray", tmp_path / "other")
    code, out, err = do("stray")
    assert (code, out) == (1, "")
    assert "was trained on sha256:" in err
    assert "--force merges it all the same" in err
    code, _, err = do("stray", extra=("--force",))
    assert code == 0
    assert "warning: The delta" in err
    assert io.read_stage(tmp_path / "out")["forced"]


def test_an_output_that_is_not_empty(do, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    code, out, err = do("delta")
    assert (code, out) == (1, "")
    assert "exists and is not empty" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_wrong_usage(do, tmp_path):
    assert run(["merge", "--base", "x", "--output", "y"]) == 2
    assert do("delta", extra=("--dtype", "int8"))[0] == 2
    assert do("nothing")[0] == 1
