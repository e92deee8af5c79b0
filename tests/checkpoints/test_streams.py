from __future__ import annotations

import errno
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from m2f2cli.checkpoints import io
from m2f2cli.errors import CheckpointError

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool")


def values(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = 20 * torch.randn(shape, generator=generator)
    return noise.to(getattr(torch, dtype))


def joined(stream: io.LazyTensor) -> torch.Tensor:
    blocks = list(stream.blocks())
    return torch.cat(blocks).reshape(stream.shape)


def sizes(tensor: torch.Tensor) -> list[int]:
    """Of the blocks it is read in: all whole but the last."""
    whole, rest = divmod(tensor.numel(), io.BLOCK)
    return [io.BLOCK] * whole + ([rest] if rest else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("container", ["safetensors", "zip", "legacy"])
def test_a_stream_from_a_file_holds_its_values(tmp_path, dtype, container):
    tensors = {
        "a": values(dtype, (5, 6)),
        "scalar": values(dtype, ()),
        "empty": values(dtype, (0, 3)),
        "odd": values(dtype, (29,)),
        "blocks": values(dtype, (2, io.BLOCK + 3)),
    }
    path = tmp_path / "x"
    if container == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=container == "zip")
    found = io.open_weight_file(path).tensors
    for key, tensor in tensors.items():
        stream = found[key]
        assert found[key].offset is not None or container == "legacy" or not tensor.numel()
        assert [len(block) for block in stream.blocks() if len(block)] == sizes(tensor)
        if tensor.numel():
            assert torch.equal(joined(stream), tensor)
        assert io.digest_of(stream) == io.digest_of(tensor)


def test_views_and_transposes_of_a_pickle_are_seen_as_they_are(tmp_path):
    base = torch.arange(5.0 * io.BLOCK / 2).reshape(5, -1)
    tensors = {"t": base.T, "rows": base[1:3], "columns": base[:, 2:4], "all": base}
    torch.save(tensors, tmp_path / "x")
    found = io.open_weight_file(tmp_path / "x").tensors
    assert found["t"].offset is None
    assert found["columns"].offset is None
    assert found["rows"].offset is not None
    for key, tensor in tensors.items():
        assert torch.equal(joined(found[key]), tensor)


def test_a_file_that_shrinks_is_one_sentence(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "x")
    stored = io.open_weight_file(tmp_path / "x").tensors["x"]
    os.truncate(tmp_path / "x", 120)
    with pytest.raises(CheckpointError, match="truncated"):
        list(stored.blocks())


@given(
    st.sampled_from(["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"]),
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
    st.integers(0, 8),
)
def test_finite_means_what_torch_means(dtype, numbers, bad, place):
    if bad is not None:
        numbers[place % len(numbers)] = bad
    block = torch.tensor(numbers, dtype=torch.float64).to(getattr(torch, dtype))
    assert io.all_finite(block) == bool(torch.isfinite(block.double()).all())


def test_finite_takes_every_sign_and_the_largest_numbers():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        top = torch.finfo(dtype).max
        assert io.all_finite(torch.tensor([top, -top, 0.0, -0.0], dtype=dtype))
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            assert not io.all_finite(torch.tensor([-top, bad], dtype=dtype))
            assert not io.all_finite(torch.tensor([bad], dtype=dtype))


def test_a_cast_rounds_once_and_says_what_does_not_fit():
    tensor = values("float32", (50,))
    rounded = io.from_tensor(tensor).cast("bfloat16", what="'t'")
    assert rounded.dtype == "bfloat16"
    assert torch.equal(joined(rounded), tensor.bfloat16())
    numbers = io.from_tensor(torch.arange(3)).cast("float16", what="'t'")
    assert numbers.dtype == "int64"
    large = io.from_tensor(torch.tensor([1e6])).cast("float16", what="'t'")
    with pytest.raises(CheckpointError, match="outside the range of float16"):
        list(large.blocks())


def test_the_largest_difference_is_found_wherever_it_is():
    first = values("float32", (io.BLOCK + 40,))
    for place in (0, 6, io.BLOCK - 1, io.BLOCK, io.BLOCK + 39):
        second = first.clone()
        second[place] += 0.5
        pair = io.from_tensor(first), io.from_tensor(second)
        assert io.largest_difference(*pair) == pytest.approx(0.5, abs=1e-5)
    assert io.largest_difference(*2 * (io.from_tensor(first),)) == 0


def test_a_checkpoint_of_streams_is_that_of_their_tensors(tmp_path, small_tensors):
    small_tensors["large"] = values("float32", (io.BLOCK + 5,))
    one = io.write_checkpoint(tmp_path / "a", config={}, tensors=small_tensors, stage={})
    read = []
    streamed = io.watched(
        {k: io.from_tensor(t) for k, t in small_tensors.items()},
        lambda steps, note: read.append(note),
    )
    told = {}
    two = io.write_checkpoint(
        tmp_path / "b",
        config={},
        tensors=streamed,
        stage=lambda digests: told.update(digests) or {"stage": "x"},
    )
    assert one == two
    assert sorted(read) == sorted(small_tensors)
    assert told == {key: io.digest_of(t) for key, t in small_tensors.items()}
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert io.read_stage(tmp_path / "b")["stage"] == "x"


def test_nan_in_a_stream_leaves_nothing(tmp_path):
    bad = io.from_tensor(torch.tensor([1.0, math.nan]))
    with pytest.raises(CheckpointError, match="'bad' holds NaN"):
        io.write_checkpoint(tmp_path / "a", config={}, tensors={"bad": bad}, stage={})
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    large = io.LazyTensor((1 << 24,), "float32", lambda: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="No space left"):
        io.write_checkpoint(tmp_path / "a", config={}, tensors={"x": large}, stage={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensors(tmp_path):
    """256 MiB go through a process that grows by less than 80."""
    save_file({str(n): torch.full((1 << 24,), float(n)) for n in range(4)}, tmp_path / "x")
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from m2f2cli.checkpoints import io\n"
        "def peak():\n"
        "    return int(next(l for l in open('/proc/self/status') if 'VmHWM' in l).split()[1])\n"
        "place = Path(sys.argv[1])\n"
        "io.write_checkpoint(place / 'warm', config={}, stage={},\n"
        "                       tensors={'x': torch.ones(1)})\n"
        "before = peak()\n"
        "found = io.open_weight_file(place / 'x').tensors\n"
        "io.write_checkpoint(place / 'a', config={}, stage={},\n"
        "    tensors={k: t for k, t in found.items()})\n"
        "sys.exit((peak() - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode < 80
