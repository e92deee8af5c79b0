from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m2f2cli.errors import InputError, UsageError
from m2f2cli.inference.sources import expand
from tests.inference.conftest import noise_picture


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.png",
        "a.JPG",
        "clip.MP4",
        "notes.txt",
        ".hidden.jpg",
        "sub/c.webp",
        "sub/a.jpg",
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*paths: str, recursive: bool = False) -> list[str]:
    return [source.path for source in expand(paths, recursive=recursive)]


def test_a_folder_gives_its_pictures_and_videos_in_order(tree: Path) -> None:
    sources = expand(["in"])
    assert [source.path for source in sources] == ["in/a.JPG", "in/b.png", "in/clip.MP4"]
    assert [source.kind for source in sources] == ["image", "image", "video"]


def test_recursive_enters_folders_but_not_through_links(tree: Path) -> None:
    os.symlink(tree / "in", tree / "in" / "sub" / "loop")
    assert listed("in", recursive=True) == [
        "in/a.JPG",
        "in/b.png",
        "in/clip.MP4",
        "in/sub/a.jpg",
        "in/sub/c.webp",
    ]


def test_a_glob_a_list_and_standard_input(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listed("in/**/*.jpg") == ["in/sub/a.jpg"]
    (tree / "list.txt").write_bytes("\ufeffin/b.png\r\n\r\nin/sub\n  spaced.jpg\n".encode())
    expected = ["in/b.png", "in/sub/a.jpg", "in/sub/c.webp", "  spaced.jpg"]
    assert listed("@list.txt") == expected
    content = io.BytesIO((tree / "list.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=content))
    assert listed("-") == expected


def test_each_file_is_listed_once_however_it_is_spelled(tree: Path) -> None:
    absolute = str(tree / "in" / "b.png")
    assert listed("in/b.png", "./in/b.png", absolute, "in") == [
        "in/b.png",
        "in/a.JPG",
        "in/clip.MP4",
    ]


def test_a_missing_file_is_an_item(tree: Path) -> None:
    assert listed("nowhere.jpg", "in/b.png") == ["nowhere.jpg", "in/b.png"]


def test_a_name_with_brackets_that_exists_is_no_glob(tree: Path) -> None:
    (tree / "a[1].jpg").write_bytes(b"x")
    assert listed("a[1].jpg") == ["a[1].jpg"]


def test_a_name_that_is_no_text_survives(tree: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.jpg")
    (tree / name).write_bytes(b"x")
    (tree / "list").write_bytes(b"\xff\xfe.jpg\n")
    assert listed("@list") == [name]


def test_a_folder_without_any_is_one_sentence(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(InputError, match="'empty' holds no picture or video") as caught:
        expand(["in", "empty"])
    assert ".jpg" in str(caught.value.hint)
    (tree / "in2" / "deep").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        expand(["in2"])
    assert "--recursive" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("paths", "error", "words"),
    [
        ([], UsageError, "nothing to judge"),
        (["@nowhere"], UsageError, "list file 'nowhere'"),
        (["*.nope"], InputError, "Nothing matches"),
    ],
)
def test_nothing_to_judge(paths: list[str], error: type[Exception], words: str, tree: Path) -> None:
    with pytest.raises(error, match=words):
        expand(paths)


def test_output_names_mirror_folders_and_never_collide(tree: Path) -> None:
    names = [str(source.name) for source in expand(["in"], recursive=True)]
    assert names == ["a.JPG", "b.png", "clip.MP4", "sub/a.jpg", "sub/c.webp"]
    for folder in ("x/in", "y/in"):
        (tree / folder).mkdir(parents=True)
        (tree / folder / "A.jpg").write_bytes(b"x")
    names = [str(s.name) for s in expand(["in", "x/in", "y/in", "in/sub/a.jpg", "x/in/A.jpg"])]
    assert len({name.casefold() for name in names}) == len(names)
    assert "in/a.JPG" in names
    assert "in/A-2.jpg" in names


def test_a_folder_that_may_not_be_listed_becomes_an_item(tree: Path) -> None:
    os.chmod(tree / "in" / "sub", 0)
    user = os.geteuid()
    if user == 0:
        os.chmod(tree, 0o755)
        for parent in tree.parents[:2]:
            os.chmod(parent, 0o755)
        os.seteuid(65534)
    try:
        found = listed("in", recursive=True)
    finally:
        os.seteuid(user)
        os.chmod(tree / "in" / "sub", 0o755)
    assert found[-1] == "in/sub"


def test_one_bad_entry_does_not_end_the_run(tree: Path) -> None:
    os.symlink("self.jpg", tree / "in" / "self.jpg")
    found = listed("in", "in/photo[1].jpg", "https://a.org/b.jpg", "a\0/[b].jpg", "x" * 5000)
    assert found[:4] == ["in/a.JPG", "in/b.png", "in/clip.MP4", "in/self.jpg"]
    assert found[4:] == ["in/photo[1].jpg", "https://a.org/b.jpg", "a\0/[b].jpg", "x" * 5000]


def test_a_path_is_recorded_as_it_was_given(tree: Path) -> None:
    assert listed("./in/b.png", "in//a.JPG") == ["./in/b.png", "in//a.JPG"]


def test_what_looks_like_a_picture_or_video_in_a_folder_is_an_item(tree: Path) -> None:
    folder = tree / "phone"
    folder.mkdir()
    for name, head in {
        "a.gif": b"", "b.avif": b"", "c.HEIC": b"", "d.apng": b"",
        "photo": b"\xff\xd8\xff\xe0", "image.dat": b"\x89PNG\r\n\x1a\n", "anim.bin": b"GIF89a",
        "w": b"RIFF\0\0\0\0WEBP", "h.tmp": b"\0\0\0\x18ftypheic", "v.tmp": b"\0\0\0\x18ftypisom",
        "mkv": b"\x1aE\xdf\xa3", "song.m4a": b"\0\0\0\x18ftypM4A ", "letter.txt": b"BM, dear",
        "x.svg": b"<svg", "y.svg": b"<svg", "noname": b"",
    }.items():  # fmt: skip
        (folder / name).write_bytes(head + bytes(40))
    sources = expand(folder)
    assert {Path(source.path).name: source.kind for source in sources} == {
        **dict.fromkeys(("a.gif", "b.avif", "c.HEIC", "d.apng", "photo", "image.dat"), "image"),
        **dict.fromkeys(("anim.bin", "w", "h.tmp"), "image"),
        **dict.fromkeys(("v.tmp", "mkv"), "video"),
    }
    assert sources.remark == (
        "Left out: 5 files of other kinds in the folders (.m4a, .svg, .txt, without suffix)."
    )
    assert expand("in").remark == "Left out: 1 file of other kinds in the folders (.txt)."
    assert expand("in/a.JPG").remark is None


def test_names_pictures_and_arrays_are_items(tree: Path) -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    sources = expand([Path("in/b.png"), pixels, Image.fromarray(pixels)])
    assert [source.path for source in sources] == ["picture 2", "picture 3", "in/b.png"]
    assert [source.picture().size for source in sources[:2]] == [(5, 4)] * 2
    for single in ("in/b.png", Path("in/b.png")):
        assert [source.path for source in expand(single)] == ["in/b.png"]
    assert len(expand(pixels)) == 1
    for wrong in ([3], [None], [b"in/b.png"]):
        with pytest.raises(UsageError, match="cannot be judged"):
            expand(wrong)


@pytest.mark.parametrize(
    "content", ["a.png\r\nb.png\r\n".encode("utf-16"), b"a.png\0b.png\0", b"\x89PNG\r\n\0\0"]
)
def test_a_list_that_is_no_text_is_one_error(tmp_path, monkeypatch, content):
    (tmp_path / "list.txt").write_bytes(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    for item in (f"@{tmp_path / 'list.txt'}", "-"):
        with pytest.raises(UsageError, match="NUL bytes") as refused:
            expand([item])
        assert "UTF-8" in refused.value.hint


def test_items_of_a_folder_are_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise_picture(tmp_path / "in" / "a.png", 1)
    for given in ("in", "./in/", "in/../in"):
        assert [source.path for source in expand([given])] == [f"{given.rstrip('/')}/a.png"]
    assert [source.path for source in expand(["./in//a.png"])] == ["./in//a.png"]
