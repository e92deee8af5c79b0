from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.data.conversations import (
    Conversation,
    Pictures,
    find_missing,
    parse_as_published,
    parse_verdict,
    plain,
    read_conversations,
    split_conversations,
    stated_label,
)
from m2f2cli.errors import InputError

PARTS = (
    {"from": "human", "value": "<image>\n<deepfake>\nIs it real?"},
    {"from": "gpt", "value": "The image looks fake."},
)


def talk(image: str, said: str = "The image looks fake.", number: int = 0) -> Conversation:
    return Conversation(number, image, None, ({**PARTS[0]}, {"from": "gpt", "value": said}))


def write(folder, value):
    file = folder / "talks.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def row(*parts, **more):
    return {"id": "1", "image": "a.jpg", "conversations": list(parts), **more}


def test_what_a_file_says(tmp_path):
    second = row({"from": "gpt", "value": "Hello!"}, *PARTS, image=None)
    first, greeted = read_conversations(write(tmp_path, [row(*PARTS, sha256="ab"), second]))
    assert first == Conversation(0, "a.jpg", "ab", PARTS)
    assert greeted == Conversation(1, "", None, PARTS)
    assert first.answers == ["The image looks fake."]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ('[{"id": ', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no list of conversations"),
        ({}, "no list of conversations"),
        ([1], r"Conversation 0 .* no list 'conversations'"),
        ([row(*PARTS), {"id": "1"}], r"Conversation 1 .* no list 'conversations'"),
        ([row(*PARTS, image=["a", "b"])], "names no single picture"),
        ([row({"from": "system", "value": "x"}, *PARTS)], "unknown role 'system'"),
        ([row({**PARTS[0], "from": "user"}, PARTS[1])], "unknown role 'user'"),
        ([row({"value": "x"}, PARTS[1])], "unknown role None"),
        ([row()], "does not alternate"),
        ([row(PARTS[0])], "does not alternate"),
        ([row(PARTS[0], *PARTS)], "does not alternate"),
        ([row(PARTS[0], {"from": "gpt", "value": 3})], "a turn without a text"),
        ([row(PARTS[0], {"from": "gpt", "value": " \n"})], "an empty answer"),
        ([row(PARTS[0], {"from": "gpt", "value": "See <image>."})], "in an answer"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read_conversations(write(tmp_path, content))


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="There is no conversation file") as refused:
        read_conversations(tmp_path / "none.json")
    assert "m2f2 prepare ddvqa" in refused.value.hint


@pytest.mark.parametrize(
    ("image", "people"),
    [
        ("0_005_010.jpg", ("005", "010")),
        ("c40/5_012.jpg", ("012",)),
        ("ada_03.png", ("ada",)),
        ("FF++_Deepfakes_c40://000_003_17", ("000", "003")),
        ("FF++_original_c40://000_17", ("000",)),
    ],
)
def test_who_is_in_a_picture(image, people):
    assert talk(image).identities == people


@pytest.mark.parametrize(
    ("said", "label"),
    [("It is fake.", 1), ("It looks real.", 0), ("The skin is smooth.", None)],
)
def test_the_verdict_of_a_conversation(said, label):
    assert talk("a.jpg", said).label == label


def test_pictures_of_files_and_frames(tmp_path):
    clip = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "FF++_Deepfakes_c40.h5", "w") as file:
        file.create_dataset("000_003", data=clip)
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    pictures = Pictures(tmp_path)
    assert np.array_equal(pictures.pixels(talk("a.png")), clip[0])
    for name in ("FF++_Deepfakes_c40", "FF++_Deepfakes_c40.h5"):
        assert np.array_equal(pictures.pixels(talk(f"{name}://000_003_2")), clip[2])
    bad = [
        "b.png",
        "FF++_Deepfakes_c40://000_003_3",
        "FF++_Deepfakes_c40://000_004_0",
        "FF++_Deepfakes_c40://000_003_x",
        "FF++_Other_c40://000_003_0",
    ]
    faults = find_missing([talk("a.png"), *map(talk, bad)], pictures)
    assert list(faults) == bad
    other = Conversation(0, "a.png", "00", PARTS)
    with pytest.raises(InputError, match="another picture than conversation 0 was made from"):
        pictures.pixels(other)


