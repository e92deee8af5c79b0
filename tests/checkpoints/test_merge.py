"""A merge changes exactly what its deltas say, and is refused where they do not fit."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2f2cli.checkpoints import adapters, io
from m2f2cli.checkpoints.adapters import Pair
from m2f2cli.checkpoints.io import open_weight_file
from m2f2cli.checkpoints.merge import Merge, Row
from m2f2cli.errors import CheckpointError, UsageError
from tests.checkpoints import merges

COUNTER = itertools.count()
Q = "language_model.model.layers.0.self_attn.q_proj"
PREFIX = merges.PREFIX


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def base(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merges.base(tmp_path_factory.mktemp("base") / "base", request.param)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merges.base(tmp_path_factory.mktemp("half") / "base", torch.float16)


def merged(base: Path, deltas: list[Path], output: Path, **options) -> dict[str, torch.Tensor]:
    Merge(base, deltas, output, **options).write()
    io.fingerprint(output, verify=True)
    return io.read_tensors(output, finite=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_replaced_tensors_take_the_base_s_place_and_all_else_its_bytes(base, tmp_path):
    before = io.read_tensors(base)
    found = merged(base, [merges.stage_2(tmp_path / "d", base)], tmp_path / "out")
    new = open_weight_file(tmp_path / "d" / "delta.safetensors").tensors
    assert set(found) == set(before)
    for key, tensor in before.items():
        wanted = new[key].load() if key in new else tensor
        assert found[key].dtype == tensor.dtype
        assert torch.equal(bits(found[key]), bits(wanted)), key
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert io.read_config(tmp_path / "out") == io.read_config(base)


def test_folded_matrices_are_rounded_once(base, tmp_path):
    before = io.read_tensors(base)
    found = merged(base, [merges.stage_3(tmp_path / "d", base)], tmp_path / "out")
    updates = merges.adapter(base)
    count = 0
    for key, tensor in before.items():
        down = updates.get(f"{PREFIX}{key.removesuffix('.weight')}.lora_A.weight")
        if down is None:
            continue
        up = updates[f"{PREFIX}{key.removesuffix('.weight')}.lora_B.weight"]
        exact = tensor.double() + 2.0 * (up.double() @ down.double())
        # Half a step of the type, and a little for the order of the float32 sum.
        eps = torch.finfo(tensor.dtype).eps / 2 + 2**-20
        limit = eps * exact.abs() + 2**-22 * (up.abs().double() @ down.abs().double()) + 2**-25
        assert ((found[key].double() - exact).abs() <= limit).all(), key
        count += 1
    assert count == 4


def test_stages_in_order_and_in_one_go_are_the_same(base, tmp_path):
    first = merges.stage_2(tmp_path / "d1", base)
    one = merged(base, [first], tmp_path / "one")
    second = merges.stage_3(tmp_path / "d2", tmp_path / "one")
    two = merged(tmp_path / "one", [second], tmp_path / "two")
    both = merged(base, [first, second], tmp_path / "both")
    assert all(torch.equal(bits(both[k]), bits(t)) for k, t in two.items())
    assert io.fingerprint(tmp_path / "both") == io.fingerprint(tmp_path / "two")
    assert not all(torch.equal(one[k], t) for k, t in two.items())


def test_a_later_delta_of_another_parent_is_found_while_writing(half, tmp_path):
    first = merges.stage_2(tmp_path / "d1", half)
    beside = merges.stage_3(tmp_path / "d2", half)
    job = Merge(half, [first, beside], tmp_path / "out")
    with pytest.raises(CheckpointError, match="was trained on"):
        job.write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d1", "d2"]
    made = Merge(half, [first, beside], tmp_path / "out", force=True).write()
    assert len(io.read_stage(tmp_path / "out")["forced"]) == 1 == len(made.stage["forced"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_for_all_but_the_detector(half, tmp_path, dtype):
    before = io.read_tensors(half)
    found = merged(half, [merges.stage_2(tmp_path / "d", half)], tmp_path / "out", dtype=dtype)
    for key, tensor in found.items():
        frozen = key.startswith("detector.")
        assert tensor.dtype == (before[key].dtype if frozen else getattr(torch, dtype))
    assert io.read_config(tmp_path / "out")["dtype"] == dtype
    name = "language_model.lm_head.weight"
    assert torch.equal(found[name], before[name].to(getattr(torch, dtype)))


def test_values_out_of_range_of_the_type_are_refused(half, tmp_path):
    big = {"forgery_projector.0.bias": torch.full((32,), 1e6)}
    job = Merge(half, [merges.stage_2(tmp_path / "d", half, **big)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="outside the range of float16"):
        job.write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_stage_json_says_of_what(half, tmp_path):
    made = Merge(half, [merges.stage_3(tmp_path / "d", half)], tmp_path / "out").write()
    stage = io.read_stage(tmp_path / "out")
    mark = io.fingerprint(half)
    assert stage["stage"] == "merge"
    assert stage["parent"] == mark == stage["base"]["fingerprint"]
    assert stage["deltas"][0]["fingerprint"] == io.read_stage(tmp_path / "d")["fingerprint"]
    assert stage["deltas"][0]["parent"] == mark
    assert stage["forced"] == []
    assert made.fingerprint == stage["fingerprint"]


@pytest.mark.slow
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_merging_a_difference_gives_the_other_back(half, tmp_path, data):
    """merge(base, diff(base, x)) = x, byte for byte, whatever moved."""
    here = tmp_path / str(next(COUNTER))
    tensors = {k: t.clone() for k, t in io.read_tensors(half).items()}
    names = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, unique=True))
    seed = data.draw(st.integers(0, 2**20))
    for name in names:
        if tensors[name].is_floating_point():
            tensors[name] = merges.noise(tensors[name], seed).to(tensors[name].dtype)
        else:
            tensors[name] = tensors[name] + 1
    config = io.read_config(half)
    mark = io.write_checkpoint(here / "x", config=config, tensors=tensors, stage={})
    adapters.diff(half, here / "x", here / "d")
    found = merged(half, [here / "d"], here / "out")
    assert all(torch.equal(bits(found[k]), bits(t)) for k, t in tensors.items())
    assert io.fingerprint(here / "out") == mark
    shutil.rmtree(here)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 5),
    count=st.integers(1, 3),
    block=st.integers(1, 60),
)
def test_folding_does_not_depend_on_the_blocks(rows, columns, rank, count, block):
    generator = torch.Generator().manual_seed(rows * columns)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    matrix = some(rows, columns)
    factors = [(some(rows, rank), some(rank, columns)) for _ in range(count)]
    pairs = tuple(Pair(io.from_tensor(d), io.from_tensor(u), 0.5) for u, d in factors)
    pieces = io.LazyTensor((rows, columns), "float32", lambda: iter(matrix.view(-1).split(block)))
    found = Row("x", pieces, pairs, "float32").result.load()
    wanted = matrix.double() + sum(0.5 * (u.double() @ d.double()) for u, d in factors)
    assert (found - wanted).abs().max() < 1e-4


def unknown(base, folder):
    return merges.stage_2(folder, base, **{"forgery_projector.4.bias": torch.ones(3)})


def misshapen(base, folder):
    return merges.stage_2(folder, base, **{"forgery_projector.0.bias": torch.ones(3)})


def whole_number(base, folder):
    bias = torch.ones(32, dtype=torch.int64)
    return merges.stage_2(folder, base, **{"forgery_projector.0.bias": bias})


def no_module(base, folder):
    a, b = torch.ones(merges.RANK, 32), torch.ones(32, merges.RANK)
    key = f"{PREFIX}language_model.model.layers.7.self_attn.q_proj.lora_"
    return merges.stage_3(folder, base, **{f"{key}A.weight": a, f"{key}B.weight": b})


def wide_pair(base, folder):
    return merges.stage_3(folder, base, **{f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 31)})


def other_rank(base, folder):
    return merges.stage_3(folder, base, **{f"{PREFIX}{Q}.lora_A.weight": torch.ones(3, 32)})


def one_half(base, folder):
    return merges.stage_3(folder, base, **{f"{PREFIX}{Q}.lora_B.weight": None})


def half_module(base, folder):
    return merges.stage_3(folder, base, **{f"{PREFIX}mm_projector.2.bias": None})


def odd_key(base, folder):
    return merges.stage_3(folder, base, **{f"{PREFIX}{Q}.lora_embedding_A": torch.ones(4, 32)})


def frozen(base, folder):
    module = "detector.clip.vision.encoder.layers.0.self_attn.q_proj"
    shape = io.open_tensors(base)[f"{module}.weight"].shape
    a, b = torch.ones(merges.RANK, shape[1]), torch.ones(shape[0], merges.RANK)
    return merges.stage_3(
        folder, base, **{f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    )


def not_finite(base, folder):
    return merges.foreign(folder, base, **{f"{PREFIX}{Q}.lora_A.weight": torch.full((4, 32), 1e38)})


BAD = {
    unknown: "1 have no place in it: forgery_projector.4.bias",
    misshapen: r"forgery_projector.0.bias is \[3\], not \[32\]",
    whole_number: "1 of another kind of number",
    no_module: "layers.7.self_attn.q_proj.weight",
    wide_pair: r"q_proj.weight is \[32, 31\], not \[32, 32\]",
    other_rank: "not of rank 4",
    one_half: "only one half of its update",
    half_module: "1 missing: mm_projector.2.bias",
    odd_key: "no part of plain LoRA",
    frozen: "updates 1 modules that every stage keeps frozen",
}


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_a_delta_that_does_not_fit(half, tmp_path, make):
    folder = make(half, tmp_path / "d")
    with pytest.raises(CheckpointError, match=BAD[make]):
        Merge(half, [folder], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_an_update_that_overflows(half, tmp_path):
    with pytest.raises(CheckpointError, match=r"outside the range|NaN"):
        Merge(half, [not_finite(half, tmp_path / "d")], tmp_path / "out").write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


@pytest.mark.parametrize("name", [f"{Q}.lora_B.weight", "forgery_projector.0.bias"])
def test_a_delta_with_nan_is_said_to_hold_it(half, tmp_path, name):
    key = f"{PREFIX}{name}"
    spoiled = torch.full_like(merges.adapter(half)[key], float("nan"))
    folder = merges.foreign(tmp_path / "d", half, **{key: spoiled})
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        Merge(half, [folder], tmp_path / "out").write()


KINDS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "QALoRA": {"use_qalora": True},
    "LOHA": {"peft_type": "LOHA"},
    "rank_pattern": {"rank_pattern": {"q_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 8}},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights = pissa": {"init_lora_weights": "pissa"},
    "some_new_kind": {"some_new_kind": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_of_another_kind_is_named(half, tmp_path, name):
    folder = merges.stage_3(tmp_path / "d", half, config=merges.CONFIG | KINDS[name])
    with pytest.raises(CheckpointError, match=f"not plain LoRA but: .*{name}"):
        Merge(half, [folder], tmp_path / "out")


def test_an_adapter_that_changes_nothing(half, tmp_path):
    zero = {k: torch.zeros_like(t) for k, t in merges.adapter(half).items() if "lora_B" in k}
    gone = {k: None for k in merges.adapter(half) if "projector" in k}
    config = merges.CONFIG | {"modules_to_save": None}
    folder = merges.stage_3(tmp_path / "d", half, config=config, **zero, **gone)
    with pytest.raises(CheckpointError, match="changes nothing"):
        Merge(half, [folder], tmp_path / "out")


def test_a_delta_of_another_base(half, tmp_path):
    other = tmp_path / "other"
    merged(half, [merges.stage_2(tmp_path / "d1", half)], other)
    folder = merges.stage_3(tmp_path / "d2", other)
    with pytest.raises(CheckpointError, match="was trained on sha256:") as caught:
        Merge(half, [folder], tmp_path / "out")
    assert "--force" in str(caught.value.hint)
    Merge(half, [folder], tmp_path / "out", force=True).write()
    assert "was trained on sha256:" in io.read_stage(tmp_path / "out")["forced"][0]


def test_a_second_run_finds_the_result(half, tmp_path):
    folder = merges.stage_2(tmp_path / "d", half)
    first = Merge(half, [folder], tmp_path / "out").write()
    stale = tmp_path / ".out.999999999-0123abcd.partial"
    stale.mkdir()
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    second = Merge(half, [folder], tmp_path / "out").write()
    assert (first.existed, second.existed) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    assert not stale.exists()


@pytest.mark.parametrize("what", ["another merge", "other files", "a file"])
def test_an_output_that_is_something_else(half, tmp_path, what):
    output = tmp_path / "out"
    if what == "another merge":
        Merge(half, [merges.stage_3(tmp_path / "e", half)], output).write()
    elif what == "a file":
        output.write_text("x")
    else:
        output.mkdir()
        (output / "thesis.txt").write_text("x")
    folder = merges.stage_2(tmp_path / "d", half)
    with pytest.raises(CheckpointError, match=r"not empty|is a file"):
        Merge(half, [folder], output)
    if what == "another merge":
        Merge(half, [folder], output, overwrite=True).write()
        assert io.read_stage(output)["deltas"][0]["kind"] == "delta"
    else:
        with pytest.raises(CheckpointError):
            Merge(half, [folder], output, overwrite=True)


def test_a_full_disk(half, tmp_path, monkeypatch):
    job = Merge(half, [merges.stage_2(tmp_path / "d", half)], tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, and") as caught:
        job.write()
    assert "disk space" in str(caught.value.hint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


@pytest.mark.parametrize("kind", ["missing", "a delta", "empty"])
def test_a_base_that_is_none(half, tmp_path, kind):
    folder = merges.stage_2(tmp_path / "d", half)
    bases = {"missing": tmp_path / "nothing", "a delta": folder, "empty": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        Merge(bases[kind], [folder], tmp_path / "out")


def test_a_checkpoint_is_no_delta(half, tmp_path):
    with pytest.raises(CheckpointError, match="is no delta") as caught:
        Merge(half, [half], tmp_path / "out")
    assert "--base" in str(caught.value.hint)


def test_wrong_calls(half, tmp_path):
    with pytest.raises(UsageError):
        Merge(half, [], tmp_path / "out")
    with pytest.raises(UsageError):
        Merge(half, [merges.stage_2(tmp_path / "d", half)], tmp_path / "out", dtype="int8")
