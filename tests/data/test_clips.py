"""HDF5 files of clips: one frame is read, faults are named, a failed write leaves nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields

import h5py
import numpy as np
import pytest

from m2f2cli.data import clips
from m2f2cli.data.clips import ClipNotes, ClipWriter, FrameReader
from m2f2cli.errors import CheckpointError, InputError


def clip(seed=0, frames=5):
    return np.random.default_rng(seed).integers(0, 256, (frames, 8, 6, 3), dtype=np.uint8)


def notes(**changes):
    values = {
        "source": "a/000.mp4",
        "source_sha256": "ab" * 32,
        "source_bytes": 12,
        "detector": "dlib",
        "margin": 0.3,
        "fps": 25.0,
        "asked": 10,
        "looked_at": 6,
        "interpolated": 1,
        "boxes_from": "",
        "picture": np.array([640, 480], np.int32),
        "frames": np.arange(5, dtype=np.int32) * 3,
        "boxes": np.arange(20, dtype=np.int32).reshape(5, 4),
    }
    return ClipNotes(**{**values, **changes})


@pytest.fixture
def file(tmp_path):
    writer = ClipWriter(tmp_path / "faces.h5")
    writer.write("003", clip(1), notes())
    writer.write("000", clip(0))
    writer.write("folder/clip.mp4", clip(2, frames=3))
    writer.finish()
    return writer.path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_written_is_read(file):
    with FrameReader() as reader:
        assert {key: s.frames for key, s in reader.shapes(file).items()} == {
            "000": 5,
            "003": 5,
            "folder/clip.mp4": 3,
        }
        assert np.array_equal([reader.frame(file, "003", n) for n in range(5)], clip(1))
        assert np.array_equal(reader.frame(file, "folder/clip.mp4", 2), clip(2, frames=3)[2])
        assert reader.notes(file, "000") is None
        found = reader.notes(file, "003")
        for item in fields(ClipNotes):
            assert np.array_equal(getattr(found, item.name), getattr(notes(), item.name))
    assert os.listdir(file.parent) == ["faces.h5"]
    with h5py.File(file) as plain:
        assert plain["003"].chunks == (1, 8, 6, 3)
        assert plain["003"].attrs["complete"]


def test_an_older_file_may_have_any_chunks_and_no_attributes(tmp_path):
    path = tmp_path / "FF++_original_c23.h5"
    with h5py.File(path, "w") as published:
        published.create_dataset("000", data=clip(), chunks=(4, 8, 6, 3), compression="gzip")
        published["001"] = clip(1)
    reader = FrameReader()
    assert np.array_equal(reader.frame(path, "000", 4), clip()[4])
    assert np.array_equal(reader.frame(path, "001", 0), clip(1)[0])
    assert reader.notes(path, "000") is None


def test_others_may_have_the_file_open(file):
    with h5py.File(file) as opened, FrameReader() as reader:
        assert np.array_equal(reader.frame(file, "000", 2), opened["000"][2])
        with h5py.File(file) as again:
            assert set(again) == {"000", "003", "folder"}


def test_a_reader_travels_closed(file):
    reader = FrameReader()
    reader.frame(file, "000", 0)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._files == {}
    assert np.array_equal(copy.frame(file, "000", 1), clip()[1])


def test_a_reader_serves_forked_workers(file):
    import torch

    class Frames(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return reader.frame(file, "000", index), os.getpid()

    reader = FrameReader()
    reader.frame(file, "000", 0)  # open in the parent, as after a look at the data
    loader = torch.utils.data.DataLoader(
        Frames(), batch_size=1, num_workers=2, multiprocessing_context="fork"
    )
    found = [(pixels[0].numpy(), int(pid)) for pixels, pid in loader]
    assert np.array_equal([pixels for pixels, _ in found], clip())
    assert os.getpid() not in {pid for _, pid in found}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "holds float32 values, not uint8"),
        (np.zeros((2, 4, 4), np.uint8), r"has the shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"has the shape \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "has no frames"),
    ],
)
def test_what_is_no_clip_is_named(tmp_path, data, words):
    path = tmp_path / "wrong.h5"
    with h5py.File(path, "w") as file:
        file["000"] = data
    reader = FrameReader()
    with pytest.raises(InputError, match=f"Video '000' in '.*wrong.h5' {words}"):
        reader.frame(path, "000", 0)
    with pytest.raises(InputError, match=words):
        reader.shapes(path)
    with pytest.raises(InputError, match=words):
        ClipWriter(path).write("000", data)


def test_missing_things_are_named(file, tmp_path):
    reader = FrameReader()
    for arguments, words in (
        ((tmp_path / "no.h5", "000", 0), "There is no file"),
        ((file, "999", 0), "has no video '999'"),
        ((file, "folder", 0), "has no video 'folder'"),
        ((file, "000", 5), "has no frame 5: it has 5"),
        ((file, "000", -1), "has no frame -1"),
        ((tmp_path, "000", 0), "is a folder"),
    ):
        with pytest.raises(InputError, match=words):
            reader.frame(*arguments)
    with h5py.File(tmp_path / "bare.h5", "w"):
        pass
    with pytest.raises(InputError, match="holds no videos"):
        reader.shapes(tmp_path / "bare.h5")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_broken_file_is_one_sentence(file, tmp_path, keep):
    data = file.read_bytes()
    path = tmp_path / "cut.h5"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"cut\.h5") as error:
        FrameReader().shapes(path)
    assert "prepare faces" in error.value.hint
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        FrameReader().frame(path, "000", 0)


def test_scrambled_bytes_are_an_error_or_pixels_never_a_crash(file, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "scrambled.h5"
    for seed in range(40):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 30):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            with FrameReader() as reader:
                for key in reader.shapes(path):
                    assert reader.frame(path, key, 0).dtype == np.uint8
                    reader.notes(path, key)
        except InputError:
            pass


def test_order_and_interruptions_do_not_show_in_the_file(file, tmp_path):
    other = ClipWriter(tmp_path / "again" / "faces.h5")
    other.write("folder/clip.mp4", clip(2, frames=3))
    other.finish()
    other.write("000", clip(9))
    other.write("000", clip(0))
    other.write("003", clip(1), notes())
    assert set(other.done()) == {"000", "003", "folder/clip.mp4"}
    ClipWriter(other.path).finish()
    assert digest(other.path) == digest(file)
    before = os.stat(other.path).st_mtime_ns
    other.finish()
    assert os.stat(other.path).st_mtime_ns == before


def test_a_full_disk_leaves_the_old_file_and_the_parts(file, tmp_path, monkeypatch):
    before = digest(file)
    writer = ClipWriter(file)
    writer.write("005", clip(5))

    class Full(clips.Sink):
        def write(self, data):
            if self.tell() > 1500:
                self.failure = OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(clips, "Sink", Full)
    for act in (writer.finish, lambda: writer.write("006", clip(6, frames=40))):
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            act()
        assert "Free some disk space" in error.value.hint
    assert digest(file) == before
    assert len(os.listdir(writer.parts)) == 1
    monkeypatch.undo()
    writer.finish()
    assert set(writer.done()) == {"000", "003", "005", "folder/clip.mp4"}


def test_a_real_refusal_to_write_does_not_bring_the_process_down(tmp_path):
    """HDF5 dies when a file cannot be closed for lack of space: here the limit is a file's size."""
    script = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from m2f2cli.data.clips import ClipWriter\n"
        "from m2f2cli.errors import CheckpointError\n"
        "for n in range(5):\n"
        "    try:\n"
        "        ClipWriter(Path(sys.argv[1])).write(str(n), np.ones((40, 50, 50, 3), np.uint8))\n"
        "    except CheckpointError as error:\n"
        "        print(error.message)\n"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "faces.h5")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large") == 5
    assert not list((tmp_path / ".faces.h5.parts").iterdir())


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        ClipWriter(tmp_path / "file" / "faces.h5").write("000", clip())


