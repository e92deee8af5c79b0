"""A file that threads fill piece by piece holds what they wrote, whatever the disk allows."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import time
from io import FileIO
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f2cli import files
from m2f2cli.checkpoints import io

# Pieces around a page of the system, and around a megabyte.
PAGE, LARGE = mmap.PAGESIZE, 1 << 20
EDGES = (0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5, LARGE - 1, LARGE, 2 * LARGE + 77)


def fill(path: Path, sizes: list[int], step: int = 300_001) -> bytes:
    """Write pieces of these sizes, side by side, each in steps; gives what the file must hold."""
    generator = torch.Generator().manual_seed(sum(sizes))
    data = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, generator=generator)
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    with files.ParallelFile(path, len(data)) as file:

        def write(end: int) -> None:
            begin = end - sizes[ends.index(end)]
            with file.part(begin) as part:
                for step_of in data[begin:end].split(step):
                    part.write(step_of.numpy())

        io.spread(write, ends)
    return data.numpy().tobytes()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 9000)), max_size=9),
    step=st.sampled_from([997, PAGE, 300_001, 3 * LARGE]),
)
def test_pieces_of_any_size_fill_the_file(tmp_path_factory, sizes, step):
    path = tmp_path_factory.mktemp("fill") / "x"
    expected = fill(path, sizes, step)
    assert path.read_bytes() == expected


class Refusing(FileIO):
    """Opens for direct writing, then refuses to."""

    def write(self, data):
        if fcntl.fcntl(self.fileno(), fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().write(data)


@pytest.mark.parametrize("refused", ["never offered", "on opening", "on writing"])
def test_a_file_system_without_direct_writes(tmp_path, monkeypatch, refused):
    whole = os.open

    def picky(path, flags, *rest):
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(path, flags, *rest)

    direct = os.O_DIRECT
    if refused == "never offered":
        monkeypatch.delattr(os, "O_DIRECT")
    elif refused == "on opening":
        monkeypatch.setattr(os, "open", picky)
    else:
        monkeypatch.setattr(files, "FileIO", Refusing)
    expected = fill(tmp_path / "x", [5, 3 * LARGE + 7, 2 * PAGE])
    assert (tmp_path / "x").read_bytes() == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_says_so(tmp_path, monkeypatch, code):
    class Failing(FileIO):
        def write(self, data):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "FileIO", Failing)
    with pytest.raises(OSError, match=os.strerror(code)):
        fill(tmp_path / "x", [3 * LARGE])


def test_work_is_spread_over_threads_that_use_one_core_each():
    before = torch.get_num_threads()
    meet = threading.Barrier(io.workers(), timeout=20)

    def job(number: int) -> tuple[int, int]:
        meet.wait()
        return number, torch.get_num_threads()

    numbers = range(io.workers())
    assert io.spread(job, numbers) == [(n, 1) for n in numbers]
    assert torch.get_num_threads() == before
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [before]


def test_the_first_failure_ends_the_rest():
    done = []

    def job(number: int) -> None:
        if number == 0:
            raise ValueError("zero")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ValueError, match="zero"):
        io.spread(job, range(500))
    assert len(done) < 100