def test_a_cut_parts_nobody():
    pairs = [(a, a + 50) for a in range(40)]
    talks = [talk(f"5_{a:03d}.jpg", "It is real.", number=2 * a) for a, _ in pairs]
    talks += [talk(f"0_{a:03d}_{b:03d}.jpg", number=2 * a + 1) for a, b in pairs]
    kept, held = split_conversations(talks, 0.25, seed=3)
    assert sorted(c.number for c in kept + held) == sorted(c.number for c in talks)
    assert not {p for c in kept for p in c.identities} & {p for c in held for p in c.identities}
    assert [sum(c.label == label for c in held) for label in (0, 1)] == [10, 10]
    assert split_conversations(talks, 0.25, seed=3) == (kept, held)
    assert split_conversations(talks, 0.25, seed=4) != (kept, held)
    assert split_conversations(talks, 0.0, seed=3) == (talks, [])
    with pytest.raises(InputError, match="cannot be cut between identities: 1 groups"):
        split_conversations(talks[:1] * 4, 0.25, seed=3)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("<s> The image is real.</s>", "real"),
        ("<s> The image is fake.</s>", "fake"),
        ("Real", "real"),
        ("FAKE", "fake"),
        ("This is an authentic photo.", "real"),
        ("The photo seems genuine", "real"),
        ("It was manipulated.", "fake"),
        ("This is COMPUTER-GENERATED.", "fake"),
        ("computer generated", "fake"),
        ("an AI-generated face", "fake"),
        ("It was generated by an AI.", "fake"),
        # negations
        ("It is not real.", "fake"),
        ("It isn't a real photo.", "fake"),
        ("This isn’t real.", "fake"),
        ("It does not look like a real person.", "fake"),
        ("That cannot be real", "fake"),
        ("The image is not fake.", "real"),
        ("It does not appear to be manipulated.", "real"),
        # both: the first claim stands
        ("The image is fake, it is not real.", "fake"),
        ("The image is real. Only the teeth look fake.", "real"),
        # a choice is no claim
        ("Is the image real or fake? It is fake.", "fake"),
        ("Real/fake: real", "real"),
        ("I cannot tell whether it is real or fake.", None),
        ("It is neither real nor fake.", None),
        # letters are no words
        ("The shadows are unrealistic.", None),
        ("It looks realistic.", None),
        ("Really sharp teeth.", None),
        ("a real-looking nose", None),
        ("an unreal sky", None),
        ("", None),
        ("<s></s>", None),
        ("I cannot tell.", None),
    ],
)
def test_parse(text, verdict):
    assert parse_verdict(text) == verdict


@given(st.text(max_size=200))
def test_any_text_gives_a_verdict_or_none(text):
    assert parse_verdict(text) in ("real", "fake", None)
    assert parse_as_published(text) in ("real", "fake", None)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("unrealistic, it is fake", "real"),
        ("not real", "real"),
        ("Computer-Generated", "fake"),
        ("computer generated", None),
        ("manipulated", None),
        ("", None),
    ],
)
def test_the_published_rule(text, verdict):
    assert parse_as_published(text) == verdict


def test_plain_removes_marks_and_outer_blanks():
    assert plain("<s> The nose.</s>\n") == "The nose."


@pytest.mark.parametrize(
    ("question", "label"),
    [
        ("This image is fake. Describe it.", 1),
        ("The nose in the image is real, tell me why.", 0),
        ("The eyes in the image are fake. Do not say 'The eyes are fake because'.", 1),
        ("Is the image real or fake?", None),
        ("Describe the nose.", None),
        ("The eyes are real, the nose is fake.", None),
    ],
)
def test_a_question_may_state_the_label(question, label):
    assert stated_label(question) == label


def test_pictures_outside_of_the_folder_are_not_read(tmp_path):
    root, outside = tmp_path / "in", tmp_path / "out.png"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(outside)
    with h5py.File(tmp_path / "out.h5", "w") as file:
        file["000"] = np.zeros((1, 8, 8, 3), np.uint8)
    (root / "link.png").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "loop.png").symlink_to("loop.png")
    (tmp_path / "named").symlink_to(root)
    Image.new("RGB", (8, 8)).save(root / "a.png")
    bad = ["../out.png", str(outside), "link.png", "up/out.png", "../out://000_0", "loop.png",
           f"{tmp_path}/out.h5://000_0", "a\0.png", "out://000_" + "9" * 5000]  # fmt: skip
    for folder in (root, tmp_path / "named"):
        faults = find_missing(list(map(talk, bad)), Pictures(folder))
        assert list(faults) == bad
        assert all("leads out of the folder" in faults[name] for name in bad[:-1])
        assert Pictures(folder).pixels(talk("a.png")).shape == (8, 8, 3)


def test_formats_of_others_are_named(tmp_path):
    good = {"image": "a", "conversations": [{"from": "human", "value": "?"},
                                            {"from": "gpt", "value": "real"}]}  # fmt: skip
    file = tmp_path / "x.json"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good) + "\n\n", encoding="utf-8-sig")
    with pytest.raises(InputError, match="is JSON Lines") as refused:
        read_conversations(file)
    assert "jq -s" in refused.value.hint
    chat = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    file.write_text(json.dumps(chat))
    with pytest.raises(InputError, match="has 'messages' of a chat") as refused:
        read_conversations(file)
    assert '"from": "human"' in refused.value.hint
    file.write_text(json.dumps([good]) + "\n\n", encoding="utf-8-sig")
    assert len(read_conversations(file)) == 1
