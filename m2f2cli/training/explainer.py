"""Stages 2 and 3: train parts of an explainer on conversations, and write them as a delta.

    align   forgery_projector
    lora    low-rank updates of the language model's linear layers, mm_projector, forgery_projector

Everything else stays as it is, bit by bit: the word embeddings, the head, the detector and CLIP.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from m2f2cli.checkpoints.adapters import adapter_fields, write_delta
from m2f2cli.checkpoints.io import check_names_and_shapes
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.conversations import Conversation, Pictures, parse_verdict
from m2f2cli.data.transforms import explainer_views
from m2f2cli.errors import ConfigError, M2F2Error, MissingExtraError
from m2f2cli.files import parse_json
from m2f2cli.models.explainer import Explainer
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.train_explainer import (
    DEEPSPEED,
    AdapterOptions,
    AlignOptions,
    LoraOptions,
    LoraStepOptions,
    QuantizedOptions,
    StageOptions,
    StepOptions,
)
from m2f2cli.runtime import pick_device, process_count, seed_everything
from m2f2cli.training.explainer_data import ConversationDataset, read_usable
from m2f2cli.training.states import check_output, finished
from m2f2cli.training.trainer import (
    Advance,
    Batch,
    Finished,
    Notify,
    Trainer,
    eval_figures,
    make_accelerator,
    pick_precision,
    pick_tracker,
    run_record,
)

PROJECTORS = ("mm_projector", "forgery_projector")
_LAYERS = "language_model.model."
_DEEPSPEED_FILES = Path(__file__).parent.parent / "assets" / "deepspeed"
# What PEFT puts into names in memory, and leaves out on disk.
_IN_MEMORY = (".modules_to_save.default", ".default")


def align(
    options: AlignOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train an explainer's forgery projector (stage 2); write and return its delta folder.

    ``advance`` is called after each step with the steps done and text to show beside a progress
    bar, ``notify`` with messages for the user.

    Raises:
        ConfigError: Options do not go together, or not with those of the state to resume.
        InputError: Conversations or pictures are missing, unreadable or not usable.
        CheckpointError: The explainer does not load, or the output exists.
        MissingExtraError: An optional package is asked for and not installed.
        M2F2Error: The training has diverged.
    """
    return prepare(options, notify=notify).run(advance=advance)


