from __future__ import annotations

import shutil
import struct
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.errors import M2F2Error, UsageError
from m2f2cli.inference.pipeline import detect
from m2f2cli.options.detect import DetectOptions
from m2f2cli.records import Detection
from tests.conftest import TURNS
from tests.inference.conftest import FLAT_ONLY, MeanJudge, noise_picture, write_picture
from tests.inference.test_video import flat, write_video

EXAMPLES = Path(__file__).parents[2] / "examples"
NONE = DetectOptions(faces="none")


def judged(paths: list[Path], judge: MeanJudge, options: DetectOptions = NONE) -> list[Detection]:
    return list(detect([str(path) for path in paths], model=judge, options=options))


def test_scores_are_the_models_and_records_stand_in_the_order_given(
    tmp_path: Path, judge: MeanJudge
) -> None:
    levels = [200, 10, 255, 90, 130]
    paths = [write_picture(tmp_path / f"{i}.png", level) for i, level in enumerate(levels)]
    records = judged(paths, judge)
    assert [record.path for record in records] == [str(path) for path in paths]
    for record, level in zip(records, levels, strict=True):
        assert record.fake_probability == pytest.approx(level / 255, abs=1e-5)
        assert record.verdict == ("fake" if level >= 128 else "real")
        assert record.crop == (0, 0, 64, 64)
        assert record.crop_source == "picture"
        assert len(str(record.sha256)) == 64
        assert record.settings.model_fingerprint == "sha256:mean"


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.integers(1, 9), order=st.permutations(range(7)), copies=st.integers(0, 3))
def test_a_record_never_depends_on_its_batch_mates(
    tmp_path: Path, batch: int, order: list[int], copies: int
) -> None:
    paths = [tmp_path / f"{seed}.png" for seed in range(7)]
    for seed, path in enumerate(paths):
        if not path.exists():
            noise_picture(path, seed)
    alone = {str(path): judged([path], MeanJudge())[0] for path in paths}
    chosen = [paths[i] for i in order]
    for i in range(copies):
        shutil.copy(paths[i], tmp_path / f"copy-{i}.png")
        chosen.insert(i, tmp_path / f"copy-{i}.png")
    options = replace(NONE, batch_size=batch)
    for record in judged(chosen, MeanJudge(), options):
        original = Path(record.path).name.removeprefix("copy-")
        expected = alone[str(tmp_path / original)]
        assert replace(record, path=expected.path) == expected


def test_a_fake_picture_names_its_kind_where_one_leads(tmp_path: Path) -> None:
    colors = {"red": (255, 60, 255), "green": (60, 255, 255), "even": (200, 199, 255),
              "dark": (90, 10, 10)}  # fmt: skip
    paths = [write_picture(tmp_path / f"{name}.png", color) for name, color in colors.items()]
    told = {"kinds": ["swapped or edited", "generated"], "kind_margin": 1.0}
    records = judged(paths, MeanJudge(**told))
    named = ["swapped or edited", "generated", None, None]
    assert [record.forgery for record in records] == named
    assert [record.faces[0].forgery for record in records] == named
    for silent in ({}, {**told, "kind_margin": None}, {**told, "kinds": ["generated"]}):
        assert {record.forgery for record in judged(paths, MeanJudge(**silent))} == {None}


def test_crops_are_batched_across_items_and_equal_ones_judged_once(
    tmp_path: Path, judge: MeanJudge
) -> None:
    paths = [write_picture(tmp_path / f"{i}.png", 10 * (i % 5)) for i in range(20)]
    records = judged(paths, judge, replace(NONE, batch_size=4))
    assert sum(judge.batches) == 5
    assert max(judge.batches) == 4
    assert len(records) == 20
    assert len({record.fake_probability for record in records}) == 5


def test_the_model_runs_in_one_thread_and_decoding_in_others(
    tmp_path: Path, judge: MeanJudge
) -> None:
    judged([noise_picture(tmp_path / f"{i}.png", i) for i in range(8)], judge)
    assert judge.threads == {threading.get_ident()}
    assert not [t for t in threading.enumerate() if t.name.startswith("m2f2-decode")]


