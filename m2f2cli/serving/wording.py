"""Verdicts in words for people who have never heard of thresholds. Plain text, no markup."""

from __future__ import annotations

from m2f2cli.records import Detection, FaceExplanation, FaceScore, Settings

HEADLINES = {
    "fake": "Looks forged",
    "real": "No forgery found",
    "uncertain": "Cannot tell",
}
OPINION = (
    "This is the opinion of one program about one face, not proof. "
    "“No forgery found” does not mean that the picture is genuine."
)
MAP_LEGEND = (
    "Bright parts of the map are where the model found most of what it looks for, compared with "
    "the rest of the same face. It does not say how sure the model is."
)


def percent(probability: float) -> str:
    """A probability as people say it; never 0 % or 100 %, which no model can promise."""
    if probability > 0.995:
        return "over 99 %"
    if probability < 0.005:
        return "under 1 %"
    return f"{100 * probability:.0f} %"


def headline(record: Detection, face: FaceScore | None = None) -> str:
    """The verdict in two or three words; of an item without one, that there is none."""
    verdict = face.verdict if face else record.verdict
    return HEADLINES[verdict] if verdict else "No verdict"


def sentences(record: Detection, face: FaceScore | None = None) -> list[str]:
    """What the verdict is based on.

    Args:
        record: Of the item.
        face: The face spoken of; None for the item as a whole.
    """
    if record.fake_probability is None:
        return [record.message or ""]
    about = face or record
    score = about.fake_probability or 0.0
    subject = "these frames, on average," if record.kind == "video" else "this face"
    said = [
        f"The model gives {subject} a probability of {percent(score)} of being forged. "
        + _limits(record.settings)
    ]
    if about.in_domain is False:
        said.append(_foreign(record))
    elif about.verdict == "uncertain":
        said.append("It lies in that band.")
    if record.kind == "video":
        judged = sum(frame.fake_probability is not None for frame in record.frames)
        said.append(f"{judged} of the {len(record.frames)} frames looked at show a face.")
    elif record.crop_source == "picture":
        said.append("No face was searched for: the picture was taken as a face cut out already.")
    elif len(record.faces) > 1:
        said.append(f"It shows {len(record.faces)} faces; the most suspicious one decides.")
    if record.note:
        said.append(f"About the file: {record.note}.")
    return said


def _limits(settings: Settings) -> str:
    words = f"From {percent(settings.threshold)} on it says “forged”"
    if settings.uncertain is None:
        return words + "."
    low, high = (percent(value) for value in settings.uncertain)
    return f"{words}; between {low} and {high} it is wrong too often to say either."


def _foreign(record: Detection) -> str:
    subject = "Most of these frames are" if record.kind == "video" else "This face is"
    return (
        f"{subject} unlike the pictures the model has learnt from (sharper, blurred or compressed "
        "in another way), so the probability means little here and the model does not decide."
    )


def face_label(face: FaceScore, number: int, total: int) -> str:
    """A face of several, for those who hear the page."""
    words = f"{HEADLINES[face.verdict]}, {percent(face.fake_probability)}"
    return f"Face {number} of {total}: {words}"


def judgement(explained: FaceExplanation) -> str:
    """What the language model thinks itself, and whether that is the detector's verdict."""
    own = {"fake": "forged", "real": "genuine", None: "neither forged nor genuine"}
    words = "Asked without being told the verdict, the language model calls the face "
    words += own[explained.judgement]
    verdict = {
        True: ". It agrees with the detector.",
        False: ". It disagrees with the detector, so trust neither without looking yourself.",
        None: ". The detector has not decided, so there is nothing to agree with."
        if explained.judgement
        else ".",
    }
    return words + verdict[explained.agreement]
