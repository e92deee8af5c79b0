from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from m2f2cli.data.augment import augment, compress_h264, compress_jpeg, rescale
from m2f2cli.data.corruptions import CHAINS, CORRUPTIONS, SEVERITIES, find_corruptions
from m2f2cli.errors import ConfigError
from m2f2cli.options.training_pictures import AugmentOptions

ALL = pytest.mark.parametrize("name", CORRUPTIONS)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Colors with edges, texture and soft parts, away from the ends of the range."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(40, 150, (12, 9, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((90, 120), Image.Resampling.BICUBIC)).astype(float)
    smooth[30:60, 20:50] += 50
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 1, 220).astype(np.uint8)


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(float) - second).mean())


@ALL
def test_a_picture_is_corrupted_alike_each_time_and_more_with_severity(name, picture):
    before = picture.copy()
    results = [CORRUPTIONS[name].apply(picture, s, "sha") for s in SEVERITIES]
    again = [CORRUPTIONS[name].apply(picture, s, "sha") for s in SEVERITIES]
    assert (picture == before).all()
    for one, other in zip(results, again, strict=True):
        assert one.dtype == np.uint8
        assert one.shape == picture.shape
        assert (one == other).all()
    distances = [apart(result, picture) for result in results]
    assert distances[0] > 1
    assert distances == sorted(distances)


def test_noise_alone_depends_on_the_picture_s_seed(picture):
    for name, corruption in CORRUPTIONS.items():
        same = (corruption.apply(picture, 2, "a") == corruption.apply(picture, 2, "b")).all()
        assert same == (name != "noise")


def test_noise_of_two_severities_is_not_one_noise_scaled():
    gray = np.full((64, 64, 3), 128, np.uint8)
    first, second = (CORRUPTIONS["noise"].apply(gray, s, "a").astype(float) for s in (1, 2))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_noise_has_the_published_variance_in_luma_and_chroma(severity):
    gray = np.full((300, 300, 3), 128, np.uint8)
    noisy = CORRUPTIONS["noise"].apply(gray, severity, "a").astype(np.float64)
    sigma = 255 * CORRUPTIONS["noise"].value(severity) ** 0.5
    luma = noisy @ [0.299, 0.587, 0.114]
    red_difference = (noisy[..., 0] - luma) / 1.402
    blue_difference = (noisy[..., 2] - luma) / 1.772
    assert luma.std() == pytest.approx(sigma * 255 / 219, rel=0.03)
    assert red_difference.std() == pytest.approx(sigma * 255 / 224, rel=0.03)
    assert blue_difference.std() == pytest.approx(sigma * 255 / 224, rel=0.03)
    assert abs(np.corrcoef(luma.ravel(), blue_difference.ravel())[0, 1]) < 0.03


def bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resampling at pixel centers without smoothing, written down naively."""
    height, width = pixels.shape[:2]
    result = np.empty((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = pixels[top, left] * (1 - x + left) + pixels[top, right] * (x - left)
            lower = pixels[below, left] * (1 - x + left) + pixels[below, right] * (x - left)
            result[row, column] = upper * (1 - y + top) + lower * (y - top)
    return np.rint(result).astype(np.uint8)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_scaling_is_bilinear_down_and_up(severity, picture):
    factor = int(CORRUPTIONS["scaling"].value(severity))
    small = bilinear(picture.astype(float), (120 // factor, 90 // factor))
    wanted = bilinear(small.astype(float), (120, 90))
    found = CORRUPTIONS["scaling"].apply(picture, severity, "a")
    assert np.abs(found.astype(int) - wanted).max() <= 2  # Pillow cuts where this rounds


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_the_value_of_hsv(severity):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
    pixels[0, 0] = 0
    more = CORRUPTIONS["brightness"].value(severity)
    found = CORRUPTIONS["brightness"].apply(pixels, severity, "a")
    for row, column in np.ndindex(6, 7):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[row, column] / 255))
        wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1))
        assert np.abs(found[row, column] - 255 * np.array(wanted)).max() <= 0.51


def test_jpeg_contrast_and_saturation_are_what_they_say(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=10)
    assert (CORRUPTIONS["jpeg"].apply(picture, 4, "a") == np.asarray(Image.open(buffer))).all()
    darker = CORRUPTIONS["contrast"].apply(picture, 5, "a")
    assert np.abs(darker - 0.35 * picture.astype(float)).max() <= 0.51
    gray = CORRUPTIONS["saturation"].apply(picture, 5, "a").astype(int)
    assert np.ptp(gray, axis=2).max() <= 1


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2)])
def test_the_smallest_pictures_survive(name, shape):
    pixels = np.full((*shape, 3), 100, np.uint8)
    assert CORRUPTIONS[name].apply(pixels, 5, "a").shape == pixels.shape


def test_unknown_names_and_severities_are_refused():
    with pytest.raises(ConfigError, match="no corruption 'fog'") as caught:
        find_corruptions(["jpeg", "fog"])
    assert "jpeg" in str(caught.value.hint)
    for severity in (0, 6, -1):
        with pytest.raises(ConfigError, match="1 to 5"):
            CORRUPTIONS["jpeg"].value(severity)
        if severity != 1:
            with pytest.raises(ConfigError, match="messenger"):
                CHAINS["messenger"].value(severity)


def test_the_published_chains_and_that_they_are_found_by_name_or_together():
    published = ["jpeg-75", "half-size", "screenshot", "messenger", "h264-28"]
    assert list(find_corruptions(["chains"])) == published
    assert list(find_corruptions(["messenger", "jpeg"])) == ["messenger", "jpeg"]
    assert list(find_corruptions(["corruptions", "chains"])) == [*CORRUPTIONS, *published]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_depends_on_the_picture_alone(name, picture):
    before = picture.copy()
    first, again, other = (CHAINS[name].apply(picture, 1, seed) for seed in "aab")
    assert (picture == before).all()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, picture)
    drawn = name in ("screenshot", "messenger")
    assert np.array_equal(first, other) != drawn
    for shape in ((1, 1), (1, 40), (3, 2)):
        assert CHAINS[name].apply(np.full((*shape, 3), 100, np.uint8), 1, "a").dtype == np.uint8


def test_what_the_chains_do(picture):
    assert (CHAINS["jpeg-75"].apply(picture, 1, "a") == compress_jpeg(picture, 75)).all()
    assert (CHAINS["half-size"].apply(picture, 1, "a") == rescale(picture, 0.5)).all()
    assert (CHAINS["h264-28"].apply(picture, 1, "a") == compress_h264(picture, 28)).all()
    for name, low, high in (("screenshot", 0.6, 1.4), ("messenger", 0.49, 1.0)):
        factors = []
        for seed in range(40):
            height, width = CHAINS[name].apply(picture, 1, str(seed)).shape[:2]
            assert height / width == pytest.approx(120 / 90, rel=0.03)
            factors.append(height / 120)
        assert low - 0.01 <= min(factors) < max(factors) <= high + 0.01
        assert max(factors) - min(factors) > 0.7 * (high - low)


def test_training_pictures_are_sent_by_chance_and_keep_their_shape(picture):
    nothing = {"flip": 0.0, "blur": 0.0, "jpeg": 0.0}

    def changed(seed, **options):
        rng = np.random.default_rng(seed)
        return augment(picture, None, AugmentOptions(**nothing, **options), rng)[0]

    sent = [changed(seed, resend=1.0) for seed in range(12)]
    assert {result.shape for result in sent} == {picture.shape}
    assert all(not np.array_equal(result, picture) for result in sent)
    assert np.array_equal(sent[3], changed(3, resend=1.0))
    assert np.array_equal(changed(3), picture)