def test_a_broken_old_file_is_not_replaced(file):
    writer = ClipWriter(file)
    writer.write("005", clip(5))
    file.write_bytes(b"broken")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        writer.finish()
    assert file.read_bytes() == b"broken"
    assert len(os.listdir(writer.parts)) == 1
    writer.discard()
    assert os.listdir(file.parent) == []


def test_what_lies_in_other_files_is_not_opened(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"SECRET!!" * 100)
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = clip()
    layout = h5py.VirtualLayout(shape=(1, 8, 6, 3), dtype="u1")
    layout[0] = h5py.VirtualSource(str(other), "x", shape=(5, 8, 6, 3))[0]
    makers = {
        "external": lambda f: f.create_dataset(
            "external", (1, 8, 6, 3), "u1", external=[(str(secret), 0, 144)]
        ),
        "virtual": lambda f: f.create_virtual_dataset("virtual", layout),
        "link": lambda f: f.__setitem__("link", h5py.ExternalLink(str(other), "/x")),
        "in/a/link": lambda f: f.__setitem__("in/a", h5py.ExternalLink(str(other), "/")),
    }
    for key, make in makers.items():
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file["good"] = clip()
            make(file)
        with FrameReader() as reader:
            named = key.removesuffix("/link")
            with pytest.raises(InputError, match=f"Video '{named}' in '.*a.h5' (lies|is a link)"):
                reader.shapes(path)
            with pytest.raises(InputError, match=f"Video '{key}' in '.*a.h5' (lies|is a link)"):
                reader.frame(path, key, 0)
            assert np.array_equal(reader.frame(path, "good", 0), clip()[0])


