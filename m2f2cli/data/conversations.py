"""Conversation files: what people ask and are told about pictures, and where the pictures are.

A file is a JSON list of ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}``,
as the published system and ``m2f2 prepare ddvqa`` have it. ``image`` is a path inside the folder of
pictures, or ``FILE://KEY_FRAME`` for a frame in an HDF5 file there:
``FF++_Deepfakes_c40://000_003_17`` is frame 17 of the video 000_003 in ``FF++_Deepfakes_c40.h5``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2f2cli.data.clips import FrameReader
from m2f2cli.data.images import read_picture
from m2f2cli.data.judgement import parse
from m2f2cli.data.naming import kind_of, people_in
from m2f2cli.data.samples import Sample, hold_out, identity_groups
from m2f2cli.errors import InputError

ROLES = ("human", "gpt")
_INSIDE = "://"
_HELD = ("<image>", "<deepfake>")


@dataclass(frozen=True)
class Conversation:
    """One entry of a conversation file.

    Attributes:
        number: Its place in the file, from 0.
        image: As the file has it; empty for a conversation about no picture.
        sha256: Of the picture's bytes, as the file has it; None where it does not say.
        parts: ``{"from", "value"}``: human and gpt in turn, every answer with words in it.
    """

    number: int
    image: str
    sha256: str | None
    parts: tuple[dict[str, str], ...]

    @property
    def answers(self) -> list[str]:
        """What is to be learnt, in order."""
        return [part["value"] for part in self.parts if part["from"] == "gpt"]

    @property
    def label(self) -> int | None:
        """0 real, 1 fake: the last verdict in the answers; None where they give none."""
        found = [verdict for verdict in map(parse, self.answers) if verdict]
        return int(found[-1] == "fake") if found else None

    @property
    def identities(self) -> tuple[str, ...]:
        """The people in the picture, as its name tells."""
        before, inside, place = self.image.partition(_INSIDE)
        name = place.rpartition("_")[0] if inside else Path(before).stem
        return people_in(name[2:] if not inside and kind_of(name) else name)


def read_conversations(file: Path) -> list[Conversation]:
    """Read and check a conversation file; pictures are not looked at.

    Raises:
        InputError: It is missing, no JSON list, or empty; or an entry, named by its number, has
            unknown or misplaced roles, a missing text, an empty answer or one with a placeholder.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"There is no conversation file '{file}'.",
            "missing",
            "Make one with: m2f2 prepare ddvqa DIR --output DIR",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"The conversations '{file}' cannot be read: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"'{file}' is no list of conversations.",
            "empty" if rows == [] else "unreadable",
            'It is a JSON list of {"id", "image", "conversations": [{"from", "value"}]}.',
        )
    return [_conversation(number, row, file) for number, row in enumerate(rows)]


def _conversation(number: int, row: Any, file: Path) -> Conversation:
    def refuse(why: str, hint: str | None = None) -> InputError:
        return InputError(f"Conversation {number} (from 0) of '{file}' {why}.", hint=hint)

    parts = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise refuse("has no list 'conversations' of turns")
    image, sha256 = row.get("image") or "", row.get("sha256")
    if not isinstance(image, str):
        raise refuse("names no single picture by a text", "One 'image' a conversation.")
    speakers = [part.get("from") for part in parts]
    for role in speakers:
        if role not in ROLES:
            raise refuse(f"has the unknown role {role!r}", "The roles are human and gpt.")
    if speakers[:1] == ["gpt"]:  # a greeting; the published system leaves it out too
        parts, speakers = parts[1:], speakers[1:]
    if not speakers or speakers != list(ROLES) * (len(speakers) // 2):
        raise refuse("does not alternate between human and gpt", "Each question has one answer.")
    for part in parts:
        value = part.get("value")
        if not isinstance(value, str):
            raise refuse("has a turn without a text")
        if part["from"] == "gpt" and not value.strip():
            raise refuse("has an empty answer", "There is nothing to learn from it: drop it.")
        if part["from"] == "gpt" and any(word in value for word in _HELD):
            raise refuse(f"has {' or '.join(_HELD)} in an answer", "They belong in questions.")
    kept = tuple({"from": part["from"], "value": part["value"]} for part in parts)
    return Conversation(number, image, sha256 if isinstance(sha256, str) else None, kept)


class Pictures:
    """The pictures that conversations are about.

    Args:
        root: The folder that their names are inside of.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._frames = FrameReader()

    def pixels(self, conversation: Conversation) -> np.ndarray:
        """The picture of a conversation: uint8 (H, W, 3), RGB.

        Raises:
            InputError: It is missing, unreadable or not the one the conversation was made from.
        """
        image = conversation.image
        name, inside, place = image.partition(_INSIDE)
        if inside:
            key, _, frame = place.rpartition("_")
            if not key or not frame.isdecimal():
                raise InputError(
                    f"'{image}' names no frame.", "missing", "Such a name is FILE://KEY_FRAME."
                )
            file = self.root / (name if name.endswith((".h5", ".hdf5")) else f"{name}.h5")
            return self._frames.frame(file, key, int(frame))
        picture = read_picture(self.root / image)
        if conversation.sha256 not in (None, picture.sha256):
            raise InputError(
                f"'{self.root / image}' is another picture than conversation "
                f"{conversation.number} was made from.",
                hint="Give the --images folder that the conversations were prepared from.",
            )
        return picture.pixels


def find_missing(conversations: Sequence[Conversation], pictures: Pictures) -> dict[str, str]:
    """Decode every picture once; those that cannot be had, with the reason in a sentence."""
    faults: dict[str, str] = {}
    for one in {(c.image, c.sha256): c for c in conversations if c.image}.values():
        try:
            pictures.pixels(one)
        except InputError as error:
            faults[one.image] = error.message
    return faults


def split_conversations(
    conversations: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Cut conversations in two so that nobody is spoken of in both parts.

    Both parts get every verdict alike; see ``samples.hold_out``.

    Args:
        conversations: In the order of their file.
        share: Wanted share of the second part, in [0, 1); 0 leaves it empty.
        seed: Decides the cut.

    Raises:
        InputError: They cannot be cut.
    """
    if not share:
        return list(conversations), []
    samples = [
        Sample(Path(), str(c.number), 0, "", c.identities or (str(c.number),))
        for c in conversations
    ]
    groups = identity_groups(samples)
    verdicts = np.array([2 if c.label is None else c.label for c in conversations])
    held = set(hold_out(groups, verdicts, share, seed))
    if not held or len(held) == len(conversations):
        largest = max(map(len, groups))
        raise InputError(
            f"The conversations cannot be cut between identities: {len(groups)} groups, the "
            f"largest with {largest} of {len(conversations)} conversations.",
            "empty",
            "Give another --validation-share, or 0 for none.",
        )
    kept = [c for index, c in enumerate(conversations) if index not in held]
    return kept, [c for index, c in enumerate(conversations) if index in held]