def lora(
    options: LoraOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train low-rank updates and both projectors of an explainer (stage 3); else as ``align``."""
    return prepare(options, notify=notify).run(advance=advance)


def prepare(options: StageOptions, *, notify: Notify | None = None) -> ExplainerTrainer | Finished:
    """Read the data, load the explainer and check everything a run needs, training nothing yet.

    Args and errors are those of ``align``.
    """
    notify = notify or (lambda _: None)
    run, steps, data = options.run, options.optimizer, options.data
    if finished(options):
        return Finished(run.output, notify)
    check_output(options)
    precision = pick_precision(options.model.precision, run.device)
    pick_tracker(run.report_to)
    deepspeed = read_deepspeed(run.deepspeed)
    explainer, home = _load(options, precision)
    seed_everything(run.seed)
    model, adapter = choose_trained(explainer, options)
    processor = ExplainerProcessor.from_folder(home, explainer.config, explainer_views)
    pictures = Pictures(data.images)
    usable = read_usable(data, processor, pictures)
    step_size = steps.batch_size * steps.gradient_accumulation_steps * process_count()
    dataset = ConversationDataset(
        usable,
        processor,
        pictures,
        max_length=data.max_length,
        seed=run.seed,
        group=step_size * data.group_by_length,
    )
    if deepspeed is not None:
        width = explainer.config.text_config.hidden_size
        deepspeed = fill_deepspeed(deepspeed, steps=steps, width=width)
    record = run_record(
        "align" if isinstance(options, AlignOptions) else "lora",
        options,
        "deepspeed",
        parent=explainer.fingerprint,
        data={
            "conversations": data.data.name,
            "sha256": hashlib.sha256(data.data.read_bytes()).hexdigest(),
            **usable.counts,
            "missing_pictures": sorted(usable.missing),
        },
        trained_values=sum(weight.numel() for _, weight in trained(model)),
    )
    trainer = ExplainerTrainer(
        model,
        adapter=adapter,
        held=usable.held,
        dataset=dataset,
        options=options,
        accelerator=make_accelerator(run, precision, deepspeed),
        record=record,
        notify=notify,
    )
    if trainer.steps == 1 and steps.warmup_ratio:
        raise ConfigError(
            "The run has a single step, and warm-up begins at a learning rate of zero: nothing "
            "would be learnt.",
            "Lower --batch-size, raise --epochs, or add --warmup-ratio 0.",
        )
    counts = usable.counts
    lines = [f"left out, its picture cannot be read: {why}" for why in usable.missing.values()]
    lines.append(
        f"conversations: {counts['train']} to learn from, {counts['validation']} held out; left "
        f"out of {counts['read']}: {counts['too_long']} too long, {counts['missing']} without "
        "their picture"
    )
    notify("\n".join([*lines, f"trains: {record['trained_values']:,} values"]))
    return trainer


def _load(options: StageOptions, precision: str) -> tuple[Explainer, Path]:
    """The explainer to start from, and its folder.

    It is read to this process's own device; to memory where DeepSpeed spreads it.
    """
    unset_hf_deepspeed_config()  # of an earlier run, which would have the model read in shards
    device = pick_device(options.run.device)
    place = str(device)
    if device.type == "cuda" and device.index is None:
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    held_in = options.model.quantize if isinstance(options.model, QuantizedOptions) else "none"
    return load_explainer(
        options.model.model,
        device="cpu" if options.run.deepspeed else place,
        dtype=precision,
        quantize=None if held_in == "none" else held_in,
        attention=options.model.attn_implementation,
    )


def read_deepspeed(name: str | None) -> dict[str, Any] | None:
    """DeepSpeed's settings: bundled ones by their name, or those of a file.

    Raises:
        ConfigError: The file cannot be read, or sets what the options set.
        MissingExtraError: DeepSpeed is not installed.
    """
    if name is None:
        return None
    if find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "train", "--deepspeed")
    path = _DEEPSPEED_FILES / f"{name}.json" if name in DEEPSPEED else Path(name)
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed's settings '{path}' cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"'{path}' holds no JSON object with DeepSpeed's settings.")
    for section in ("optimizer", "scheduler"):
        if section in found:
            raise ConfigError(
                f"'{path}' sets the {section}, which the options of the command set.",
                f"Remove '{section}' from the file.",
            )
    return found


def fill_deepspeed(settings: dict[str, Any], *, steps: StepOptions, width: int) -> dict[str, Any]:
    """DeepSpeed's settings with what the options decide where they say ``auto`` or nothing.

    accelerate fills in the precision and the batch of all processes itself. ``width`` is the
    hidden size of the language model.
    """
    values = {
        "train_micro_batch_size_per_gpu": steps.batch_size,
        "gradient_accumulation_steps": steps.gradient_accumulation_steps,
        "gradient_clipping": steps.max_grad_norm,
    }
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    zero = settings.get("zero_optimization", {})
    return (
        settings
        | {key: value for key, value in values.items() if settings.get(key, "auto") == "auto"}
        | {"zero_optimization": {k: sizes.get(k, v) if v == "auto" else v for k, v in zero.items()}}
    )


def choose_trained(
    explainer: Explainer, options: StageOptions
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Let exactly the parameters of a stage train, in float32.

    Returns:
        What trains: the explainer, or for stage 3 PEFT's model around it; and then the content of
        ``adapter_config.json``.
    """
    explainer.requires_grad_(False)
    model: nn.Module = explainer
    adapter = None
    if isinstance(options, LoraOptions):
        model, adapter = _add_updates(explainer, options.adapter)
    else:
        explainer.forgery_projector.requires_grad_(True)
    for _, parameter in trained(model):
        parameter.data = parameter.data.float()
    if options.run.deepspeed:  # which cannot spread parameters of no dimension: let them be buffers
        for module in explainer.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.ndim == 0 and not weight.requires_grad:
                    delattr(module, name)
                    module.register_buffer(name, weight.data)
    if options.model.gradient_checkpointing:  # earlier versions of transformers 5 have the old name
        old = "gradient_checkpointing_enable"
        enable = getattr(explainer, "activation_checkpointing_enable", None)
        (enable or getattr(explainer, old))({"use_reentrant": False})
    return model, adapter


def _add_updates(explainer: Explainer, options: AdapterOptions) -> tuple[PeftModel, dict[str, Any]]:
    """Put low-rank updates on every linear layer of the language model but its head."""
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=[
            name
            for name, module in explainer.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(_LAYERS)
        ],
        modules_to_save=list(PROJECTORS),
        bias="none",
    )
    written = adapter_fields(config.to_dict())  # now: PEFT shortens lists of layers in memory
    with warnings.catch_warnings():  # PEFT asks transformers by a name that goes out of use
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(explainer, config), written


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains: names as a delta has them, and parameters."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for inside in _IN_MEMORY:
                name = name.replace(inside, "")
            yield name, parameter


