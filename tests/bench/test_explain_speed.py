"""Questions a second of ``m2f2 explain`` against asking one by one, on a CPU in float32.

One by one is what the published script does: one picture and one question at a time, the vision
tower and the whole prompt run for each, generation with a cache. Ours gets picture files, its
default batch size, and answers in the same words.

Run with: pytest tests/bench/test_explain_speed.py -m bench -s
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f2cli.data.images import read_picture
from m2f2cli.data.transforms import explainer_views
from m2f2cli.inference.explain import explain
from m2f2cli.inference.questions import choose
from m2f2cli.models.explainer import Explainer, ExplainerConfig
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.detect import DetectOptions
from m2f2cli.options.explain import ExplainOptions
from tests.parity import explainer as golden

pytestmark = pytest.mark.bench
NEW_TOKENS = 16
ROUNDS, PICTURES = 5, 4  # 20 pictures; the two ways take turns after every four
OPTIONS = ExplainOptions(
    detect=DetectOptions(faces="none"), condition="none", max_new_tokens=NEW_TOKENS
)
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 13,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def golden_explainer() -> tuple[Explainer, ExplainerProcessor]:
    return golden.model(), golden.processor()


def large_explainer() -> tuple[Explainer, ExplainerProcessor]:
    fields = golden.config().to_dict()
    config = ExplainerConfig(
        detector_config=fields["detector_config"], text_config={**fields["text_config"], **LARGE}
    )
    torch.manual_seed(0)
    model = Explainer(config).requires_grad_(False).eval()
    return model, ExplainerProcessor(golden.processor().tokenizer, config, explainer_views)


def one_by_one(
    model: Explainer, processor: ExplainerProcessor, files: list[str]
) -> list[list[str]]:
    prompts = [question.prompt(processor.template, None) for question in choose(OPTIONS)]
    answers = []
    for file in files:
        texts = []
        for prompt in prompts:
            batch = processor(prompt, [read_picture(file).pixels])
            ids = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
            texts.append(decode(processor.tokenizer, ids))
        answers.append(texts)
    return answers


def shared(model: Explainer, processor: ExplainerProcessor, files: list[str]) -> list[list[str]]:
    records = explain(files, model=(model, processor), options=OPTIONS)
    faces = [record.explanations[0] for record in records]
    return [[face.judgement_text, *(reason.text for reason in face.reasons)] for face in faces]


@pytest.mark.parametrize("make", [golden_explainer, large_explainer])
def test_questions_a_second(make, tmp_path: Path):
    model, processor = make()
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None  # every answer has NEW_TOKENS tokens
    questions = PICTURES * len(choose(OPTIONS))
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"one by one": [], "m2f2 explain": []}
    for turn in range(ROUNDS):
        files = []
        for number in range(PICTURES):
            pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            files.append(str(tmp_path / f"{turn}{number}.png"))
            Image.fromarray(pixels).save(files[-1])
        answers = []
        for name, ask in zip(rates, (one_by_one, shared), strict=True):
            begin = time.perf_counter()
            answers.append(ask(model, processor, files))
            rates[name].append(questions / (time.perf_counter() - begin))
        assert answers[0] == answers[1]
    model.generation_config.eos_token_id = ends
    before, after = (statistics.median(seen) for seen in rates.values())
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"\n{size:.0f} M parameters, {len(choose(OPTIONS))} questions x {ROUNDS * PICTURES} "
        f"pictures, {NEW_TOKENS} new tokens, {torch.get_num_threads()} threads: "
        f"one by one {before:.2f} questions/s, m2f2 explain {after:.2f}, {after / before:.1f}x"
    )
    assert after >= 4 * before
