"""The language model's tokenizer, brought to give what the slow LLaMA tokenizer gave.

transformers 5 has the fast one only. Its way of writing the space before the first word differs
where a text begins with a space, so that step is replaced here; the rest is the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tokenizers import normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from m2f2cli.compat import tokenizer_faults
from m2f2cli.errors import CheckpointError
from m2f2cli.files import read_json

_ELSEWHERE = "Take the tokenizer's files from the folder of the base LLaVA or LLaMA model."
_SPACE = "▁"
_FILES = {False: "tokenizer.model", True: "tokenizer.json"}
# What transformers, tokenizers, sentencepiece and protobuf raise at a damaged file.
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, DecodeError),
)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def load_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer.

    ``legacy`` in ``tokenizer_config.json`` (missing means true, as it did) decides whether words
    after a special token inside a text get a space in front.

    Args:
        folder: Holds ``tokenizer.json`` or sentencepiece's ``tokenizer.model``.

    Returns:
        A transformers tokenizer that pads with its pad, unknown or end-of-sequence token.

    Raises:
        CheckpointError: There is none, it is damaged, or it lacks a special token.
    """
    fields = _fields(folder)
    ready = (folder / "tokenizer.json").is_file()
    if not ready and not (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"'{folder}' has no tokenizer (tokenizer.json or tokenizer.model).", _ELSEWHERE
        )
    if not ready and not (find_spec("sentencepiece") and find_spec("google.protobuf")):
        raise CheckpointError(
            f"'{folder / 'tokenizer.model'}' cannot be read without sentencepiece and protobuf.",
            "pip install sentencepiece protobuf",
        )
    model = read_json(folder / "tokenizer.json").get("model") if ready else {"vocab": {}}
    if not isinstance(model, dict) or "vocab" not in model:
        raise CheckpointError(f"'{folder / 'tokenizer.json'}' holds no vocabulary.", _ELSEWHERE)
    kind = PreTrainedTokenizerFast if ready else LlamaTokenizer
    # Given here, since tokenizer_config.json may name another file.
    own: dict[str, Any] = {"tokenizer_file" if ready else "vocab_file": str(folder / _FILES[ready])}
    try:
        with tokenizer_faults():
            tokenizer = kind.from_pretrained(str(folder), local_files_only=True, **own)
    except _FAULTS as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"The tokenizer in '{folder}' is damaged ({said}).", _ELSEWHERE
        ) from error
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise CheckpointError(
                f"The tokenizer in '{folder}' has no {name}, which every prompt needs.", _ELSEWHERE
            )
    legacy = bool(fields.get("legacy", True))
    if _from_sentencepiece(tokenizer.backend_tokenizer):
        spaces = normalizers.Replace(" ", _SPACE)
        first = [normalizers.Prepend(_SPACE)] if legacy else []
        tokenizer.backend_tokenizer.pre_tokenizer = None
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*first, spaces])
        tokenizer.prefix_pieces = not legacy
        tokenizer.init_kwargs["legacy"] = legacy
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of an answer, without special tokens and surrounding space.

    A byte that is no UTF-8 becomes one replacement character and takes nothing with it, as
    sentencepiece has it; tokenizers replaces its neighbours too.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        return text.strip()
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens([n for n in ids if n not in special])
    raw = b""
    for token in tokens:
        byte = _BYTE.fullmatch(token)
        raw += bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
    return _characters(raw).strip()


def _characters(raw: bytes) -> str:
    text = ""
    while raw:
        try:
            return text + raw.decode()
        except UnicodeDecodeError as error:
            text += raw[: error.start].decode() + "\ufffd"
            raw = raw[error.start + 1 :]
    return text


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _from_sentencepiece(backend: Any) -> bool:
    """Whether a tokenizer writes spaces as sentencepiece does, rather than as bytes."""
    return isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace) or (
        backend.pre_tokenizer is None and backend.token_to_id(_SPACE) is not None
    )
