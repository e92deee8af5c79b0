"""Conversations as training items: which are usable, in which order they come, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from m2f2cli.data.conversations import (
    Conversation,
    Pictures,
    find_missing,
    parse_verdict,
    read_conversations,
    split_conversations,
)
from m2f2cli.errors import InputError, UsageError
from m2f2cli.models.conversation import IMAGE, Turn, encode_with_labels, turns_of
from m2f2cli.models.processing import ExplainerProcessor, check_placeholders
from m2f2cli.options.train_explainer import ConversationOptions
from m2f2cli.training.sampler import ORDER

_STEPS_SORTED = 50  # how many steps' conversations are sorted by length together


@dataclass(frozen=True)
class UsableConversations:
    """What is left of a conversation file.

    Attributes:
        train: To learn from.
        held: To measure on.
        lengths: Tokens of each conversation by its number, patches counted.
        counts: ``read``, ``too_long``, ``missing``, ``train``, ``validation``.
        missing: Pictures that cannot be read, with the reason.
    """

    train: list[Conversation]
    held: list[Conversation]
    lengths: dict[int, int]
    counts: dict[str, int]
    missing: dict[str, str]


def read_usable(
    options: ConversationOptions, processor: ExplainerProcessor, pictures: Pictures
) -> UsableConversations:
    """Read a conversation file and keep what can be learnt from whole; pictures are decoded once.

    Raises:
        InputError: See ``read_conversations``; or a conversation is too long, its picture missing
            or its placeholders wrong, and that is not to be passed over; or nothing is left.
    """
    found = read_conversations(options.data)
    if 0 < options.limit < len(found):
        found = [found[place * len(found) // options.limit] for place in range(options.limit)]
    room = min(options.max_length, processor.config.text_config.max_position_embeddings)
    lengths = {c.number: _length(c, processor, options) for c in found}
    long = [c for c in found if lengths[c.number] > room]
    if long and options.too_long == "error":
        raise InputError(
            f"{len(long)} conversations of '{options.data}' have more than {room} tokens, the "
            f"first is number {long[0].number} (from 0) with {lengths[long[0].number]}.",
            "too_large",
            "Raise --max-length as far as the model allows, or add --too-long skip.",
        )
    faults = find_missing(found, pictures)
    if faults and options.missing == "error":
        raise InputError(
            f"{len(faults)} pictures of '{options.data}' cannot be read. The first: "
            f"{next(iter(faults.values()))}",
            "missing",
            "Check --images, or add --missing skip.",
        )
    short = [c for c in found if lengths[c.number] <= room]
    kept = [c for c in short if c.image not in faults]
    if not kept:
        raise InputError(f"No conversation of '{options.data}' is left to learn from.", "empty")
    train, held = split_conversations(kept, options.validation_share, options.split_seed)
    counts = {
        "read": len(found),
        "too_long": len(long),
        "missing": len(short) - len(kept),
        "train": len(train),
        "validation": len(held),
    }
    return UsableConversations(train, held, lengths, counts, faults)


def _length(
    conversation: Conversation, processor: ExplainerProcessor, options: ConversationOptions
) -> int:
    """Tokens of a conversation, its picture's patches counted."""
    end = processor.tokenizer.eos_token
    try:
        text, answers = processor.template.render(turns_of(conversation.parts), end=end)
        check_placeholders(text, 1 if conversation.image else 0)
    except UsageError as error:
        raise InputError(
            f"Conversation {conversation.number} (from 0) of '{options.data}': {error.message}",
            hint=error.hint,
        ) from error
    ids, _ = encode_with_labels(text, answers, processor.tokenizer)
    return len(ids) + text.count(IMAGE) * (processor.config.patches - 1)


class ConversationDataset(Dataset[dict[str, Any]]):
    """Training items by ``epoch * len + position``, in a new order in each epoch.

    With ``group``, how many items a step has, these are of like length: some dozens of steps'
    items are sorted together, cut into steps, and these shuffled. The order depends on the seed and
    the items of a step alone, not on how many processes share it.
    """

    def __init__(
        self,
        usable: UsableConversations,
        processor: ExplainerProcessor,
        pictures: Pictures,
        *,
        max_length: int,
        seed: int,
        group: int,
    ) -> None:
        self.conversations = usable.train
        self.processor = processor
        self.pictures = pictures
        self.max_length = max_length
        self.seed = seed
        self.group = group
        self._lengths = np.array([usable.lengths[c.number] for c in usable.train])
        self._epoch, self._current = -1, self._lengths

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch, self._current = epoch, self.order(epoch)
        return self.encode(self.conversations[int(self._current[position])]) | {"index": index}

    def order(self, epoch: int) -> np.ndarray:
        """Which conversation stands at each position of an epoch: int64 (N,), a permutation."""
        rng = np.random.default_rng((self.seed, ORDER, epoch))
        order = rng.permutation(len(self))
        if not self.group:
            return order
        cuts = range(0, len(order), self.group * _STEPS_SORTED)
        blocks = [order[cut : cut + self.group * _STEPS_SORTED] for cut in cuts]
        order = np.concatenate([b[np.argsort(-self._lengths[b], kind="stable")] for b in blocks])
        whole = len(order) // self.group * self.group
        steps = rng.permutation(order[:whole].reshape(-1, self.group))
        return np.concatenate([steps.reshape(-1), order[whole:]])

    def shown(self, conversation: Conversation) -> list[np.ndarray]:
        """Its picture, uint8 (H, W, 3) RGB, if it is about one.

        Raises:
            InputError: The picture cannot be read.
        """
        return [self.pictures.pixels(conversation)] if conversation.image else []

    def encode(self, conversation: Conversation) -> dict[str, Any]:
        """A conversation as ``ExplainerProcessor.sample`` gives it; errors as in ``shown``."""
        turns, shown = turns_of(conversation.parts), self.shown(conversation)
        return self.processor.sample(turns, shown, max_length=self.max_length)

    def verdict_prompt(self, conversation: Conversation) -> str:
        """The conversation up to the question whose answer holds its last verdict.

        Raises:
            LookupError: No answer holds a verdict.
        """
        turns = turns_of(conversation.parts)
        verdicts = [n for n, turn in enumerate(turns) if parse_verdict(turn.answer or "")]
        if not verdicts:
            raise LookupError(f"Conversation {conversation.number} holds no verdict.")
        last = verdicts[-1]
        turns = [*turns[:last], Turn(turns[last].question)]
        text, _ = self.processor.template.render(turns, end=self.processor.tokenizer.eos_token)
        return text
