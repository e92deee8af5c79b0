from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2f2cli import files
from m2f2cli.checkpoints import io
from m2f2cli.errors import CheckpointError
from m2f2cli.files import atomic_write

CONFIG = {"model_type": "m2f2_detector", "hidden_size": 8}


def write(folder: Path, tensors: dict[str, torch.Tensor], **kwargs: object) -> str:
    return io.write_checkpoint(
        folder,
        config=CONFIG,
        tensors=tensors,
        stage={"stage": "import"},
        **kwargs,  # type: ignore[arg-type]
    )


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype
        assert tensor.shape == second[key].shape
        assert torch.equal(tensor, second[key])


def test_round_trip_is_bitwise_and_readable_by_safetensors(tmp_path, small_tensors):
    mark = write(tmp_path / "model", small_tensors, extra_files={"note.json": b"{}"})
    same(small_tensors, io.read_tensors(tmp_path / "model", finite=True))
    same(small_tensors, load_file(tmp_path / "model" / "model.safetensors"))
    assert io.read_config(tmp_path / "model") == CONFIG
    assert io.read_stage(tmp_path / "model") == {"stage": "import", "fingerprint": mark}
    assert (tmp_path / "model" / "note.json").read_bytes() == b"{}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_strided_and_transposed_tensors_are_stored_as_seen(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "slice": base[:, 1:3], "shared": base}
    write(tmp_path / "m", tensors)
    same({k: v.contiguous() for k, v in tensors.items()}, io.read_tensors(tmp_path / "m"))


def test_shards_hold_the_same_as_one_file(tmp_path, small_tensors):
    one = write(tmp_path / "one", small_tensors)
    many = write(tmp_path / "many", small_tensors, max_shard_bytes=40)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert not (tmp_path / "many" / "model.safetensors").exists()
    same(io.read_tensors(tmp_path / "one"), io.read_tensors(tmp_path / "many"))
    assert one == many


def test_fingerprint_follows_content_not_bookkeeping(tmp_path, small_tensors):
    mark = write(tmp_path / "a", small_tensors)
    assert mark.startswith("sha256:")
    assert len(mark) == 71
    assert io.fingerprint(tmp_path / "a") == io.fingerprint(tmp_path / "a", verify=True)
    assert write(tmp_path / "b", dict(reversed(small_tensors.items()))) == mark
    other = {**small_tensors, "alpha": torch.tensor(0.25)}
    assert write(tmp_path / "c", other) != mark
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps({**CONFIG, "transformers_version": "99"}))
    assert io.fingerprint(tmp_path / "a", verify=True) == mark
    config.write_text(json.dumps({**CONFIG, "hidden_size": 9}))
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        io.fingerprint(tmp_path / "a", verify=True)


def test_a_changed_weight_is_noticed(tmp_path, small_tensors):
    write(tmp_path / "a", small_tensors)
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="was changed"):
        io.fingerprint(tmp_path / "a", verify=True)