def test_a_link_inside_the_file_is_no_video(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["000"] = clip()
        file["alias"] = h5py.SoftLink("/000")
        file["loop"] = h5py.SoftLink("/loop")
    with FrameReader() as reader:
        assert list(reader.shapes(path)) == ["000"]
        for key in ("alias", "loop"):
            with pytest.raises(InputError, match="is a link to another place"):
                reader.frame(path, key, 0)


@pytest.mark.parametrize(
    ("shape", "chunks", "words"),
    [
        ((2, 30000, 30000, 3), (1, 1000, 1000, 3), "frames of 30000x30000"),
        ((10**12, 8, 8, 3), (1, 8, 8, 3), "1,000,000,000,000 frames"),
        ((4096, 1024, 1024, 3), (1024, 1024, 1024, 3), "in pieces of 3,221,225,472 bytes"),
    ],
)
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path, shape, chunks, words):
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("000", shape, "u1", chunks=chunks, compression="gzip")
    assert path.stat().st_size < 10_000
    for read in (FrameReader().shapes, lambda path: FrameReader().frame(path, "000", 0)):
        with pytest.raises(InputError, match=words) as caught:
            read(path)
        assert caught.value.status == "too_large"


def test_groups_in_groups_are_read_up_to_a_limit(tmp_path):
    path = tmp_path / "deep.h5"
    with h5py.File(path, "w") as file:
        group = file
        for _ in range(3000):
            group = group.create_group("g")
        file["here"] = clip()
        file["loop"] = file["/"]
        file["g/self"] = file["g"]
    began = time.monotonic()
    with pytest.raises(InputError, match="more than 32 groups"):
        FrameReader().shapes(path)
    with h5py.File(path, "a") as file:
        del file["g/g"]
    assert list(FrameReader().shapes(path)) == ["here"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("name", "value"),
    [("source", 3), ("margin", "wide"), ("fps", np.inf), ("boxes", np.zeros((5, 3), int)),
     ("frames", np.zeros((5,), float)), ("picture", np.array([1, 2, 3])), ("asked", [1, 2])],
)  # fmt: skip
def test_notes_of_another_type_are_named(file, name, value):
    with h5py.File(file, "a") as opened:
        opened["003"].attrs[name] = value
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        FrameReader().notes(file, "003")


def test_a_locked_file_is_said_to_be_locked(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["000"] = np.zeros((2, 8, 8, 3), np.uint8)
    code = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(flush=True); input()"
    held = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert held.stdout
        held.stdout.readline()
        with pytest.raises(InputError, match="another program has it open") as refused:
            FrameReader().shapes(path)
        assert "HDF5_USE_FILE_LOCKING=FALSE" in refused.value.hint
    finally:
        held.communicate(b"\n")
    assert list(FrameReader().shapes(path)) == ["000"]
