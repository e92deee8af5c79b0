from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.faces import Crop
from m2f2cli.errors import UsageError
from m2f2cli.inference.pipeline import Score, detect
from m2f2cli.inference.render import Renderer, annotated, heat
from m2f2cli.inference.sources import expand
from m2f2cli.options.detect import DetectOptions
from tests.inference.conftest import MeanJudge, noise_picture, write_picture

GREY = Image.new("RGB", (200, 100), (128, 128, 128))


def hot_corner(corner: tuple[int, int]) -> dict[bytes, Score]:
    where = np.zeros((4, 4), dtype=np.float32)
    where[corner] = 1
    return {b"": Score(0.7, None, where)}


@pytest.mark.parametrize("corner", [(0, 0), (0, 3), (3, 0), (3, 3)])
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_the_brightest_spot_lies_where_the_map_is_highest(
    corner: tuple[int, int], shrink: float
) -> None:
    """The map's first axis is down, its second to the right, and it covers the crop alone."""
    x0, y0, side = 40, 10, 80
    picture = GREY.resize((round(200 * shrink), round(100 * shrink)))
    crop = Crop(np.zeros((1, 1, 3), np.uint8), b"", (x0, y0, x0 + side, y0 + side))
    drawn = np.asarray(heat(picture, [crop], hot_corner(corner), shrink)).astype(int)
    changed = np.abs(drawn - 128).sum(2) > 0
    rows, columns = np.nonzero(changed)
    assert (columns.min(), columns.max() + 1) == (x0 * shrink, (x0 + side) * shrink)
    assert (rows.min(), rows.max() + 1) == (y0 * shrink, (y0 + side) * shrink)
    row, column = np.unravel_index(drawn.sum(2).argmax(), drawn.shape[:2])
    cell = ((row / shrink - y0) // 20, (column / shrink - x0) // 20)
    assert cell == corner


def test_a_flat_map_and_a_crop_beyond_the_border_are_drawn() -> None:
    score = {b"": Score(0.7, None, np.full((4, 4), 0.3, np.float32))}
    crop = Crop(np.zeros((1, 1, 3), np.uint8), b"", (-50, -50, 60, 60))
    drawn = np.asarray(heat(GREY, [crop], score, 1.0))
    assert drawn.shape == (100, 200, 3)
    assert np.ptp(drawn[:60, :60].reshape(-1, 3), axis=0).max() == 0
    assert (drawn[61:, :] == 128).all()


def test_boxes_take_the_colour_of_the_verdict() -> None:
    drawn = np.asarray(annotated(GREY, [((20, 30, 90, 95), "fake", "fake 0.9")], 1.0))
    red, green, blue = drawn[94, 50].astype(int)
    assert red > green + 100
    assert red > blue + 100
    assert (drawn[60, 150] == 128).all()
    assert (np.asarray(GREY) == 128).all()


def test_a_box_outside_the_picture_is_left_out() -> None:
    drawn = annotated(GREY, [((300, 300, 400, 400), "fake", "fake 0.9")], 1.0)
    assert np.array_equal(np.asarray(drawn), np.asarray(GREY))


def test_a_large_picture_is_drawn_smaller(tmp_path: Path) -> None:
    path = noise_picture(tmp_path / "x.png", 0, (4096, 1024))
    options = DetectOptions(faces="none", annotate=tmp_path / "out")
    (record,) = detect([str(path)], model=MeanJudge(), options=options)
    with Image.open(str(record.annotated)) as drawn:
        assert drawn.size == (2048, 512)


def test_a_model_without_a_map_says_so(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "x.png", 9)
    options = DetectOptions(faces="none", heatmap=tmp_path / "out")
    with pytest.raises(UsageError, match="no forgery map"):
        list(detect([str(path)], model=MeanJudge(forgery_map=False), options=options))
    assert not (tmp_path / "out").exists()


def test_a_file_that_vanished_before_drawing_is_drawn_as_it_was_judged(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "x.png", 200)

    class Vanishing(MeanJudge):
        def __call__(self, pixel_values: object) -> object:
            path.unlink()
            return super().__call__(pixel_values)  # type: ignore[arg-type]

    options = DetectOptions(faces="none", annotate=tmp_path / "out")
    (record,) = detect([str(path)], model=Vanishing(), options=options)
    assert record.verdict == "fake"
    assert np.asarray(Image.open(str(record.annotated)))[60, 5].min() > 150


def test_drawings_of_two_pictures_of_one_name_stay_apart(tmp_path: Path) -> None:
    files = [write_picture(tmp_path / folder / "x.png", 30 * n) for n, folder in enumerate("abc")]
    drawn = []
    for file, threshold in zip(
        [*files, files[0], files[0]], (0.5, 0.5, 0.5, 0.5, 0.0), strict=True
    ):
        options = DetectOptions(
            faces="none", annotate=tmp_path / "out", heatmap=tmp_path / "out", threshold=threshold
        )
        (record,) = detect(file, model=MeanJudge(), options=options)
        assert str(record.sha256)[:12] in str(record.annotated)
        drawn.append((record.annotated, Path(str(record.annotated)).read_bytes()))
    names = [name for name, _ in drawn]
    assert names[0] == names[3]  # the very same drawing
    assert len(set(names)) == 4  # another threshold gives another one beside it
    assert all(Path(str(name)).read_bytes() == content for name, content in drawn)


def test_a_long_name_is_shortened(tmp_path: Path) -> None:
    photo = write_picture(tmp_path / ("ä" * 120 + ".png"), 30)
    (record,) = detect(
        [photo], model=MeanJudge(), options=DetectOptions(faces="none", annotate=tmp_path / "out")
    )
    assert Path(str(record.annotated)).is_file()


def test_drawings_are_never_judged(tmp_path: Path) -> None:
    """Neither those of this run nor of an earlier one; another picture of such a name is."""
    folder = tmp_path / "in"
    write_picture(folder / "x.png", 30)
    write_picture(folder / f"y.{'0' * 12}.heatmap.jpg", 60)
    options = DetectOptions(faces="none", annotate=folder, heatmap=folder / "maps")
    names = {Path(r.path).name for r in detect(folder, model=MeanJudge(), options=options)}
    again = expand(folder, recursive=True)
    assert {Path(source.path).name for source in again} == names
    assert names == {"x.png", f"y.{'0' * 12}.heatmap.jpg"}
    assert again.remark == "Left out: 4 drawings of m2f2."


def test_what_a_killed_run_left_half_drawn_is_removed(tmp_path: Path) -> None:
    """It has the name that a write of a process that is gone has."""
    out = tmp_path / "out" / "sub"
    out.mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = (
        "import os; from pathlib import Path; from m2f2cli import files\n"
        f"os.getpid, os.replace = lambda: {gone.pid}, lambda *_: os._exit(9)\n"
        f"files.atomic_write(Path({str(out / 'x.jpg')!r}), b'x')"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert [path.name.split(".")[1] for path in out.iterdir()] == ["x"]
    (out / f".x.jpg.{os.getpid()}-0123abcd.partial").write_bytes(b"of a living process")
    Renderer(DetectOptions(annotate=tmp_path / "out"))
    assert [path.read_bytes() for path in out.iterdir()] == [b"of a living process"]
