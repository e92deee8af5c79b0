"""What of an explainer trains in stages 2 and 3, and what it is called in a delta.

    align   forgery_projector
    lora    low-rank updates of the language model's linear layers, mm_projector, forgery_projector

Everything else stays as it is, bit by bit: the word embeddings, the head, the detector and CLIP.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from m2f2cli.checkpoints.adapters import adapter_fields
from m2f2cli.models.explainer import Explainer
from m2f2cli.options.train_explainer import AdapterOptions

PROJECTORS = ("mm_projector", "forgery_projector")
_LAYERS = "language_model.model."
# What PEFT puts into names in memory, and leaves out on disk.
_IN_MEMORY = (".modules_to_save.default", ".default")


def prepare_align(model: Explainer) -> None:
    """Let the forgery projector train, in float32, and nothing else."""
    model.requires_grad_(False)
    model.forgery_projector.requires_grad_(True).float()


def prepare_lora(model: Explainer, options: AdapterOptions) -> tuple[PeftModel, dict[str, Any]]:
    """Put low-rank updates on every linear layer of the language model but its head.

    They and both projectors train, in float32.

    Returns:
        The adapted model, and the content of ``adapter_config.json``.
    """
    model.requires_grad_(False)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_LAYERS)
    ]
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=layers,
        modules_to_save=list(PROJECTORS),
        bias="none",
    )
    written = adapter_fields(config.to_dict())  # now: PEFT shortens lists of layers in memory
    with warnings.catch_warnings():  # PEFT asks transformers by a name that goes out of use
        warnings.simplefilter("ignore", FutureWarning)
        adapted: PeftModel = get_peft_model(model, config)
    for _, parameter in trained(adapted):
        parameter.data = parameter.data.float()
    return adapted, written


def save_memory(model: Explainer) -> None:
    """Compute the language model's layers again in the backward pass instead of keeping them."""
    old = "gradient_checkpointing_enable"  # what earlier versions of transformers 5 call it
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
    enable({"use_reentrant": False})


def hide_scalars(model: nn.Module) -> None:
    """Make frozen parameters of no dimension buffers: DeepSpeed cannot spread such parameters."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 0 and not weight.requires_grad:
                delattr(module, name)
                module.register_buffer(name, weight.data)


def explainer_of(model: nn.Module) -> Explainer:
    """The explainer inside of what trains."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    explainer: Explainer = found
    return explainer


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains: names as a delta has them, and parameters."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for inside in _IN_MEMORY:
                name = name.replace(inside, "")
            yield name, parameter


def optimiser_groups(
    model: nn.Module, *, rate: float, projector_rate: float | None, decay: float
) -> list[dict[str, Any]]:
    """The optimiser's groups: every trained parameter exactly once.

    Args:
        model: What trains.
        rate: Learning rate.
        projector_rate: Of the projectors; None for no difference.
        decay: Weight decay of matrices; biases have none.
    """
    found: dict[tuple[float, float], list[torch.Tensor]] = {}
    for name, parameter in trained(model):
        projector = any(f"{part}." in name for part in PROJECTORS)
        own = projector_rate if projector and projector_rate is not None else rate
        found.setdefault((own, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": params, "lr": own, "weight_decay": weight}
        for (own, weight), params in found.items()
    ]
