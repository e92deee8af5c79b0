"""The whole chain by the product's commands, from pictures to measured reasons, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from m2f2cli.checkpoints import io
from m2f2cli.cli import app
from m2f2cli.data.conversations import read_conversations
from m2f2cli.data.prepare.explanations import PLACEHOLDERS
from m2f2cli.models.conversation import VICUNA_V1, turns_of
from m2f2cli.models.tokenizer import load_tokenizer
from tests.checkpoints import llavas
from tests.conftest import TINY_CLIP, TINY_SIDE
from tests.models.explainers import TEXT, TOKENIZER
from tests.training.conftest import clip_folder, one_thread  # noqa: F401 - fixtures
from tests.training.talks import write_talks

CHAIN = f"""
train-detector --data faces --clip clip --output detector {{run}} --image-size {TINY_SIDE}
    --backbone test_efficientnet --backbone-weights none --hidden-size 12 --prompt-tokens 3
    --epochs 4 --batch-size 6 --validation-share 0.25
init-llava --llava base --detector detector --output explainer-0
align --model explainer-0 --output delta-1 {{talks}} {{run}}
    --learning-rate 1e-2 --validation-share 0.3 --eval-steps 1 --answer-tokens 4
merge --base explainer-0 --delta delta-1 --output explainer-1
lora --model explainer-1 --output delta-2 {{talks}} {{run}} --lora-r 16 --lora-alpha 32
    --learning-rate 1e-2 --projector-lr 1e-2 --epochs 16
merge --base explainer-1 --delta delta-2 --output last --verify
""".format(
    talks="--data talks.json --images crops --batch-size 6 --max-length 400",
    run="--device cpu --report-to none --quiet",
)


def ask_as_explain_does(file: Path) -> None:
    """Training keeps the newlines around placeholders, as published, and so would ask otherwise."""
    placeholders = json.dumps(PLACEHOLDERS)[1:-1]
    file.write_text(file.read_text().replace(placeholders, "<image><deepfake>"))


def speaker(file: Path) -> LlamaForCausalLM:
    """A language model of two layers that knows how the conversations of a file go."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=2))
    tokenizer = load_tokenizer(TOKENIZER)
    texts = [VICUNA_V1.render(turns_of(c.parts))[0] for c in read_conversations(file)]
    rows = [tokenizer(t.replace(PLACEHOLDERS, ""))["input_ids"] for t in sorted(set(texts))]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(160):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimiser.step()
    return model


def write_base(folder: Path, model: LlamaForCausalLM) -> Path:
    """A LLaVA in its own layout, with a real tokeniser and no CLIP tower."""
    width, seen = TEXT["hidden_size"], TINY_CLIP["vision"]["hidden_size"]
    tensors = dict(model.state_dict())
    for number, inside in ((0, seen), (2, width)):
        tensors[f"model.mm_projector.{number}.weight"] = 0.1 * torch.randn(width, inside)
        tensors[f"model.mm_projector.{number}.bias"] = torch.zeros(width)
    config = llavas.ORIGINAL_CONFIG | TEXT | {"mm_hidden_size": seen}
    del config["rope_scaling"], config["rope_theta"]
    llavas.write(folder, tensors, config, tokenizer=False)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    return folder


def sort_by_label(crops: Path, folder: Path) -> Path:
    """The crops as ``train-detector`` wants them: real/ and fake/."""
    for crop in crops.glob("*.jpg"):
        place = folder / ("real" if crop.name.startswith("5_") else "fake")
        place.mkdir(parents=True, exist_ok=True)
        Image.open(crop).save(place / f"{crop.stem[2:5]}.png")
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def chain(tmp_path, clip_folder, monkeypatch):  # noqa: F811
    """Stands in the folder of a finished chain."""
    monkeypatch.chdir(tmp_path)
    ask_as_explain_does(write_talks(tmp_path))
    write_base(tmp_path / "base", speaker(tmp_path / "talks.json"))
    sort_by_label(tmp_path / "crops", tmp_path / "faces")
    (tmp_path / "clip").symlink_to(clip_folder)
    for command in CHAIN.replace("\n    ", " ").strip().splitlines():
        assert app.run(command.split()) == 0, command
    return tmp_path


@pytest.mark.slow
def test_the_whole_chain(chain, capsys):
    check_family(chain)
    check_explained(chain)
    check_measured(chain, capsys)


def check_family(chain: Path) -> None:
    """Every result names what it was made of by its fingerprint."""
    marks = {
        name: io.fingerprint(chain / name, verify=True)
        for name in ("base", "detector", "explainer-0", "explainer-1", "last")
    }
    assert len(set(marks.values())) == 5
    said = {
        folder.parent.name: json.loads(folder.read_text()) for folder in chain.glob("*/stage.json")
    }
    parents = {name: p["fingerprint"] for name, p in said["explainer-0"]["parents"].items()}
    assert parents == {"llava": marks["base"], "detector": marks["detector"]}
    for child, parent in (
        ("delta-1", "explainer-0"),
        ("explainer-1", "explainer-0"),
        ("delta-2", "explainer-1"),
        ("last", "explainer-1"),
    ):
        assert said[child]["parent"] == marks[parent], child
    assert [said[name]["stage"] for name in ("delta-1", "delta-2", "last")] == [
        "align", "lora", "merge",
    ]  # fmt: skip
    figures = said["delta-1"]["metrics"]
    assert [f["step"] for f in figures["steps"]] == [1, 2]
    assert figures["epochs"][0]["validation_loss"] < figures["steps"][0]["validation_loss"]
    assert said["delta-2"]["metrics"]["epochs"][-1]["loss"] < 0.5


def check_explained(chain: Path) -> None:
    """The last explainer speaks in sentences, and sees more than chance."""
    asked = ["explain", "crops", "--model", "last", "--faces", "none", "--region", "skin"]
    asked += ["--condition", "none"]  # as it was trained
    assert app.run([*asked, "--max-new-tokens", "40", "--output", "why.jsonl"]) == 0
    records = rows(chain / "why.jsonl")
    assert len(records) == 12
    for record in records:
        assert record["status"] == "ok"
        assert record["model_fingerprint"] == io.fingerprint(chain / "last")
        ((reason,),) = (face["reasons"] for face in record["explanations"])
        assert reason["region"] == "skin"
        assert reason["text"].startswith("The skin")
        assert reason["complete"]
    judged = [record["judgement"] == truth(record) for record in records]
    assert sum(judged) > 6


def truth(record: dict[str, Any]) -> str:
    return "real" if Path(record["path"]).name.startswith("5_") else "fake"


def check_measured(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records are measured without their model."""
    capsys.readouterr()
    measure = ["evaluate", "ddvqa", "--predictions", "why.jsonl", "--truth-from-names"]
    assert app.run([*measure, "--report", "report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((chain / "report" / "report.json").read_text())
    assert report["counts"]["items"] == report["counts"]["answered"] == 12
    assert report["model"]["fingerprint"] == io.fingerprint(chain / "last")
    records = rows(chain / "why.jsonl")
    right = [
        (record["fake_probability"] >= record["threshold"]) == (truth(record) == "fake")
        for record in records
    ]
    assert report["figures"]["accuracy"]["value"] == pytest.approx(sum(right) / 12)
    assert sum(right) > 6