def test_a_bad_item_is_a_record_and_the_rest_goes_on(tmp_path: Path, judge: MeanJudge) -> None:
    good = write_picture(tmp_path / "good.png", 200)
    jpeg = write_picture(tmp_path / "whole.jpg", 200, size=256).read_bytes()
    bad = {
        "missing.jpg": (None, "missing"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"this is no picture\n" * 20, "not_an_image"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "text.mp4": (b"this is no video\n" * 20, "unreadable"),
    }
    paths = []
    for name, (content, _) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        paths += [tmp_path / name, good] if name == "missing.jpg" else [tmp_path / name]
    records = {Path(record.path).name: record for record in judged(paths, judge)}
    assert records.pop("good.png").verdict == "fake"
    for name, (_, status) in bad.items():
        record = records[name]
        assert record.status == status
        assert record.message
        assert record.verdict is None
        assert record.fake_probability is None
        assert record.faces == record.frames == ()


def test_a_photo_has_its_face_found_and_cropped(judge: MeanJudge) -> None:
    (record,) = judged([EXAMPLES / "astronaut.jpg"], judge, DetectOptions())
    assert record.status == "ok"
    assert record.crop_source == "face"
    assert record.faces_found == len(record.faces) == 1
    face = record.faces[0]
    x0, y0, x1, y1 = face.crop
    assert x1 - x0 == y1 - y0
    assert face.box is not None
    assert (x1 - x0) / (face.box[2] - face.box[0]) == pytest.approx(1.3, abs=0.05)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_turned_photo_is_judged_as_the_upright_one(
    tmp_path: Path, judge: MeanJudge, turn: int
) -> None:
    pixels = np.asarray(Image.open(EXAMPLES / "astronaut.jpg").convert("RGB"))
    for name, picture in (("upright", pixels), ("turned", np.rot90(pixels, turn))):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    upright, turned = judged(
        [tmp_path / "upright.png", tmp_path / "turned.png"], judge, DetectOptions()
    )
    assert upright.note is None
    assert f"turned by {90 * (4 - turn)} degrees" in str(turned.note)
    assert turned.fake_probability == pytest.approx(upright.fake_probability, abs=0.01)
    assert (turned.width, turned.height) == np.rot90(pixels, turn).shape[1::-1]
    left, top, right, bottom = turned.crop or (0, 0, 0, 0)
    assert right - left == bottom - top
    x, y = 227 - 256, 126 - 256  # of the face, from the center of the upright picture
    for _ in range(turn):
        x, y = y, -x
    assert left < x + 256 < right
    assert top < y + 256 < bottom


def side_by_side(path: Path) -> Path:
    """Two pictures with one face each, in one."""
    photos = [Image.open(EXAMPLES / name) for name in ("astronaut.jpg", "grace_hopper.jpg")]
    height = min(photo.height for photo in photos)
    photos = [photo.resize((photo.width * height // photo.height, height)) for photo in photos]
    both = Image.new("RGB", (sum(photo.width for photo in photos), height))
    both.paste(photos[0], (0, 0))
    both.paste(photos[1], (photos[0].width, 0))
    both.save(path)
    return path


def test_of_several_faces_the_most_suspicious_decides(tmp_path: Path, judge: MeanJudge) -> None:
    path = side_by_side(tmp_path / "both.png")
    (record,) = judged([path], judge, DetectOptions(faces="all"))
    assert record.faces_found == len(record.faces) == 2
    scores = [face.fake_probability for face in record.faces]
    assert record.fake_probability == max(scores) == scores[0]
    assert record.crop == record.faces[0].crop
    (largest,) = judged([path], judge, DetectOptions(faces="largest"))
    assert largest.faces_found == 2
    assert len(largest.faces) == 1
    boxes = [face.box for face in record.faces if face.box]
    assert largest.faces[0].box == max(boxes, key=lambda box: box[2] - box[0])


@pytest.mark.parametrize(
    ("size", "mode", "status"),
    [
        ((400, 400), "auto", "ok"),
        ((401, 401), "auto", "no_face"),
        ((300, 200), "auto", "no_face"),
        ((400, 400), "all", "no_face"),
        ((400, 400), "largest", "no_face"),
        ((900, 300), "none", "ok"),
    ],
)
def test_a_picture_without_a_face(
    tmp_path: Path, judge: MeanJudge, size: tuple[int, int], mode: str, status: str
) -> None:
    path = noise_picture(tmp_path / "x.png", 3, size)
    (record,) = judged([path], judge, DetectOptions(faces=mode))
    assert record.status == status
    assert (record.verdict is None) == (status == "no_face")
    assert (record.width, record.height) == size
    if status == "ok":
        assert record.crop_source == "picture"
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        assert record.crop == (left, top, left + side, top + side)
    else:
        assert "No face" in str(record.message)


def test_all_eight_orientations_of_a_picture_score_the_same(
    tmp_path: Path, judge: MeanJudge
) -> None:
    upright = Image.open(EXAMPLES / "astronaut.jpg").convert("RGB")
    paths = []
    for orientation, turn in {1: None, **TURNS}.items():
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths.append(tmp_path / f"{orientation}.png")
        stored.save(paths[-1], exif=exif)
    records = judged(paths, judge, DetectOptions())
    assert len({record.sha256 for record in records}) == 8
    assert len({(r.fake_probability, r.crop, r.width, r.height) for r in records}) == 1


def test_outside_the_domain_the_verdict_is_uncertain(tmp_path: Path) -> None:
    rough = noise_picture(tmp_path / "rough.png", 7)
    flat = write_picture(tmp_path / "flat.png", 20)
    far, near = judged([rough, flat], MeanJudge(domain=FLAT_ONLY, threshold=0.0))
    assert (far.verdict, far.in_domain) == ("uncertain", False)
    assert far.domain_distance is not None
    assert far.domain_distance > FLAT_ONLY["limit"]
    assert far.fake_probability is not None
    assert "trained on" in str(far.reason)
    assert (near.verdict, near.in_domain, near.reason) == ("fake", True, None)
    assert near.domain_distance == pytest.approx(0, abs=1e-3)


def test_the_checkpoint_decides_until_the_user_does(tmp_path: Path) -> None:
    judge = MeanJudge(threshold=0.9, uncertain=[0.7, 0.85])
    path = [write_picture(tmp_path / "x.png", 204)]
    (record,) = judged(path, judge)
    assert (record.verdict, record.settings.threshold) == ("uncertain", 0.9)
    assert record.settings.uncertain == (0.7, 0.85)
    (record,) = judged(path, judge, replace(NONE, uncertain=None))
    assert record.verdict == "real"
    (record,) = judged(path, judge, replace(NONE, uncertain=None, threshold=0.8))
    assert record.verdict == "fake"


def test_temperature_softens_the_score(tmp_path: Path) -> None:
    path = [write_picture(tmp_path / "x.png", 230)]
    hot, cold = (
        judged(path, MeanJudge(score_temperature=t))[0].fake_probability for t in (4.0, 1.0)
    )
    assert hot is not None
    assert cold is not None
    assert 0.5 < hot < cold


def test_a_model_that_answers_nan_is_an_error(tmp_path: Path) -> None:
    judge = MeanJudge(image_mean=[float("nan")] * 3)
    with pytest.raises(M2F2Error, match="not a number"):
        judged([write_picture(tmp_path / "x.png", 230)], judge)


def test_a_model_of_another_face_finder_wants_ready_crops(tmp_path: Path) -> None:
    judge = MeanJudge(crop={"detector": "retina", "margin": 0.1})
    path = [write_picture(tmp_path / "x.png", 230)]
    with pytest.raises(UsageError, match="retina"):
        judged(path, judge, DetectOptions())
    assert judged(path, judge)[0].settings.crop_margin is None


def test_leaving_early_stops_the_work(tmp_path: Path, judge: MeanJudge) -> None:
    paths = [str(noise_picture(tmp_path / f"{i}.png", i)) for i in range(60)]
    records = detect(paths, model=judge, options=replace(NONE, batch_size=2))
    next(records)
    records.close()  # type: ignore[attr-defined]
    assert sum(judge.batches) <= 4


def test_pixels_reach_the_model_as_the_preprocessing_says(tmp_path: Path) -> None:
    seen = []

    class Spy(MeanJudge):
        def __call__(self, pixel_values: object) -> object:
            seen.append(pixel_values)
            return super().__call__(pixel_values)  # type: ignore[arg-type]

    from m2f2cli.data.transforms import preprocess

    path = noise_picture(tmp_path / "x.png", 1, (50, 70))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    judged([path], Spy(image_mean=mean, image_std=std))
    expected = preprocess(np.asarray(Image.open(path)), size=32, mean=mean, std=std)
    assert np.array_equal(seen[0][0].numpy(), expected)


def test_items_without_new_crops_do_not_wait_for_a_batch_to_fill(
    tmp_path: Path, judge: MeanJudge
) -> None:
    paths = [str(write_picture(tmp_path / "first.png", 200))]
    paths += [str(tmp_path / f"missing-{i}.png") for i in range(40)]
    records = detect(paths, model=judge, options=replace(NONE, batch_size=4))
    assert next(records).verdict == "fake"
    assert judge.batches == [1]
    assert len(list(records)) == 40


def test_texts_in_a_video_that_are_no_utf8_do_not_matter(tmp_path: Path, judge: MeanJudge) -> None:
    """A title in Latin-1, as many old cameras and programs write it."""
    data = bytearray(write_video(tmp_path / "a.avi", [flat(200)] * 9).read_bytes())
    tag = b"INAM" + struct.pack("<I", 5) + b"Caf\xe9\0" + b"\0"
    info = b"LIST" + struct.pack("<I", 4 + len(tag)) + b"INFO" + tag
    place = data.find(b"movi") - 8
    data[place:place] = info
    struct.pack_into("<I", data, 4, len(data) - 8)
    (tmp_path / "a.avi").write_bytes(data)
    titled, good = judged([tmp_path / "a.avi", write_picture(tmp_path / "b.png", 200)], judge)
    assert (titled.status, good.status) == ("ok", "ok")
