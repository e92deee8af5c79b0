"""A record for tests that are about something else."""

from __future__ import annotations

from m2f2cli.records import Detection, FaceScore, Settings

SETTINGS = Settings(
    model="lite",
    model_fingerprint="sha256:00",
    dtype="float32",
    threshold=0.5,
    uncertain=(0.4, 0.6),
    temperature=1.5,
    faces_mode="auto",
    crop_detector="dlib",
    crop_margin=0.3,
    frames_asked=16,
)
FACE = FaceScore((1, 2, 33, 34), (-4, -3, 40, 41), 0.75, "fake", None, True, 0.9, 1.25)
EXAMPLE = Detection(
    path="photo.jpg",
    kind="image",
    status="ok",
    settings=SETTINGS,
    sha256="ab" * 32,
    width=640,
    height=480,
    verdict="fake",
    fake_probability=0.75,
    in_domain=True,
    domain_distance=0.9,
    crop=FACE.crop,
    crop_source="face",
    faces_found=1,
    faces=(FACE,),
)