def test_an_existing_folder_is_kept_unless_told(tmp_path, small_tensors):
    write(tmp_path / "a", small_tensors)
    with pytest.raises(CheckpointError, match="not empty") as caught:
        write(tmp_path / "a", {"x": torch.ones(1)})
    assert "--overwrite" in (caught.value.hint or "")
    same(small_tensors, io.read_tensors(tmp_path / "a"))
    write(tmp_path / "a", {"x": torch.ones(1)}, overwrite=True)
    same({"x": torch.ones(1)}, io.read_tensors(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        write(tmp_path / "a", {"x": torch.ones(1)}, overwrite=True)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", {"x": torch.ones(1)})
    assert io.read_tensors(tmp_path / "a")["x"] == 1


def test_overwrite_without_an_exchange_call(tmp_path, small_tensors, monkeypatch):
    write(tmp_path / "a", small_tensors)
    monkeypatch.setattr(sys, "platform", "another")
    write(tmp_path / "a", {"x": torch.ones(1)}, overwrite=True)
    same({"x": torch.ones(1)}, io.read_tensors(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("place", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_result_or_none(
    tmp_path, small_tensors, monkeypatch, place, existing
):
    target = tmp_path / "a"
    if existing:
        write(target, small_tensors)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "write":
        monkeypatch.setattr(files.FilePart, "write", full)
    elif place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(sys, "platform", "another")
        monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write(target, {"x": torch.ones(1)}, overwrite=True)
    assert "disk space" in (caught.value.hint or "")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["a"] if existing else [])
    if existing:
        same(small_tensors, io.read_tensors(target))


def test_a_really_full_disk(tmp_path):
    """The kernel refuses: a limit on file size stands for a full disk."""
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli.errors import CheckpointError\n"
        "from m2f2cli.checkpoints import io\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    io.write_checkpoint(Path(sys.argv[1]), config={}, stage={},\n"
        "                           tensors={'x': torch.ones(1_000_000)})\n"
        "except CheckpointError as error:\n"
        "    sys.exit(7 if 'too large' in error.message else 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_old_result_and_no_litter(tmp_path, small_tensors):
    target = tmp_path / "a"
    write(target, small_tensors)
    script = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli import files\n"
        "from m2f2cli.checkpoints import io\n"
        "def slow(piece, data):\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "files.FilePart.write = slow\n"
        "io.write_checkpoint(Path(sys.argv[1]), config={}, stage={}, overwrite=True,\n"
        "                       tensors={'x': torch.ones(9)})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    same(small_tensors, io.read_tensors(target))
    assert any(p.name.endswith(".partial") for p in tmp_path.iterdir())
    write(target, {"x": torch.ones(1)}, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_living_writer_is_left_alone(tmp_path):
    other = tmp_path / f".a.{os.getpid()}-00000000.partial"
    other.mkdir()
    write(tmp_path / "a", {"x": torch.ones(1)})
    assert other.is_dir()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(tmp_path, small_tensors, value):
    small_tensors["a.weight"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 tensors: a\.weight"):
        write(tmp_path / "a", small_tensors)
    assert list(tmp_path.iterdir()) == []
    io.write_tensor_file(tmp_path / "model.safetensors", small_tensors)
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        io.read_tensors(tmp_path, finite=True)


def test_wrong_tensors_are_named():
    good = {"a": torch.ones(2), "b": torch.ones(3)}
    io.check_names_and_shapes(good, good, what="'m'")
    io.check_names_and_shapes({"a": good["a"]}, good, what="'m'", optional=("b",))
    with pytest.raises(CheckpointError, match="1 missing: b") as caught:
        io.check_names_and_shapes({"a": torch.ones(4), "c": good["b"]}, good, what="'m'")
    assert "1 unexpected: c" in caught.value.message
    assert "a is [4], not [2]" in caught.value.message


def test_broken_folders_are_one_sentence(tmp_path, small_tensors):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        io.read_config(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        io.read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        io.read_tensors(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        io.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        io.read_config(tmp_path)
    write(tmp_path / "m", small_tensors)
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="no complete safetensors file"):
        io.read_tensors(tmp_path / "m")


def test_index_and_shards_must_agree(tmp_path, small_tensors):
    write(tmp_path / "m", small_tensors, max_shard_bytes=40)
    index = tmp_path / "m" / io.INDEX
    content = json.loads(index.read_text())
    moved = {**content["weight_map"], "ghost": next(iter(content["weight_map"].values()))}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match="ghost"):
        io.read_tensors(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="missing"):
        io.read_tensors(tmp_path / "m")
    index.write_text(json.dumps(content))
    next((tmp_path / "m").glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        io.read_tensors(tmp_path / "m")


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.json"
    atomic_write(path, b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        write(tmp_path / "file" / "model", {"x": torch.ones(1)})


@pytest.mark.slow
def test_writing_needs_no_second_copy_of_the_model(tmp_path):
    """Peak memory while writing 64 MiB stays well below 64 MiB above the tensors themselves."""
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints import io\n"
        "t = {str(n): torch.full((1 << 20,), float(n)) for n in range(16)}\n"
        "io.write_checkpoint(Path(sys.argv[1]) / 'warm', config={}, stage={},\n"
        "                       tensors={'x': torch.ones(1)})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "io.write_checkpoint(Path(sys.argv[1]) / 'a', config={}, stage={}, tensors=t)\n"
        "sys.exit((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode < 24, (
        f"grew by {done.returncode} MiB in {time.monotonic() - begin:.1f} s"
    )


def int8_matrix(rows: int, columns: int, top: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(top)
    integers = torch.randint(-top, top + 1, (rows, columns), generator=generator)
    return integers * (0.001 + torch.rand(rows, 1, generator=generator))


@pytest.mark.parametrize("top", [127, 101, 1])
def test_int8_rows_come_back_as_the_values_they_stand_for(tmp_path, top):
    tensors = {"a.weight": int8_matrix(9, 40, top), "a.bias": torch.ones(9), "z": torch.zeros(2, 3)}
    tensors["a.weight"][4] = 0
    mark = write(tmp_path / "packed", tensors, int8=["a.weight", "z"])
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert stored["a.weight"].dtype == torch.int8
    assert stored["a.weight_scale"].shape == (9,)
    read = io.read_tensors(tmp_path / "packed", finite=True)
    assert set(read) == set(tensors)
    assert torch.allclose(read["a.weight"], tensors["a.weight"], rtol=1e-6, atol=0)
    assert torch.equal(read["z"], tensors["z"])
    again = write(tmp_path / "again", read, int8=["a.weight", "z"])
    assert torch.equal(io.read_tensors(tmp_path / "again")["a.weight"], read["a.weight"])
    assert io.fingerprint(tmp_path / "again", verify=True) == again
    assert write(tmp_path / "plain", read) == again
    assert io.fingerprint(tmp_path / "packed") == mark


def test_what_is_no_int8_matrix_is_not_stored_as_one(tmp_path):
    with pytest.raises(CheckpointError, match="no int8 rows"):
        write(tmp_path / "m", {"a": torch.randn(3, 50)}, int8=["a"])
    assert not (tmp_path / "m").exists()
