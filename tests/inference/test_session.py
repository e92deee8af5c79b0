"""A loaded model says of one item what the commands say of it, and explains what it has judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from m2f2cli.errors import CheckpointError, UsageError
from m2f2cli.inference.explain import explain_sources
from m2f2cli.inference.pipeline import judge_sources
from m2f2cli.inference.session import Judged, Session
from m2f2cli.inference.sources import View, expand
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
    session = Session(judge, options=whole())
    mine = [session.judge(source) for source in sources]
    theirs = list(judge_sources(sources, model=judge, options=whole().detect))
    assert [item.record for item in mine] == theirs
    assert mine[0].scores[mine[0].crop(theirs[0].crop).digest].forgery_map.shape == (4, 4)
    assert not session.explains
    with pytest.raises(UsageError, match="without words"):
        session.explain(mine[0])


def test_an_explainer_judges_and_explains_as_explain_does(tmp_path):
    loaded = tiny()
    source = expand(crops(tmp_path, 1, wide=0))[0]
    session = Session(loaded, options=asking())
    judged = session.judge(source)
    assert next(iter(judged.scores.values())).forgery_map.ndim == 2
    mine = session.explain(judged, regions=("eyes",), questions=("Why?",)).to_dict()
    options = asking(regions=("eyes",), questions=("Why?",))
    theirs = next(explain_sources([source], model=loaded, options=options)).to_dict()
    assert mine.pop("model") == "Detector"
    theirs.pop("model")
    assert mine == theirs
    assert judged.record.settings.model_fingerprint == theirs["model_fingerprint"]


def test_words_are_heard_as_they_come(tmp_path):
    session = Session(tiny(), options=asking())
    judged = session.judge(expand(crops(tmp_path, 1))[0])
    heard = []
    record = session.explain(judged, regions=("nose",), on_text=heard.append)
    said = "".join(item.text for item in heard if item.question.region == "nose")
    assert said.strip() == record.explanations[0].reasons[0].text
    assert len([item for item in heard if not item.text]) == 2  # the judgement and the region


def test_the_worst_frame_of_a_video_is_explained(tmp_path):
    clip = write_video(tmp_path / "ramp.mp4", [flat(6 * i) for i in range(40)])
    session = Session(tiny(), options=asking())
    judged = session.judge(expand([str(clip)])[0])
    record = session.explain(judged, regions=("face",))
    worst = max(judged.record.frames, key=lambda frame: frame.fake_probability)
    assert record.explanations[0].frame == worst.index
    assert record.explanations[0].fake_probability == worst.fake_probability


def test_a_face_of_several_can_be_chosen(tmp_path):
    session = Session(tiny(), options=asking())
    first, second = (session.judge(source) for source in expand(crops(tmp_path, 2)))
    place = (5, 5, 45, 45)
    moved = replace(second.prepared.views[0].crops[0], crop=place)
    view = View((first.prepared.views[0].crops[0], moved), 2)
    faces = (*first.record.faces, replace(second.record.faces[0], crop=place))
    both = Judged(
        replace(first.record, faces=faces),
        replace(first.prepared, views=(view,)),
        first.scores | second.scores,
    )
    chosen = session.explain(both, face=place, regions=("eyes",)).explanations
    alone = session.explain(second, regions=("eyes",)).explanations
    assert [face.crop for face in chosen] == [place]
    assert chosen[0].reasons == alone[0].reasons


def test_a_name_is_an_explainer_or_a_detector(tmp_path, tiny_detector_folder):
    write_explainer(tmp_path / "explainer")
    assert Session(str(tmp_path / "explainer"), options=asking()).explains
    session = Session(str(tiny_detector_folder), options=asking())
    assert not session.explains
    assert session.settings.model == str(tiny_detector_folder)
    with pytest.raises(CheckpointError):
        Session(str(tmp_path / "nothing"))


def test_maps_are_those_of_the_detector(tmp_path):
    loaded = tiny()
    source = expand(crops(tmp_path, 1))[0]
    asked = Session(loaded, options=asking()).judge(source)
    alone = Session(loaded[0].detector, options=asking()).judge(source)
    pairs = zip(asked.scores.values(), alone.scores.values(), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one.forgery_map, other.forgery_map, atol=1e-6)
        assert one.fake_probability == other.fake_probability
