from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2f2cli.data.clips import ClipWriter
from m2f2cli.data.samples import (
    Sample,
    SampleSet,
    identity_groups,
    people_in,
    read_people,
    read_samples,
    split_by_identity,
)
from m2f2cli.errors import ConfigError, InputError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("token", "people"),
    [
        ("005", ("005",)),
        ("005_010", ("005", "010")),
        ("0_005_010", ("005", "010")),
        ("005_010_0042", ("005", "010")),
        ("005_frame_12", ("005",)),
        ("005_005", ("005",)),
        ("holiday_003", ("holiday",)),
        ("ada-lovelace", ("ada-lovelace",)),
        ("ada lovelace 3", ("ada lovelace",)),
        ("00001234", ("00001234",)),
        ("p07", ("p07",)),
    ],
)
def test_names_tell_who_is_in_a_picture(token, people):
    assert people_in(token) == people


def test_flat_folders(tmp_path):
    touch(tmp_path, "real/ada_1.png", "fake/ada_2.JPG", "fake/bob.webp", "fake/notes.txt", "x.png")
    found = read_samples(tmp_path)
    assert [(s.name, s.label, s.kind, s.identities) for s in found.samples] == [
        ("fake/ada_2.JPG", 1, "fake", ("ada",)),
        ("fake/bob.webp", 1, "fake", ("bob",)),
        ("real/ada_1.png", 0, "real", ("ada",)),
    ]
    assert found.counts() == {"fake": 2, "real": 1, "identities": 2}
    assert found.layout == "folder"


def test_sub_folders_of_fake_are_manipulations_and_deepest_ones_identities(tmp_path):
    touch(tmp_path / "a", "real/001.png", "fake/FaceSwap/001_002.png", "fake/Deepfakes/003.png")
    kinds = {s.name: (s.kind, s.identities) for s in read_samples(tmp_path / "a").samples}
    assert kinds["fake/FaceSwap/001_002.png"] == ("FaceSwap", ("001", "002"))
    assert kinds["real/001.png"] == ("real", ("001",))
    touch(
        tmp_path / "b", "real/ada/1.png", "real/ada/2.png", "fake/ada/1.png", "fake/Swap/bob/7.png"
    )
    kinds = {s.name: (s.kind, s.identities) for s in read_samples(tmp_path / "b").samples}
    assert kinds["real/ada/2.png"] == ("real", ("ada",))
    assert kinds["fake/ada/1.png"] == ("fake", ("ada",))
    assert kinds["fake/Swap/bob/7.png"] == ("Swap", ("bob",))


@pytest.mark.parametrize(
    ("real", "fake"), [("Real", "Fake"), ("0_real", "1_fake"), ("Celeb-real", "Celeb-synthesis")]
)
def test_classes_go_by_their_usual_names(tmp_path, real, fake):
    root = touch(tmp_path, f"{real}/ada.png", f"{fake}/Swap/bob.png", "YouTube-real/cy.png")
    found = read_samples(root)
    assert {s.name: (s.label, s.kind) for s in found.samples} == {
        f"{real}/ada.png": (0, "real"),
        f"{fake}/Swap/bob.png": (1, "Swap"),
        "YouTube-real/cy.png": (0, "real"),
    }


def test_videos_are_samples_beside_pictures(tmp_path):
    root = touch(tmp_path, "real/id0_0000.mp4", "real/ada.png", "fake/id0_id1_0000.MP4")
    found = read_samples(root)
    assert {s.name: s.is_video for s in found.samples} == {
        "fake/id0_id1_0000.MP4": True,
        "real/ada.png": False,
        "real/id0_0000.mp4": True,
    }
    assert [s.name for s in found.without_videos().samples] == ["real/ada.png"]


@pytest.mark.parametrize("several", [False, True])
def test_what_prepare_faces_makes_of_videos_is_read(tmp_path, several):
    """One file of a folder with both classes, or of the folders of the classes."""
    name = "faces.h5" if several else "mine.h5"
    writer = ClipWriter(tmp_path / name)
    for key in ("Real/ada.mp4", "fake/Swap/bob_3.mp4", "else/x.mp4"):
        writer.write(key, np.zeros((3, 8, 8, 3), np.uint8))
    writer.finish()
    found = read_samples(tmp_path)
    stem = name.removesuffix(".h5")
    assert [(s.name, s.clip, s.label, s.kind, s.identities, s.frames) for s in found.samples] == [
        (f"{stem}/Real/ada.mp4", "Real/ada.mp4", 0, "real", ("ada",), 3),
        (f"{stem}/fake/Swap/bob_3.mp4", "fake/Swap/bob_3.mp4", 1, "Swap", ("bob",), 3),
    ]


