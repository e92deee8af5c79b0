"""Conversation templates and how a written conversation becomes token ids and labels.

The published system cuts a prompt at ``<image>`` and ``<deepfake>``, tokenizes each piece on its
own and puts one begin-of-sequence token in front. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m2f2cli.errors import UsageError
from m2f2cli.options.explain import TEMPLATES

IMAGE = "<image>"
DEEPFAKE = "<deepfake>"
IMAGE_ID = -200
DEEPFAKE_ID = -300
IGNORED = -100
_PLACEHOLDERS = {IMAGE: IMAGE_ID, DEEPFAKE: DEEPFAKE_ID}
_CUT = re.compile(f"({IMAGE}|{DEEPFAKE})")
# What sentencepiece writes for a space, and before the first word.
_SPACE = "▁"


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: With ``<image>`` and ``<deepfake>`` where they belong.
        answer: None in the last turn of a prompt.
    """

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Template:
    """The frame that is written around the turns of a conversation.

    A turn is ``human + question + assistant``, then, where it is answered, a space, the answer and
    the end-of-sequence token. ``between`` stands before every turn but the first.

    Args:
        name: What checkpoints call it.
        system: What every conversation begins with.
        human: Announces the question.
        assistant: Announces the answer.
        between: Stands between an answered turn and the next.
        judge: The question that asks for the verdict, as the published system words it.
        judge_head: The placeholders as they stand before ``judge``.
    """

    name: str
    system: str
    human: str
    assistant: str
    between: str
    judge: str
    judge_head: str = f"{IMAGE}\n{DEEPFAKE}\n"

    def question(self, text: str, *, pictures: int = 1, deepfake: bool = True) -> str:
        """A question about pictures: the placeholders of each, then the text.

        Args:
            text: The question.
            pictures: How many pictures it is about.
            deepfake: Whether the detector's answer is shown too.
        """
        head = f"{IMAGE}\n{DEEPFAKE}\n" if deepfake else f"{IMAGE}\n"
        return head * pictures + text

    def judgement(self) -> str:
        """The question that asks for the verdict, with its placeholders."""
        return self.judge_head + self.judge

    def render(self, turns: Sequence[Turn], *, end: str = "</s>") -> tuple[str, list[range]]:
        """Write a conversation out.

        Args:
            turns: In order; only the last may be unanswered.
            end: The end-of-sequence token.

        Returns:
            text: The whole conversation.
            answers: Where the answers stand in it, from the space before to the token after.

        Raises:
            UsageError: There is no turn, an answer is empty or one is missing in the middle.
        """
        if not turns:
            raise UsageError("A conversation needs at least one turn.")
        text, answers = self.system, []
        for number, turn in enumerate(turns):
            text += (self.between if number else "") + self.human + turn.question + self.assistant
            if turn.answer is None and number + 1 < len(turns):
                raise UsageError(f"Turn {number + 1} of a conversation has no answer.")
            if turn.answer is not None:
                if not turn.answer.strip():
                    raise UsageError(f"The answer of turn {number + 1} of a conversation is empty.")
                begin = len(text)
                text += f" {turn.answer}{end}"
                answers.append(range(begin, len(text)))
        return text, answers


VICUNA_V1 = Template(
    name="vicuna_v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    human="USER: ",
    assistant=" ASSISTANT:",
    between="",
    judge="Do the image looks real or fake?",
)
DDVQA = Template(
    name="ddvqa",
    system=(
        "Assistant: A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.###"
    ),
    human="Human: ",
    assistant=" ###Assistant:",
    between="###",
    judge="Determine the authenticity. Is the image real or fake?",
    judge_head=f"{IMAGE}\n {DEEPFAKE}\n ",
)


def template(name: str) -> Template:
    """The template of that name.

    Raises:
        ConfigError: There is none; the nearest name is offered.
    """
    found: Template = TEMPLATES.get(name)
    return found


def turns_of(conversation: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns of one entry of a published conversation file.

    In a question the placeholders are moved to the front, as the published code does it: what
    stood around them stays, newlines included. A greeting of the assistant's is left out.

    Args:
        conversation: ``{"from": "human" | "gpt", "value": text}``, alternating.

    Raises:
        UsageError: The speakers do not alternate or a text is missing.
    """
    if conversation and conversation[0].get("from") == "gpt":
        conversation = conversation[1:]
    speakers = [part.get("from") for part in conversation]
    texts: list[Any] = [part.get("value") for part in conversation]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise UsageError("The speakers of a conversation must be human and gpt in turn.")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError("A conversation has a turn without a text.")
    return [
        Turn(_placeholders_first(question), answer)
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def _placeholders_first(question: str) -> str:
    counts = [question.count(name) for name in _PLACEHOLDERS]
    if max(counts) != 1:  # none to move, or several, whose places mean something
        return question
    head = "".join(f"{name}\n" for name in _PLACEHOLDERS if name in question)
    return (head + _CUT.sub("", question)).strip()


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt.

    Args:
        text: What ``Template.render`` wrote, or any prompt.
        tokenizer: As ``models.tokenizer.load_tokenizer`` gives it.

    Returns:
        The begin-of-sequence token, then the pieces, ``IMAGE_ID`` and ``DEEPFAKE_ID`` between.
    """
    return [token for token, _ in _tokens(text, tokenizer)]


def encode_with_labels(
    text: str, answers: Sequence[range], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation to learn from.

    Args:
        text: What ``Template.render`` wrote.
        answers: Where the answers stand in it.
        tokenizer: As ``models.tokenizer.load_tokenizer`` gives it.

    Returns:
        ids: See ``encode``.
        labels: The ids of the answers and their ends, ``IGNORED`` everywhere else.
    """
    ids, labels = [], []
    for token, place in _tokens(text, tokenizer):
        ids.append(token)
        labels.append(token if any(place in answer for answer in answers) else IGNORED)
    return ids, labels


def _tokens(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Each token's id and the place in the text where it begins; -1 for the first token."""
    tokens = [(tokenizer.bos_token_id, -1)]
    place = 0
    for piece in _CUT.split(text):
        if piece in _PLACEHOLDERS:
            tokens.append((_PLACEHOLDERS[piece], -1))
        elif piece:
            tokens += [(token, place + begin) for token, begin in _piece(piece, tokenizer)]
        place += len(piece)
    return tokens


def _piece(piece: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Tokenize one piece as the slow LLaMA tokenizer does.

    With ``legacy`` each stretch between special tokens gets a space of its own in front, which the
    tokenizer does by itself; without, only the piece does, unless a special token begins it.
    """
    front = _SPACE if getattr(tokenizer, "prefix_pieces", False) else ""
    out = tokenizer(front + piece, add_special_tokens=False, return_offsets_mapping=True)
    ids, begins = out["input_ids"], [begin - len(front) for begin, _ in out["offset_mapping"]]
    lone = front and tokenizer.convert_ids_to_tokens(ids[0]) == _SPACE
    if lone and len(ids) > 1 and ids[1] in tokenizer.all_special_ids:
        ids, begins = ids[1:], begins[1:]
    return list(zip(ids, begins, strict=True))
