"""Which videos become which dataset of which file."""

from __future__ import annotations

import pytest

from m2f2cli.data.prepare.sources import list_videos
from m2f2cli.errors import InputError, UsageError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def places(*sources):
    return [(video.file, video.key) for video in list_videos(sources).videos]


def test_faceforensics_is_recognized(tmp_path):
    root = touch(
        tmp_path,
        "manipulated_sequences/Deepfakes/c40/videos/000_003.mp4",
        "manipulated_sequences/Deepfakes/masks/videos/000_003.mp4",
        "manipulated_sequences/NeuralTextures/c0/videos/003_000.mp4",
        "original_sequences/youtube/c40/videos/003.mp4",
        "original_sequences/youtube/c40/videos/000.mp4",
        "original_sequences/youtube/c23/images/000/0001.png",
        "original_sequences/youtube/c23/images/000/0000.png",
        ".hidden/original_sequences/youtube/c40/videos/000.mp4",
    )
    listing = list_videos([root])
    assert [(video.file, video.key) for video in listing.videos] == [
        ("FF++_original_c23.h5", "000"),
        ("FF++_original_c40.h5", "000"),
        ("FF++_original_c40.h5", "003"),
        ("FF++_Deepfakes_c40.h5", "000_003"),
        ("FF++_NeuralTextures_raw.h5", "003_000"),
    ]
    assert listing.passed_over == 1
    assert [path.name for path in listing.videos[0].paths] == ["0000.png", "0001.png"]
    assert [video.original for video in listing.videos] == [True, True, True, False, False]
    part = root / "manipulated_sequences/Deepfakes/c40"
    assert places(part) == [("FF++_Deepfakes_c40.h5", "000_003")]
    assert places(part / "videos/000_003.mp4", part) == [("FF++_Deepfakes_c40.h5", "000_003")]


def test_other_folders_become_one_file(tmp_path, monkeypatch):
    root = touch(tmp_path / "clips", "b.MP4", "deep/a.avi", "notes.txt", "still.png")
    assert places(root) == [
        ("clips.h5", "b.MP4"),
        ("clips.h5", "deep/a.avi"),
        ("clips.h5", "still.png"),
    ]
    assert places(root / "b.MP4") == [("b.h5", "b.MP4")]
    assert places(root / "b.MP4", root / "deep") == [
        ("faces.h5", "b.MP4"),
        ("faces.h5", "deep/a.avi"),
    ]
    monkeypatch.chdir(root)
    assert [video.file for video in list_videos([root.relative_to(root)]).videos] == [
        "clips.h5"
    ] * 3


def test_two_videos_under_one_key_are_refused(tmp_path):
    root = touch(
        tmp_path,
        "original_sequences/youtube/c40/videos/000.mp4",
        "original_sequences/youtube/c40/videos/000.avi",
    )
    with pytest.raises(InputError, match=r"000\.avi' and '.*000\.mp4' would both be the video"):
        list_videos([root])


def test_nothing_to_do_is_said(tmp_path):
    with pytest.raises(UsageError, match="nothing to prepare"):
        list_videos([])
    with pytest.raises(InputError, match="no file or folder"):
        list_videos([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no videos or pictures"):
        list_videos([tmp_path])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="named like neither"):
        list_videos([tmp_path / "notes.txt"])