def test_a_strange_hdf5_file_beside_pictures_is_not_looked_at(tmp_path):
    root = touch(tmp_path, "real/1.png", "fake/2.png", "features.h5")
    assert len(read_samples(root)) == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "no folder 'real'"),
        (("real/1.png",), "no folder 'fake'"),
        (("real/1.png", "fake/readme.txt"), "no pictures in"),
    ],
)
def test_missing_or_empty_class_is_named(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        read_samples(f"folder:{touch(tmp_path, *names)}")


def test_missing_folder_and_unknown_layout(tmp_path):
    with pytest.raises(InputError, match="no data folder"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no data layout 'foldr'") as refused:
        read_samples(f"foldr:{tmp_path}")
    assert "'folder'" in refused.value.hint


def test_identities_from_a_csv_file(tmp_path):
    root = touch(tmp_path / "data", "real/1.png", "fake/2.png")
    people = tmp_path / "people.csv"
    people.write_text("real/1.png, Ada\n\nfake\\2.png,Ada,Bob\n")
    assert [s.identities for s in read_samples(root, people).samples] == [("Ada", "Bob"), ("Ada",)]
    people.write_text("real/1.png,Ada\n")
    with pytest.raises(InputError, match=r"does not say who is in 'fake/2\.png'"):
        read_samples(root, people)
    people.write_text("real/1.png\n")
    with pytest.raises(InputError, match=r"Line 1 .* names no identity"):
        read_people(people, ["real/1.png"])


def test_fingerprint_follows_names_sizes_and_identities(tmp_path):
    root = touch(tmp_path, "real/1.png", "fake/2.png")
    first = read_samples(root).fingerprint()
    assert first == read_samples(root).fingerprint()
    (root / "real" / "1.png").write_bytes(b"longer than before")
    assert read_samples(root).fingerprint() != first


def sample_set(pairs: list[tuple[int, int, int]]) -> SampleSet:
    samples = []
    for number, (label, a, b) in enumerate(pairs):
        people = (str(a),) if label == 0 else tuple(dict.fromkeys((str(a), str(b))))
        samples.append(Sample(Path(f"{number}"), str(number), label, "fake", people))
    return SampleSet(Path("root"), "folder", tuple(samples))


PAIRS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=60
)


@given(PAIRS)
def test_groups_partition_the_samples_and_share_nobody(pairs):
    whole = sample_set(pairs)
    groups = identity_groups(whole.samples)
    assert sorted(index for group in groups for index in group) == list(range(len(pairs)))
    people = [{p for i in group for p in whole.samples[i].identities} for group in groups]
    assert sum(len(one) for one in people) == len(set().union(*people))


@given(PAIRS, st.floats(0.1, 0.5), st.integers(0, 5))
def test_split_never_shares_an_identity_and_repeats(pairs, share, seed):
    whole = sample_set(pairs)
    try:
        train, held = split_by_identity(whole, share, seed)
    except InputError:  # cannot be cut: another test
        return
    assert not train.people() & held.people()
    assert len(train) + len(held) == len(whole)
    for part in (train, held):
        assert {s.label for s in part.samples} == {0, 1}
    again = split_by_identity(whole, share, seed)
    assert again == (train, held)


def test_split_meets_its_share():
    pairs = [(i % 2, i // 2, i // 2) for i in range(400)]
    train, held = split_by_identity(sample_set(pairs), 0.2, 0)
    assert len(held) == 80
    assert held.labels().sum() == 40
    assert split_by_identity(sample_set(pairs), 0.2, 1)[1] != held
    assert len(train) == 320


def test_one_chain_of_identities_cannot_be_split():
    chain = sample_set([(1, i, i + 1) for i in range(20)] + [(0, 3, 3)])
    with pytest.raises(InputError, match="1 groups of identities, the largest with 21 of 21"):
        split_by_identity(chain, 0.2, 0)
