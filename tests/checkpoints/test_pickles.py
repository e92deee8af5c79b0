from __future__ import annotations

import os
import pickle
import pty
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli.checkpoints.io import open_weight_file
from m2f2cli.checkpoints.torch_files import read_torch_file
from m2f2cli.errors import CheckpointError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(value: object, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


class Bomb:
    """Runs a command when an ordinary unpickler reads it."""

    def __init__(self, runner: object, target: Path) -> None:
        self.runner, self.target = runner, target

    def __reduce__(self) -> tuple[object, tuple[object]]:
        command = ["touch", str(self.target)]
        return self.runner, (command if self.runner is pty.spawn else " ".join(command),)


@LAYOUTS
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
@pytest.mark.parametrize("runner", [pty.spawn, os.system], ids=["inert", "blocked"])
def test_a_malicious_file_runs_nothing(tmp_path, zipped, place, runner):
    """What torch blocks for good is named and refused; all else is inert and the weights read."""
    witness = tmp_path / "owned"
    bomb = Bomb(runner, witness)
    value = {
        "beside": {"state_dict": {"w": torch.ones(2)}, "x": bomb},
        "inside": {"w": torch.ones(2), "x": [bomb]},
        "alone": bomb,
    }[place]
    path = save(value, tmp_path / "x.pth", zipped)
    if runner is os.system:
        with pytest.raises(CheckpointError, match=rf"{os.system.__module__}\.system.*not read"):
            open_weight_file(path)
        assert not witness.exists()
        return
    assert read_torch_file(path).foreign == ("pty.spawn",)
    assert not witness.exists()
    if place == "alone":
        with pytest.raises(CheckpointError, match="holds no model weights"):
            open_weight_file(path)
    else:
        assert torch.equal(open_weight_file(path).tensors["w"].load(), torch.ones(2))


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
        content = read_torch_file(tmp_path / "x.pth").content
    except CheckpointError:
        content = None
    assert not witness.exists()
    assert os.environ["PATH"] == path_before
    assert content is None or type(content).__module__.startswith("m2f2cli.checkpoints")


def test_a_huge_memo_is_refused_before_it_costs_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_weight_file(tmp_path / "x.pth")


@LAYOUTS
def test_every_truncation_is_one_sentence(tmp_path, zipped, small_tensors):
    whole = save(small_tensors, tmp_path / "x.pth", zipped).read_bytes()
    cut = tmp_path / "cut.pth"
    for keep in range(0, len(whole), max(1, len(whole) // 60)):
        cut.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError) as caught:
            open_weight_file(cut).tensors  # noqa: B018 - opening or listing raises
        assert "\n" not in caught.value.message


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """One file of each layout: torch writes addresses into them, so no two have the same length."""
    folder = tmp_path_factory.mktemp("flip")
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(1)}
    return {
        zipped: save(tensors, folder / f"{zipped}.pth", zipped).read_bytes()
        for zipped in (False, True)
    }


@settings(max_examples=150, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_a_flipped_byte_is_an_error_or_a_value_never_a_crash(
    tmp_path_factory, saved_twice, data, zipped
):
    path = tmp_path_factory.mktemp("flipped") / "x.pth"
    content = bytearray(saved_twice[zipped])
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        for stored in open_weight_file(path).tensors.values():
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
        open_weight_file(tmp_path / name)


def test_missing_file_folder_and_other_archives(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        open_weight_file(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_weight_file(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(CheckpointError, match=r"not one that torch.save wrote"):
        open_weight_file(tmp_path / "a.zip")


def test_a_compressed_archive_is_refused(tmp_path):
    save({"a": torch.ones(9)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    with pytest.raises(CheckpointError, match="compressed archive"):
        open_weight_file(tmp_path / "y.pth")


def test_several_state_dicts_are_a_question_not_a_guess(tmp_path):
    inner = {"w": torch.ones(1)}
    path = save({"generator": inner, "critic": inner}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="several sets of weights: generator, critic"):
        open_weight_file(path).tensors  # noqa: B018
    path = save({"state_dict": inner, "ema": {"w": torch.zeros(1)}}, tmp_path / "y.pth")
    assert open_weight_file(path).where == "state_dict"
    path = save(defaultdict(dict, odd=inner), tmp_path / "z.pth")
    assert open_weight_file(path).where == "odd"


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"epoch": 3, "auc": torch.tensor(0.9), "model_state_dict": "S"}, "model_state_dict"),
        ({"confusion": torch.ones(2, 2), "state_dict": "S", "epoch": 1}, "state_dict"),
        ({"checkpoint": {"model": "S"}, "args": {}}, "checkpoint.model"),
        ({"model": "S", "ema": {"model": "S"}}, "model"),
        ({"state_dict": "S", "callbacks": {"best": {"score": torch.tensor(1.0)}}}, "state_dict"),
    ],
)
def test_a_state_dict_is_found_beside_metrics_and_below_keys(tmp_path, content, where):
    def filled(value):
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        weights = {"a.weight": torch.ones(3, 4), "a.bias": torch.ones(3)}
        return weights if isinstance(value, str) else value

    found = open_weight_file(save(filled(content), tmp_path / "x.pth"))
    assert (found.where, set(found.tensors)) == (where, {"a.weight", "a.bias"})
    assert set(found.others) == set(content) - {where.split(".")[0]}


def test_a_type_that_no_model_has_is_refused(tmp_path):
    for dtype in (torch.complex64, torch.uint16):
        path = save({"w": torch.ones(3).to(dtype)}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=f"holds w of type {str(dtype)[6:]}, which no"):
            open_weight_file(path)


def test_the_file_is_never_changed(tmp_path):
    path = save({"a": torch.ones(4)}, tmp_path / "x.pth")
    before = path.read_bytes()
    open_weight_file(path).tensors["a"].load().fill_(7.0)
    assert path.read_bytes() == before


def test_opening_a_large_file_reads_little(tmp_path):
    """Opening 96 MiB and reading one small tensor grows the process by a few MiB only."""
    value = {f"t{n}": torch.ones(1 << 20) for n in range(24)} | {"small": torch.ones(3)}
    save(value, tmp_path / "x.pth")
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints.io import open_weight_file\n"
        "torch.frombuffer(bytearray(8), dtype=torch.float32)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "tensors = open_weight_file(Path(sys.argv[1])).tensors\n"
        "assert float(tensors['small'].load().sum()) == 3\n"
        "assert len(tensors) == 25\n"
        "sys.exit((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pth")], check=False)
    assert done.returncode < 24


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(sizes: bytes = b"K\x10\x85", strides: bytes = b"K\x01\x85") -> bytes:
    """A program that builds a tensor over the 16 values of storage 0."""
    pid = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
    rest = b"\x89ccollections\nOrderedDict\n)RtR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + b"K\x00" + sizes + strides + rest


