"""Explaining with a real, tiny explainer: what must hold whatever its weights say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m2f2cli.data.images import read_picture
from m2f2cli.errors import UsageError
from m2f2cli.inference.explain import SeededSampling, explain, explain_sources
from m2f2cli.inference.pipeline import DetectPipeline
from m2f2cli.inference.questions import choose
from m2f2cli.inference.sources import expand
from m2f2cli.models.conversation import DDVQA, Template
from m2f2cli.models.tokenizer import decode
from m2f2cli.records import Explanation
from tests.inference.explainers import TOKENS, asking, crops, say, tiny
from tests.inference.test_video import flat, write_video
from tests.parity import explainer as golden

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return crops(tmp_path_factory.mktemp("pictures"), 4, wide=1)


def words(record: Explanation) -> list[str]:
    (face,) = record.explanations
    return [face.judgement_text, *(reason.text for reason in face.reasons)]


def alone(loaded, file: str, prompt: str, tokens: int = TOKENS) -> str:
    """The answer of one call of ``generate`` about one picture, as the published script asks."""
    model, processor = loaded
    batch = processor(prompt, [read_picture(file).pixels])
    ids = model.generate(**batch, do_sample=False, max_new_tokens=tokens)[0].tolist()
    ends = model.end_tokens()
    return decode(processor.tokenizer, [token for token in ids if token not in ends])


def prompts_of(record: Explanation, processor) -> list[str]:
    """Each question of a record in its template, rebuilt from what the record says."""
    template: Template = processor.template
    (face,) = record.explanations
    asked = [template.judgement(), *(f"<image>\n<deepfake>\n{r.question}" for r in face.reasons)]
    return [f"{template.system}{template.human}{text}{template.assistant}" for text in asked]


@pytest.mark.slow
def test_one_by_one_batched_and_shared_give_the_same_words(tmp_path: Path):
    """The golden explainer; a picture that is not square has two views.

    In the template ``ddvqa`` the judgement's prompt leaves the common beginning earlier.
    """
    model, processor = loaded = golden.model(), golden.processor()
    files = crops(tmp_path, 2, wide=1)
    options = asking(regions=("nose",), template="ddvqa", max_new_tokens=12)
    found = []
    for size in (1, 16):
        sized = replace(options, detect=replace(options.detect, batch_size=size))
        records = list(explain(files, model=loaded, options=sized))
        found.append([words(record) for record in records])
    prompts = [
        [q.prompt(DDVQA, record.explanations[0].told) for q in choose(options)]
        for record in records
    ]
    one_by_one = [
        [alone(loaded, file, prompt, 12) for prompt in texts]
        for file, texts in zip(files, prompts, strict=True)
    ]
    views = [[read_picture(file).pixels] for file in files for _ in choose(options)]
    batch = processor([prompt for texts in prompts for prompt in texts], views)
    out = model.generate(**batch, do_sample=False, max_new_tokens=12).tolist()
    assert found[0] == found[1] == one_by_one
    assert [decode(processor.tokenizer, ids) for ids in out] == [t for ts in one_by_one for t in ts]


def test_the_record_says_what_was_asked_and_what_was_seen(loaded, pictures):
    records = list(explain(pictures, model=loaded, options=asking()))
    assert [record.path for record in records] == pictures
    for record in records:
        assert Explanation.from_dict(record.to_dict()) == record
        assert [alone(loaded, record.path, p) for p in prompts_of(record, loaded[1])] == words(
            record
        )
        (face,) = record.explanations
        assert face.told == face.verdict == record.verdict
        assert face.crop == record.crop
        with torch.no_grad():
            pixels = loaded[1].pixels([read_picture(record.path).pixels])
            seen = loaded[0].detector.fake_probability(loaded[0].encode_pictures(**pixels).logits)
        assert record.fake_probability == pytest.approx(seen.item(), abs=1e-5)
        assert [reason.region for reason in face.reasons] == [
            "skin", "eyes", "eyebrows", "nose", "mouth", "face",
        ]  # fmt: skip
        assert not any(reason.complete for reason in face.reasons)  # it never stops by itself
    settings = records[0].settings
    assert (settings.template, settings.condition, settings.max_new_tokens) == (
        "vicuna_v1", "detector", TOKENS,
    )  # fmt: skip
    assert len(settings.questions) == 6


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(4)), size=st.integers(1, 30))
def test_batch_mates_change_nothing(loaded, pictures, order, size):
    options = asking(batch_size=size, regions=("nose", "face"))
    expected = {p: next(explain([p], model=loaded, options=options)) for p in pictures}
    chosen = [pictures[place] for place in order]
    for record in explain(chosen, model=loaded, options=options):
        assert words(record) == words(expected[record.path])
        assert record.fake_probability == pytest.approx(
            expected[record.path].fake_probability, abs=1e-5
        )


def test_equal_pictures_are_asked_about_once(loaded, pictures, tmp_path, monkeypatch):
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(pictures[0]).read_bytes())
    looked: list[int] = []
    score = DetectPipeline.score
    monkeypatch.setattr(
        DetectPipeline, "score", lambda s, c: (looked.append(len(c)), score(s, c))[1]
    )
    first, *_, last = explain([*pictures, str(copy)], model=loaded, options=asking())
    assert sum(looked) == len(pictures)
    assert first.explanations == last.explanations


def test_the_condition_decides_what_is_told(loaded, pictures, monkeypatch):
    asked = say(monkeypatch, lambda prompt: "It is real.")
    for threshold, label in ((0.0, "fake"), (1.0, "real")):
        (record,) = explain(pictures[:1], model=loaded, options=asking(threshold=threshold))
        assert record.explanations[0].told == label
        assert sum(f"This image is {label}. " in prompt for prompt in asked) == 6
        assert sum("This image is" in prompt for prompt in asked) == 6
        asked.clear()
    options = asking(condition="none")
    (record,) = explain(pictures[:1], model=loaded, options=options)
    assert record.explanations[0].told is None
    assert not any("This image is" in prompt for prompt in asked)
    band = replace(asking(), detect=replace(asking().detect, uncertain=(0.0, 1.0)))
    (record,) = explain(pictures[:1], model=loaded, options=band)
    assert (record.verdict, record.explanations[0].told) == ("uncertain", None)
    assert record.agreement is None
    assert record.judgement == "real"
    with pytest.raises(UsageError, match="Only the questions of a data set"):
        list(explain(pictures[:1], model=loaded, options=asking(condition="truth")))


@pytest.mark.parametrize(
    ("answer", "judgement", "agreement"),
    [
        ("The image is fake.", "fake", True),
        ("It looks unrealistic, but it is real.", "real", False),
        ("I see a nose.", None, None),
    ],
)
def test_the_verdict_is_the_detectors_and_agreement_is_said(
    loaded, pictures, monkeypatch, answer, judgement, agreement
):
    say(monkeypatch, lambda prompt: answer)
    (record,) = explain(pictures[:1], model=loaded, options=asking(threshold=0.0, judge=True))
    assert (record.verdict, record.judgement, record.agreement) == ("fake", judgement, agreement)
    (face,) = record.explanations
    assert (face.judgement_text, face.reasons) == (answer, ())


def test_every_face_of_a_picture_is_explained(loaded, tmp_path, monkeypatch):
    asked = say(monkeypatch, lambda prompt: "Words.")
    faces = [Image.open(EXAMPLES / n).convert("RGB") for n in ("astronaut.jpg", "grace_hopper.jpg")]
    both = Image.new("RGB", (sum(f.width for f in faces), max(f.height for f in faces)))
    both.paste(faces[0], (0, 0))
    both.paste(faces[1], (faces[0].width, 0))
    both.save(tmp_path / "both.png")
    options = asking(faces="all", regions=("nose",))
    (record,) = explain([str(tmp_path / "both.png")], model=loaded, options=options)
    assert len(record.faces) == 2
    assert len(asked) == 4
    for face, explained in zip(record.faces, record.explanations, strict=True):
        assert explained.crop == face.crop
        assert (explained.verdict, explained.fake_probability) == (
            face.verdict, face.fake_probability,
        )  # fmt: skip


def test_a_video_is_explained_by_its_most_suspicious_frame(loaded, tmp_path, monkeypatch):
    asked = say(monkeypatch, lambda prompt: "Words.")
    path = write_video(tmp_path / "ramp.mp4", [flat(6 * i) for i in range(40)])
    (record,) = explain([str(path)], model=loaded, options=asking(regions=("nose",)))
    assert len(record.frames) == 4
    most = max(record.frames, key=lambda frame: frame.fake_probability or 0)
    (face,) = record.explanations
    assert (face.frame, face.crop) == (most.index, most.crop)
    assert face.fake_probability == most.fake_probability
    assert len(asked) == 2
    assert record.crop is None


def test_bad_items_are_records_beside_good_ones(loaded, pictures, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    paths = [pictures[0], str(tmp_path / "text.png"), str(tmp_path / "none.png"), pictures[1]]
    records = list(explain(paths, model=loaded, options=asking(judge=True)))
    assert [record.status for record in records] == ["ok", "not_an_image", "missing", "ok"]
    assert [len(record.explanations) for record in records] == [1, 0, 0, 1]
    assert records[1].judgement is None


def test_words_are_told_as_they_come(loaded, pictures):
    heard: dict[str, str] = {}
    order = []
    sources = expand(pictures[:1])

    def collect(chunk):
        if not chunk.text:
            order.append(chunk.asked)
        heard[chunk.asked] = heard.get(chunk.asked, "") + chunk.text

    (record,) = explain_sources(sources, model=loaded, options=asking(), on_text=collect)
    (face,) = record.explanations
    assert order == [loaded[1].template.judge, *(reason.question for reason in face.reasons)]
    for told, text in zip(heard.values(), words(record), strict=True):
        assert told  # of an unfinished character at the end, nothing is told
        assert text.startswith(told)
        assert set(text[len(told) :]) <= {"\ufffd", " "} or "\ufffd" in text
    assert words(record) == words(next(explain(pictures[:1], model=loaded, options=asking())))


def test_draws_depend_on_seed_face_and_question_alone(loaded, pictures):
    def texts(files=pictures, **changes):
        options = asking(**{"sample": True, "temperature": 0.7, **changes})
        return [words(record) for record in explain(files, model=loaded, options=options)]

    drawn = texts(batch_size=16)
    assert texts(batch_size=2) == drawn
    assert texts(pictures[2:]) == drawn[2:]
    assert texts(seed=1) != drawn
    likeliest = [words(r) for r in explain(pictures, model=loaded, options=asking())]
    assert drawn != likeliest
    assert texts(top_p=1e-6) == likeliest


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    rows = logits.repeat(4000, 1)
    draws = SeededSampling(range(4000), temperature=0.8, top_p=1.0)
    counts = Counter(draws(torch.zeros(4000, 0), rows).argmax(dim=1).tolist())
    expected = (logits / 0.8).softmax(dim=0)
    for token, share in enumerate(expected.tolist()):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)
    likely = SeededSampling(range(4000), temperature=0.8, top_p=float(expected[2]) - 1e-3)
    assert set(likely(torch.zeros(4000, 0), rows).argmax(dim=1).tolist()) == {2}


def test_an_answer_that_ends_by_itself_is_complete(pictures):
    model, _ = loaded = tiny()
    model.generation_config.eos_token_id = list(range(3, 800))  # any word ends it
    (record,) = explain(pictures[:1], model=loaded, options=asking(regions=("nose",)))
    reason = record.explanations[0].reasons[0]
    assert (reason.text, reason.complete) == ("", True)


def test_answers_end_where_the_context_does(loaded, pictures):
    """And all end alike, whatever they are asked beside."""
    model, processor = loaded
    question = "Why " * 85
    prompt = choose(asking(questions=(question,)))[1].prompt(processor.template, "fake")
    room = model.config.text_config.max_position_embeddings - len(processor.tokens(prompt, 1))
    assert 0 < room < 40
    found = [
        words(next(explain(pictures[:1], model=loaded, options=asking(**changes))))
        for changes in (
            {"questions": (question,), "max_new_tokens": 512},
            {"questions": (question,), "max_new_tokens": room},
        )
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("<image> <deepfake> <deepfake> Why?", "2 <deepfake> for 1 pictures"),
        ("<image> <image> Why?", "2 <image> for 1 pictures"),
        ("why " * 500, "the model reads 400"),
    ],
)
def test_impossible_questions_are_refused_before_any_work(loaded, pictures, question, sentence):
    with pytest.raises(UsageError, match=sentence):
        next(explain(pictures, model=loaded, options=asking(questions=(question,))))


def test_a_template_without_placeholders_is_refused(loaded, pictures, monkeypatch):
    blind = Template("blind", "", "Q: ", " A:", "", judge="Real or fake?", judge_head="")
    monkeypatch.setattr("m2f2cli.inference.explain.template", lambda name: blind)
    with pytest.raises(UsageError, match="no <image> or <deepfake>"):
        next(explain(pictures, model=loaded, options=asking(judge=True)))


def test_an_optimized_detector_changes_no_words(pictures, tmp_path):
    from m2f2cli.inference.optimize_cpu import optimize_for_cpu

    plain = [words(r) for r in explain(pictures, model=tiny(), options=asking())]
    loaded = tiny()
    optimize_for_cpu(loaded[0].detector)
    assert [words(r) for r in explain(pictures, model=loaded, options=asking())] == plain
