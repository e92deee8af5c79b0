"""Which adapters are folded: every field of peft's LoraConfig is accepted or refused, by name."""

from __future__ import annotations

import dataclasses

import pytest

from m2f2cli.checkpoints.adapters import adapter_fields, check_adapter
from m2f2cli.checkpoints.convert import import_weights
from m2f2cli.checkpoints.merge import Merge
from m2f2cli.errors import CheckpointError
from tests.checkpoints import merges
from tests.cli.test_import_delta import ADAPTER, stage_3

# Values that say nothing about what an update means.
ACCEPTED = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "peft_version": "0.99",
    "auto_mapping": {"base_model_class": "X"},
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "init_lora_weights": "gaussian",
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "modules_to_save": ["mm_projector"],
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
}
# Values that make an adapter of another kind.
REFUSED = {
    "peft_type": "LOHA",
    "bias": "all",
    "init_lora_weights": "pissa",
    "lora_alpha": None,
    "fan_in_fan_out": True,
    "use_rslora": True,
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"x": 1},
    "alora_invocation_tokens": [1],
    "rank_pattern": {"q_proj": 8},
    "alpha_pattern": {"q_proj": 8},
    "megatron_config": {"x": 1},
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"x": 1},
    "lora_ga_config": {"x": 1},
    "layer_replication": [[0, 1]],
    "runtime_config": {"x": 1},
    "lora_bias": True,
    "target_parameters": ["experts"],
    "arrow_config": {"x": 1},
    "kasa_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "velora_config": {"x": 1},
}
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def test_every_field_that_peft_knows_is_accepted_or_refused():
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known <= set(ACCEPTED) | set(REFUSED)
    check_adapter(adapter_fields(LoraConfig(r=4, lora_alpha=8).to_dict()), "'x'")


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_does_not_change_the_meaning_is_accepted(name):
    check_adapter(PLAIN | {name: ACCEPTED[name]}, "'x'")


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_another_kind_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match=f"not plain LoRA but: .*({name}|LOHA)"):
        check_adapter(PLAIN | {name: REFUSED[name]}, "'x'")


@pytest.mark.parametrize(
    "odd", [{"init_lora_weights": "pissa"}, {"lora_alpha": None}, {"loftq_config": {"bits": 4}}]
)
def test_import_and_merge_refuse_the_same_in_the_same_words(tmp_path, odd):
    folder = stage_3(tmp_path / "d", config=ADAPTER | odd)
    with pytest.raises(CheckpointError, match="not plain LoRA") as of_import:
        import_weights([folder], tmp_path / "delta")
    with pytest.raises(CheckpointError, match="not plain LoRA") as of_merge:
        Merge(merges.base(tmp_path / "base"), [folder], tmp_path / "merged")
    assert of_import.value.message == of_merge.value.message
