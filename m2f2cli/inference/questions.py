"""What is asked about a face, and what the question tells the model about it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from m2f2cli.data.conversations import stated_label
from m2f2cli.errors import UsageError
from m2f2cli.models.conversation import DEEPFAKE, IMAGE, Template, Turn
from m2f2cli.options.explain import REGIONS, ExplainOptions

_HEAD = re.compile(rf"(?:{IMAGE}|{DEEPFAKE}|\s)*")
_TOLD = re.compile(r"This image is (?:real|fake)\.\s*")
_OF_REGION = re.compile(r"The (\w+) in the image (?:is|are) (?:real|fake), tell me why\b")


@dataclass(frozen=True)
class Question:
    """One question about one face.

    Attributes:
        text: Without what it tells of the face. ``<image>`` and ``<deepfake>`` are put before it
            unless it has one of them itself. None asks for the judgement in the template's words.
        region: The region it asks about; None for a question of the user's own.
    """

    text: str | None
    region: str | None = None

    def asked(self, template: Template, told: str | None) -> str:
        """The question as the model reads it, without the template around it.

        Args:
            template: Gives the placeholders, and the words of the judgement.
            told: ``real`` or ``fake`` is said of the picture first; a judgement tells nothing.
        """
        if self.text is None:
            return template.judgement()
        own = IMAGE in self.text or DEEPFAKE in self.text
        text = self.text if own else template.question(self.text)
        if told is None:
            return text
        head = _HEAD.match(text)
        end = head.end() if head else 0
        return f"{text[:end]}This image is {told}. {text[end:]}"

    def words(self, template: Template, told: str | None) -> str:
        """``asked`` without the placeholders before it."""
        return _HEAD.sub("", self.asked(template, told), count=1)

    def prompt(self, template: Template, told: str | None) -> str:
        """The question inside the template, ready to be answered."""
        return template.render([Turn(self.asked(template, told))])[0]


JUDGEMENT = Question(None)


def choose(options: ExplainOptions) -> tuple[Question, ...]:
    """What is asked of each face: the judgement first, then regions, then the user's own."""
    own = [Question(text) for text in dict.fromkeys(options.questions)]
    wanted = dict.fromkeys(options.regions or (() if own or options.judge else REGIONS))
    return (JUDGEMENT, *(of_region(region) for region in wanted), *own)


def of_region(region: str) -> Question:
    """The question for the reasons that a region gives."""
    return Question(f"Describe the authenticity of the image based on {region}.", region)


def untold(text: str) -> Question:
    """A question of a data set, without the label that it gives away.

    Args:
        text: As the data set has it.

    Raises:
        UsageError: It names a label in a form that m2f2 does not know.
    """
    region = _OF_REGION.match(text)
    if region and region[1] in REGIONS:
        return of_region(region[1])
    plain = _TOLD.sub("", text)
    if stated_label(plain) is not None or not plain:
        raise UsageError(
            f"The label cannot be taken out of the question '{text}'.",
            "Add --condition truth: the questions are then asked as they are.",
        )
    return Question(plain)
