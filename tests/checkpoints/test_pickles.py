from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from m2f2cli.checkpoints.pickles import Placeholder, load_tensors_file
from m2f2cli.errors import CheckpointError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value: object, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


class Bomb:
    """Runs a command when an ordinary unpickler reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@LAYOUTS
def test_tensors_of_every_type_and_layout(tmp_path, zipped):
    base = torch.arange(60.0).reshape(5, 12)
    tensors = OrderedDict(
        weight=torch.nn.Parameter(base.clone()),
        transposed=base.T,
        part=base[1:4, 2:9:3],
        scalar=torch.tensor(0.5),
        empty=torch.zeros(0, 3),
    )
    kinds = ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
    tensors |= {kind: torch.arange(5).to(getattr(torch, kind)) for kind in kinds}
    tensors["bool"] = torch.tensor([True, False, True])
    loaded = load_tensors_file(save(tensors, tmp_path / "x.pth", zipped))
    assert loaded.layout == ("zip" if zipped else "legacy")
    assert loaded.where == ""
    assert loaded.foreign == ()
    assert set(loaded.tensors) == set(tensors)
    for key, tensor in tensors.items():
        stored = loaded.tensors[key]
        assert stored.shape == tuple(tensor.shape)
        assert f"torch.{stored.dtype}" == str(tensor.dtype)
        assert torch.equal(stored.load(), tensor.detach()), key


def test_safetensors_file(tmp_path, small_tensors):
    save_file(small_tensors, tmp_path / "weights.bin")
    loaded = load_tensors_file(tmp_path / "weights.bin")
    assert loaded.layout == "safetensors"
    assert all(torch.equal(loaded.tensors[k].load(), t) for k, t in small_tensors.items())


@LAYOUTS
def test_a_training_checkpoint_with_a_scheduler(tmp_path, zipped):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    wrapped = {
        "epoch": 180,
        "model_state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
        "optimizer_state_dict": optimizer.state_dict(),
        "iter": np.int64(9),
        "scheduler": scheduler,
        "val_loss": np.float64(0.25),
    }
    loaded = load_tensors_file(save(wrapped, tmp_path / "current_model_180.pth", zipped))
    assert loaded.where == "model_state_dict"
    assert set(loaded.tensors) == {"module.weight", "module.bias"}
    assert torch.equal(loaded.tensors["module.weight"].load(), model.weight.detach())
    assert loaded.content["epoch"] == 180
    assert loaded.content["iter"] == 9
    assert loaded.content["val_loss"] == 0.25
    assert isinstance(loaded.content["scheduler"], Placeholder)
    assert "torch.optim.lr_scheduler.ReduceLROnPlateau" in loaded.foreign
    assert "scheduler" in loaded.rest
    assert "model_state_dict" not in loaded.rest


@LAYOUTS
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_a_malicious_file_runs_nothing(tmp_path, zipped, place):
    witness = tmp_path / "owned"
    bomb = Bomb(witness)
    value = {
        "beside": {"state_dict": {"w": torch.ones(2)}, "x": bomb},
        "inside": {"w": torch.ones(2), "x": [bomb]},
        "alone": bomb,
    }[place]
    path = save(value, tmp_path / "x.pth", zipped)
    loaded = load_tensors_file(path)
    assert not witness.exists()
    assert loaded.foreign == (f"{os.system.__module__}.system",)
    if place == "alone":
        with pytest.raises(CheckpointError, match="holds no model weights"):
            loaded.tensors  # noqa: B018 - the property raises
    else:
        assert torch.equal(loaded.tensors["w"].load(), torch.ones(2))


PROGRAMS = {
    "reduce": b"cos\nsystem\n(Vtouch WITNESS\ntR.",
    "inst": b"(Vtouch WITNESS\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nVtouch WITNESS\no.",
    "newobj": b"\x80\x02cos\nsystem\n(Vtouch WITNESS\nt\x81.",
    "eval": b"cbuiltins\neval\n(V__import__('os').system('touch WITNESS')\ntR.",
    "getattr chain": b"cbuiltins\ngetattr\n(cos\n_wrap_close\nVsystem\ntR(Vtouch WITNESS\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0dtouch WITNESS\x85R.",
    "build on a builder": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}V__defaults__\nNs\x86b.",
    "build on a class": b"\x80\x02ccollections\nOrderedDict\n}Vitems\nNsb.",
    "call of a result": b"cos\npopen\n(VX\ntR(Vtouch WITNESS\ntR.",
    "items into a stranger": b"\x80\x02cos\nenviron\nVPATH\nVX\ns.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hand_written_programs_do_nothing(tmp_path, name):
    """Each is wrapped in a real archive, so that only the restricted unpickler stands guard."""
    witness = tmp_path / "owned"
    program = PROGRAMS[name].replace(b"WITNESS", str(witness).encode())
    path_before = os.environ["PATH"]
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", program)
    try:
        content = load_tensors_file(tmp_path / "x.pth").content
    except CheckpointError:
        content = None
    assert not witness.exists()
    assert os.environ["PATH"] == path_before
    assert content is None or type(content).__module__.startswith("m2f2cli.checkpoints")


def test_a_huge_memo_is_refused_before_it_costs_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_tensors_file(tmp_path / "x.pth")


@LAYOUTS
def test_every_truncation_is_one_sentence(tmp_path, zipped, small_tensors):
    whole = save(small_tensors, tmp_path / "x.pth", zipped).read_bytes()
    cut = tmp_path / "cut.pth"
    for keep in range(0, len(whole), max(1, len(whole) // 60)):
        cut.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError) as caught:
            load_tensors_file(cut).tensors  # noqa: B018 - opening or listing raises
        assert "\n" not in caught.value.message


@settings(max_examples=150, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_a_flipped_byte_is_an_error_or_a_value_never_a_crash(tmp_path_factory, data, zipped):
    folder = tmp_path_factory.mktemp("flip")
    path = save({"a": torch.ones(2, 3), "b": torch.tensor(1)}, folder / "x.pth", zipped)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        for stored in load_tensors_file(path).tensors.values():
            stored.load()
    except CheckpointError:
        pass


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.pth", b"", "is empty"),
        ("text.pth", b"hello, this is no checkpoint at all", "no PyTorch or safetensors file"),
        ("plain.pkl", pickle.dumps({"a": list(range(99))}), "not one that torch.save wrote"),
        ("nul.pth", bytes(100), "no PyTorch or safetensors file"),
    ],
)
def test_other_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        load_tensors_file(tmp_path / name)


def test_missing_file_folder_and_other_archives(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        load_tensors_file(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors_file(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        load_tensors_file(tmp_path / "a.zip")


def test_a_compressed_archive_is_refused(tmp_path):
    save({"a": torch.ones(9)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    with pytest.raises(CheckpointError, match="compressed archive"):
        load_tensors_file(tmp_path / "y.pth")


def test_several_state_dicts_are_a_question_not_a_guess(tmp_path):
    inner = {"w": torch.ones(1)}
    path = save({"generator": inner, "critic": inner}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several sets of weights: generator, critic"):
        load_tensors_file(path).tensors  # noqa: B018
    path = save({"state_dict": inner, "ema": {"w": torch.zeros(1)}}, tmp_path / "y.pth")
    assert load_tensors_file(path).where == "state_dict"
    path = save(defaultdict(dict, odd=inner), tmp_path / "z.pth")
    assert load_tensors_file(path).where == "odd"


def test_the_file_is_never_changed(tmp_path):
    path = save({"a": torch.ones(4)}, tmp_path / "x.pth")
    before = path.read_bytes()
    load_tensors_file(path).tensors["a"].load().fill_(7.0)
    assert path.read_bytes() == before


def test_opening_a_large_file_reads_little(tmp_path):
    """Opening 96 MiB and reading one small tensor grows the process by a few MiB only."""
    value = {f"t{n}": torch.ones(1 << 20) for n in range(24)} | {"small": torch.ones(3)}
    save(value, tmp_path / "x.pth")
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints.pickles import load_tensors_file\n"
        "torch.frombuffer(bytearray(8), dtype=torch.float32)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tensors = load_tensors_file(Path(sys.argv[1])).tensors\n"
        "assert float(tensors['small'].load().sum()) == 3\n"
        "assert len(tensors) == 25\n"
        "sys.exit((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pth")], check=False)
    assert done.returncode < 24
