"""Damaged tokenizer files are one sentence, whatever library meets them first."""

from __future__ import annotations

import json

import pytest

from m2f2cli.errors import CheckpointError
from m2f2cli.models.tokenizer import load_tokenizer
from tests.checkpoints import llavas


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}},
        {"model": ["vocab"]},
        {"model": {"type": "Nothing", "vocab": {}}},
        {"added_tokens": 5},
        {"pre_tokenizer": {"type": "Nothing"}},
        {"normalizer": "x"},
    ],
)
def test_a_tokenizer_of_wrong_types(tmp_path, change):
    llavas.write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(CheckpointError, match=r"is damaged|holds no vocabulary"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_config_names_no_other_file(tmp_path):
    llavas.write_tokenizer(tmp_path, tokenizer_file="/nowhere/tokenizer.json")
    assert len(load_tokenizer(tmp_path)) > 0


def test_a_damaged_sentencepiece_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\x7fdamaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(tmp_path)