DEEP, WIDE = 400_000, b"(" + b"K\x01" * 400_000 + b"t"
HOSTILE = {
    "a deeply nested key": tensor() + b"\x85" * DEEP + b"N",
    "a key that doubles": text("k")
    + b"".join(b"q%c0h%ch%c\x86" % (n, n, n) for n in range(60))
    + b"N",
    "too many dimensions": text("v") + tensor(WIDE, WIDE),
    "copies of a growing list": text("v")
    + b"]q\x01("
    + b"K\x01" * 50_000
    + b"e0"
    + b"cbuiltins\nset\nq\x020"
    + b"h\x02h\x01\x85R0" * 50_000
    + b"N",
    "a text encoded again and again": text("v")
    + b"c_codecs\nencode\nq\x010"
    + text("hex_codec")
    + b"q\x020"
    + b"cbuiltins\nbytearray\n)R"
    + b"q\x030"
    + b"h\x01h\x03h\x02\x86Rq\x030" * 60
    + b"h\x03",
    "a text encoded in quadratic time": text("v")
    + b"c_codecs\nencode\n"
    + text("a\xe9" * 200_000)
    + text("punycode")
    + b"\x86R",
    "room for two billion zeros": text("v") + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "a deeply nested value": text("v") + b")" + b"\x85" * DEEP,
    "a device of a doubling name": text("v")
    + b"ctorch\ndevice\nq\x010"
    + text("x" * 200)
    + b"q\x020"
    + b"h\x01h\x02h\x02\x86Rq\x020" * 30
    + b"h\x02",
    "a type of unbalanced brackets": text("v")
    + b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
    + text("(")
    + b"\x89\x88\x87RU\x08"
    + bytes(8)
    + b"\x86R",
    "a tensor larger than its storage": text("v") + tensor(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_out_of_proportion_is_refused_at_once(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}(" + text("w") + tensor() + HOSTILE[name] + b"u.")
        archive.writestr("x/version", "3\n")
        archive.writestr("x/data/0", bytes(64))
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints.io import open_weight_file\n"
        "from m2f2cli.errors import CheckpointError\n"
        "import torch\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    open_weight_file(Path(sys.argv[1]))\n"
        "except CheckpointError as error:\n"
        "    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024\n"
        "    sys.exit(0 if 'truncated or damaged' in error.message and grown < 500 else 7)\n"
        "sys.exit(8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.pth")], check=False)
    assert done.returncode == 0
