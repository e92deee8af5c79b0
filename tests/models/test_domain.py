from __future__ import annotations

import pytest
import torch

from m2f2cli.models.detector import Detector, DetectorConfig
from m2f2cli.models.domain import DIRECTIONS, Domain

WIDTH = 40
PLANE = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(0)))[0]


def faces(count: int, seed: int) -> torch.Tensor:
    """Features that vary along three directions, with a little noise: (count, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randn(count, 3, generator=generator) @ PLANE.T
    return 5 + 2 * inside + 0.1 * torch.randn(count, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def domain() -> Domain:
    return Domain.fit(faces(200, 1))


def test_what_leaves_the_directions_of_training_lies_farther_out_than_what_does_not(domain):
    limit = domain(faces(100, 2)).max()
    far_along = 5 + 20 * PLANE.T
    beside = faces(100, 3) + torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(4))
    assert (domain(far_along) < limit).all()
    assert (domain(beside) > limit).all()


def test_the_distance_is_the_root_mean_square_of_what_the_directions_leave():
    domain = Domain(4, 1)
    domain.mean.copy_(torch.tensor([1.0, 0, 0, 0]))
    domain.scale.copy_(torch.tensor([1.0, 2, 1, 1]))
    domain.basis.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    assert domain(torch.tensor([[9.0, 1, 3, 0]])).tolist() == pytest.approx([(13 / 4) ** 0.5])


def test_the_directions_are_orthogonal_and_never_more_than_few(domain):
    assert torch.allclose(domain.basis @ domain.basis.T, torch.eye(len(domain.basis)), atol=1e-4)
    assert len(Domain.fit(faces(10, 5)).basis) == 1
    assert len(Domain.fit(torch.randn(600, 700)).basis) == DIRECTIONS


def test_a_detector_tells_the_distance_of_its_features(tmp_path):
    detector = Detector(DetectorConfig(image_size=32, backbone=None)).eval()
    pixels = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        assert detector(pixels).domain_distance is None
        detector.domain = Domain.fit(detector(pixels).features)
        detector.config.domain = {"limit": 1.0, "size": len(detector.domain.basis)}
        found = detector(pixels)
    assert torch.equal(found.domain_distance, detector.domain(found.features))
    detector.save_pretrained(tmp_path)
    with torch.no_grad():
        again = Detector.from_pretrained(tmp_path).eval()(pixels)
    assert torch.equal(again.domain_distance, found.domain_distance)


def test_the_check_of_textures_of_older_detectors_is_none_of_features():
    old = {"mean": [0.0] * 6, "basis": [[0.0] * 6] * 6, "limit": 2.0}
    detector = Detector(DetectorConfig(image_size=32, backbone=None, domain=old))
    assert detector.domain is None
    assert detector.config.domain == old
