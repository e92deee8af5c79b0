"""Texts about DD-VQA pictures: from what annotators said to questions and answers.

The questions and the wording of the answers are those of the published files.
"""

from __future__ import annotations

import re

from m2f2cli.data.readers.ddvqa import REGIONS, Answer, without_verdict

PLACEHOLDERS = "<image>\n<deepfake>\n"
# Asked alone in stage 2, as published, and its answer.
JUDGE = "Do the image looks real or fake?"
JUDGEMENT = "The image looks {verdict}."
# Stage 3.
DESCRIBE = "Describe the authenticity of the image{regions}."
VERDICT_QUESTION = "Is the image real or fake?"
VERDICT_ANSWER = "Based on the learned representation, this image is {verdict}."
# Of the test questions: the order in which regions are listed, and how each is asked about.
_LISTED = ("face", "nose", "mouth", "skin", "eyebrows", "eyes")
_COMBINED = "This image is {verdict}. Describe the authenticity of the image based on {regions}."
_REAL = (
    "The {region} in the image {is_} real, tell me why. Answer in one sentence in the format"
    '"The person has naturally …… {region}."'
)
_FAKE = (
    "The {region} in the image {is_} fake, tell me why. Answer in one sentence in the format"
    '"The {region} ……"{middle} "The {region} {is_} fake because" directly answer why{like} '
    '"{example} "'
)
_EXAMPLES = {
    "skin": "The skin is overly smooth and lacks of details, such as skin texture.",
    "eyebrows": "The eyebrows look asymmetric.",
    "eyes": "The eyes look unnaturally asymmetric.",
    "nose": "The nose lacks of subtle details, such as pores, fine lines.",
    "mouth": "The mouth is misaligned with other facial features.",
}
_DEGREE = re.compile(r"[Tt]he person's \w+ looks? (?:very |a bit |slightly )?fake because ")


def reasons(answer: Answer) -> str:
    """An answer without its verdicts and degrees: only what was seen."""
    text = _DEGREE.sub("", without_verdict(answer.text))
    return re.sub("^the", "The", text.replace("stains/flaws", "stains or flaws"))


def regions_named(text: str) -> list[str]:
    """The face and its regions that a text names, in the order of the test questions."""
    return [region for region in _LISTED if region in text.lower()]


def test_question(answer: Answer, verdict: str) -> str:
    """The published question that an answer is the reference for.

    An answer about the whole picture that names one region alone counts as one about that region.

    Args:
        answer: The answer.
        verdict: ``real`` or ``fake``: the questions give it away.
    """
    named = regions_named(reasons(answer))
    region = answer.region
    if region is None:
        if len(named) != 1 or named[0] not in REGIONS:
            return _COMBINED.format(verdict=verdict, regions=", ".join(named))
        region = named[0]
    is_ = "are" if region in ("eyebrows", "eyes") else "is"
    if verdict == "real":
        return _REAL.format(region=region, is_=is_)
    # The word "like" is misplaced in the published question about eyes.
    middle, like = (
        (" like. Instead of saying,", "") if region == "eyes" else (". Instead of saying,", " like")
    )
    return _FAKE.format(region=region, is_=is_, middle=middle, like=like, example=_EXAMPLES[region])


def judge_turns(verdict: str) -> list[dict[str, str]]:
    """Stage 2: one question, answered by the verdict alone."""
    return _turns((JUDGE, JUDGEMENT.format(verdict=verdict)))


def explain_turns(answer: Answer, verdict: str) -> tuple[list[dict[str, str]], ...]:
    """Stage 3: the same explanation in one turn with its verdict, and with the verdict asked next.

    Regions are listed in the order in which the answer comes to speak of them.
    """
    said = reasons(answer).strip()
    said = said if said.endswith((".", "!", "?")) else f"{said}."
    named = sorted(regions_named(said), key=said.lower().index)
    if answer.region is not None:
        named = [answer.region]
    describe = DESCRIBE.format(regions=f" based on {', '.join(named)}" if named else "")
    judged = VERDICT_ANSWER.format(verdict=verdict)
    return (
        _turns((f"{describe} {VERDICT_QUESTION}", f"{said} {judged}")),
        _turns((describe, said), (VERDICT_QUESTION, judged)),
    )


def _turns(*exchanges: tuple[str, str]) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        asked = question if number else PLACEHOLDERS + question
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return turns