class ExplainerTrainer(Trainer):
    """Trains an explainer with most of it frozen; ``held`` is what it is measured on.

    A step's loss is the mean over all answer tokens of the step, whatever the number of processes
    and batches it is dealt out to. ``model`` and ``adapter`` are as ``choose_trained`` gives them.
    """

    dataset: ConversationDataset

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: dict[str, Any] | None,
        held: list[Conversation],
        **shared: Any,
    ) -> None:
        self.adapter = adapter
        self.held = held
        self.explainer: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        super().__init__(model, **shared)
        self.processor = self.dataset.processor
        self.collate = self.processor.collate
        self.eval_steps = self.options.data.eval_steps
        self.measures = bool(held)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over exactly what trains; biases do not decay."""
        rate = self.optim.learning_rate
        own = self.optim.projector_lr if isinstance(self.optim, LoraStepOptions) else rate
        found: dict[tuple[float, float], list[torch.Tensor]] = {}
        for name, parameter in trained(self.model):
            projector = any(f"{part}." in name for part in PROJECTORS)
            decay = self.optim.weight_decay if parameter.ndim > 1 else 0.0
            found.setdefault((own if projector else rate, decay), []).append(parameter)
        groups = [
            {"params": params, "lr": lr, "weight_decay": decay}
            for (lr, decay), params in found.items()
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999))

    def step_total(self, batches: Sequence[Batch]) -> torch.Tensor:
        """How many answer tokens a step has in all processes: () int64."""
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        total: torch.Tensor = self.accelerator.gather(tokens).sum()
        return total

    def loss(self, batch: Batch, total: torch.Tensor) -> torch.Tensor:
        """The sum over the batch's answer tokens, as a share of the step's mean.

        The detector's BatchNorm and dropout stay as they are. Projectors that no picture of the
        batch reaches get a zero gradient, which several processes need in order to agree.
        """
        self.explainer.detector.eval()
        loss: torch.Tensor = self.wrapped(**batch, use_cache=False, num_items_in_batch=total).loss
        loss = loss * self.accelerator.num_processes  # averaged over them afterwards
        ids = self.explainer.config
        for token, part in zip(
            (ids.image_token_id, ids.deepfake_token_id), PROJECTORS, strict=True
        ):
            if not bool((batch["input_ids"] == token).any()):
                for weight in getattr(self.explainer, part).parameters():
                    loss = loss + 0 * weight.sum() if weight.requires_grad else loss
        return loss

    def tensors(self) -> dict[str, torch.Tensor]:
        """What trains, whole and in float32; to be called in every process."""
        if not self.deepspeed:
            return {name: weight.detach() for name, weight in trained(self.model)}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(weight) for name, weight in trained(self.model)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what ``tensors`` gave."""
        weights = dict(trained(self.model))
        check_names_and_shapes(tensors, weights, what="The saved state")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[name])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure on the held-out conversations, in all processes together.

        Returns:
            ``loss``, nats an answer token; and where any of them holds a verdict,
            ``judged_accuracy``, the share whose generated answer has the same verdict, and
            ``judged``, how many.

        Raises:
            M2F2Error: The training has diverged.
        """
        self.model.eval()
        judged = [c for c in self.held if c.label is not None]
        with self.accelerator.autocast():
            loss, tokens = self._sums(self.held_losses())
            figures = {"loss": loss / max(tokens, 1)}
            if judged:
                right, total = self._sums(self._verdicts(judged))
                figures |= {"judged_accuracy": right / total, "judged": total}
        if not figures["loss"] < float("inf"):
            raise M2F2Error(
                "The training has diverged: the validation loss is no longer a finite number.",
                "Lower --learning-rate and begin anew with --overwrite.",
            )
        return figures

    def describe(self, figures: Mapping[str, float]) -> str:
        """The figures in words."""
        words = f"validation loss {figures['loss']:.4f}"
        if "judged" in figures:
            share = figures["judged_accuracy"]
            words += f", judged accuracy {share:.4f} of {figures['judged']:.0f}"
        return words

    def write(self) -> None:
        """Write the delta folder: what trains, and the figures of the run."""
        tensors = self.tensors()  # in every process: DeepSpeed gathers them
        if not self.accelerator.is_main_process:
            return
        inside = [
            {"step": entry["step"], "epoch": entry["epoch"], **eval_figures(entry)}
            for entry in self.history
            if "eval_loss" in entry and entry["step"] % self.steps_per_epoch
        ]
        metrics = {"epochs": self.epoch_records()} | ({"steps": inside} if inside else {})
        write_delta(
            self.options.run.output,
            tensors=tensors,
            stage=self.record | {"metrics": metrics},
            adapter=self.adapter,
            overwrite=self.options.run.overwrite,
        )

    def _sums(self, pairs: Iterator[tuple[float, int]]) -> tuple[float, float]:
        """Sums over batches and processes."""
        device = self.accelerator.device
        here = torch.tensor(list(pairs), dtype=torch.float64).sum(dim=0)
        here = here.float() if device.type == "mps" else here
        here = self.accelerator.reduce(here.to(device), reduction="sum")
        return float(here[0]), float(here[1])

    def held_losses(self) -> Iterator[tuple[float, int]]:
        """Of each batch of this process the sum over its answer tokens, and their number."""
        model = self.wrapped if self.deepspeed else self.model
        for group in self.share(self.held):
            items = [self.dataset.encode(conversation) for conversation, _ in group]
            for item, (_, counts) in zip(items, group, strict=True):
                item["labels"] = item["labels"] if counts else [-100] * len(item["labels"])
            batch = self.to_device(self.collate(items))
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            loss = model(**batch, use_cache=False).loss
            yield (loss.item() * tokens if tokens else 0.0), tokens

    def _verdicts(self, judged: list[Conversation]) -> Iterator[tuple[int, int]]:
        """Of each batch how many verdicts are right, and how many there are."""
        for group in self.share(judged):
            prompts = [self.dataset.verdict_prompt(c) for c, _ in group]
            shown = [self.dataset.shown(c) for c, _ in group]
            generated = self.explainer.generate(
                **self.to_device(dict(self.processor(prompts, shown))),
                do_sample=False,
                max_new_tokens=self.options.data.answer_tokens,
                synced_gpus=self.accelerator.num_processes > 1 and self.deepspeed,
            )
            texts = [decode(self.processor.tokenizer, row.tolist()) for row in generated]
            right = [
                counts and parse_verdict(text) == ("real", "fake")[c.label or 0]
                for text, (c, counts) in zip(texts, group, strict=True)
            ]
            yield sum(right), sum(counts for _, counts in group)
