"""A loaded model says of one item what the commands say of it, and explains what it has judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.inference.explain import explain_sources, load_pipeline
from m2f2cli.inference.pipeline import Judged, View, judge_sources
from m2f2cli.inference.sources import expand
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import ExplainOptions
from tests.inference.conftest import MeanJudge, write_picture
from tests.inference.explainers import asking, crops, tiny
from tests.inference.test_video import flat, write_video
from tests.models.explainers import write_explainer


def whole(**changes) -> ExplainOptions:
    return ExplainOptions(detect=DetectOptions(faces="none", frames=4), **changes)


def test_a_detector_judges_as_detect_does(tmp_path):
    sources = expand([str(write_picture(tmp_path / "a.png", 200)), str(tmp_path / "none.png")])
    judge = MeanJudge()
    pipeline = load_pipeline(judge, options=whole())
    mine = [pipeline.judge_one(source) for source in sources]
    theirs = list(judge_sources(sources, model=judge, options=whole().detect))
    assert [item.record for item in mine] == theirs
    assert mine[0].scores[mine[0].crop(theirs[0].crop).digest].forgery_map.shape == (4, 4)
    assert not pipeline.explains
    with pytest.raises(UsageError, match="without words"):
        pipeline.explain(mine[0])


def test_an_explainer_judges_and_explains_as_explain_does(tmp_path):
    loaded = tiny()
    source = expand(crops(tmp_path, 1, wide=0))[0]
    pipeline = load_pipeline(loaded, options=asking())
    judged = pipeline.judge_one(source)
    assert next(iter(judged.scores.values())).forgery_map.ndim == 2
    mine = pipeline.explain(judged, regions=("eyes",), questions=("Why?",)).to_dict()
    options = asking(regions=("eyes",), questions=("Why?",))
    theirs = next(explain_sources([source], model=loaded, options=options)).to_dict()
    assert mine["model"] == "Explainer"
    assert mine == theirs
    assert judged.record.settings.model_fingerprint == theirs["model_fingerprint"]


def test_words_are_heard_as_they_come(tmp_path):
    pipeline = load_pipeline(tiny(), options=asking())
    judged = pipeline.judge_one(expand(crops(tmp_path, 1))[0])
    heard = []
    record = pipeline.explain(judged, regions=("nose",), on_text=heard.append)
    said = "".join(item.text for item in heard if item.question.region == "nose")
    assert said.strip() == record.explanations[0].reasons[0].text
    assert len([item for item in heard if not item.text]) == 2  # the judgement and the region


def test_the_worst_frame_of_a_video_is_explained(tmp_path):
    clip = write_video(tmp_path / "ramp.mp4", [flat(6 * i) for i in range(40)])
    pipeline = load_pipeline(tiny(), options=asking())
    judged = pipeline.judge_one(expand([str(clip)])[0])
    record = pipeline.explain(judged, regions=("face",))
    worst = max(judged.record.frames, key=lambda frame: frame.fake_probability)
    assert record.explanations[0].frame == worst.index
    assert record.explanations[0].fake_probability == worst.fake_probability


def test_a_face_of_several_can_be_chosen(tmp_path):
    pipeline = load_pipeline(tiny(), options=asking())
    first, second = (pipeline.judge_one(source) for source in expand(crops(tmp_path, 2)))
    place = (5, 5, 45, 45)
    moved = replace(second.prepared.views[0].crops[0], crop=place)
    view = View((first.prepared.views[0].crops[0], moved), 2)
    faces = (*first.record.faces, replace(second.record.faces[0], crop=place))
    both = Judged(
        replace(first.record, faces=faces),
        replace(first.prepared, views=(view,)),
        first.scores | second.scores,
    )
    chosen = pipeline.explain(both, face=place, regions=("eyes",)).explanations
    alone = pipeline.explain(second, regions=("eyes",)).explanations
    assert [face.crop for face in chosen] == [place]
    assert chosen[0].reasons == alone[0].reasons


def test_a_name_is_an_explainer_or_a_detector(tmp_path, tiny_detector_folder):
    write_explainer(tmp_path / "explainer")
    assert load_pipeline(str(tmp_path / "explainer"), options=asking()).explains
    pipeline = load_pipeline(str(tiny_detector_folder), options=asking())
    assert not pipeline.explains
    assert pipeline.settings.model == str(tiny_detector_folder)
    with pytest.raises(CheckpointError):
        load_pipeline(str(tmp_path / "nothing"))


def test_maps_are_those_of_the_detector(tmp_path):
    loaded = tiny()
    source = expand(crops(tmp_path, 1))[0]
    asked = load_pipeline(loaded, options=asking()).judge_one(source)
    alone = load_pipeline(loaded[0].detector, options=asking()).judge_one(source)
    pairs = zip(asked.scores.values(), alone.scores.values(), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one.forgery_map, other.forgery_map, atol=1e-6)
        assert one.fake_probability == other.fake_probability
