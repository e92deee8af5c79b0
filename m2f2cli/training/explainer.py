"""Stages 2 and 3: train parts of an explainer on conversations, and write them as a delta."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from m2f2cli.checkpoints.adapters import write_delta
from m2f2cli.checkpoints.io import check_names_and_shapes
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.conversations import Conversation, Pictures, parse_verdict
from m2f2cli.data.transforms import explainer_views
from m2f2cli.environment import library_versions
from m2f2cli.errors import ConfigError, M2F2Error
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.train_explainer import (
    INCIDENTAL,
    AlignOptions,
    LoraOptions,
    LoraStepOptions,
    QuantizedOptions,
    StageOptions,
    StepOptions,
    adapter_of,
)
from m2f2cli.runtime import process_count, seed_everything
from m2f2cli.training.accelerator import (
    fill_deepspeed,
    load_device,
    make_accelerator,
    pick_precision,
    pick_tracker,
    read_deepspeed,
)
from m2f2cli.training.epochs import Steps
from m2f2cli.training.explainer_data import (
    Exercises,
    Usable,
    encode,
    judged_prompt,
    read_usable,
)
from m2f2cli.training.explainer_parts import (
    PROJECTORS,
    explainer_of,
    hide_scalars,
    optimiser_groups,
    prepare_align,
    prepare_lora,
    save_memory,
    trained,
)
from m2f2cli.training.states import PROCESSES, check_output, finished, state_folder
from m2f2cli.training.trainer import (
    Advance,
    Batch,
    Finished,
    Notify,
    Trainer,
    epoch_records,
    measured,
    shares,
)


def align(
    options: AlignOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train an explainer's forgery projector (stage 2) and write it as a delta folder.

    Args:
        options: Everything about the run.
        advance: Called after each step with the steps done and words for beside a progress bar.
        notify: Called with lines for people.

    Returns:
        The folder.

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
    if finished(options, INCIDENTAL):
        return Finished(run.output, notify)
    check_output(options, INCIDENTAL)
    precision = pick_precision(options.model.precision, run.device)
    pick_tracker(run.report_to)
    deepspeed = read_deepspeed(run.deepspeed)
    model, adapter, home = _what_trains(options)
    explainer = explainer_of(model)
    processor = ExplainerProcessor.from_folder(home, explainer.config, explainer_views)
    pictures = Pictures(data.images)
    usable = read_usable(data, processor, pictures)
    exercises = Exercises(
        usable,
        processor,
        pictures,
        max_length=data.max_length,
        seed=run.seed,
        group=steps.batch_size
        * steps.gradient_accumulation_steps
        * process_count()
        * data.group_by_length,
    )
    plan = Steps(
        len(exercises), steps.batch_size, steps.gradient_accumulation_steps, process_count()
    )
    if len(plan) * steps.epochs == 1 and steps.warmup_ratio:
        raise ConfigError(
            "The run has a single step, and warm-up begins at a learning rate of zero: nothing "
            "would be learnt.",
            "Lower --batch-size, raise --epochs, or add --warmup-ratio 0.",
        )
    record = {
        "stage": "align" if isinstance(options, AlignOptions) else "lora",
        "parent": explainer.fingerprint,
        "options": options.to_flat(),
        "data": {
            "conversations": data.data.name,
            "sha256": hashlib.sha256(data.data.read_bytes()).hexdigest(),
            **usable.counts,
            "missing_pictures": sorted(usable.missing),
        },
        "trained_values": sum(weight.numel() for _, weight in trained(model)),
        PROCESSES: process_count(),
        "versions": library_versions()
        | library_versions("deepspeed")
        | {"cuda": torch.version.cuda or "none"},
    }
    width = explainer.config.text_config.hidden_size
    accelerator = make_accelerator(
        run,
        state_folder(run.output),
        precision=precision,
        deepspeed=fill_deepspeed(deepspeed, steps=steps, precision=precision, width=width),
    )
    notify(_summary(record, usable))
    return ExplainerTrainer(
        model,
        adapter=adapter,
        exercises=exercises,
        held=usable.held,
        options=options,
        accelerator=accelerator,
        record=record,
        notify=notify,
    )


class ExplainerTrainer(Trainer):
    """Trains an explainer with most of it frozen.

    A step's loss is the mean over all answer tokens of the step, whatever the number of processes
    and batches it is dealt out to.

    Args:
        model: What trains; see ``explainer_parts``.
        adapter: ``adapter_config.json`` of stage 3.
        exercises: What to learn from.
        held: What to measure on after each epoch.
        **shared: What else ``Trainer`` takes.
    """

    incidental = INCIDENTAL

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter: dict[str, Any] | None,
        exercises: Exercises,
        held: list[Conversation],
        **shared: Any,
    ) -> None:
        self.adapter = adapter
        self.exercises = exercises
        self.held = held
        self.explainer = explainer_of(model)
        super().__init__(model, dataset=exercises, **shared)
        self.collate = exercises.processor.collate
        self.eval_steps = self.options.data.eval_steps
        self.measures = bool(held)

    @property
    def optim(self) -> StepOptions:
        """The options that say how the weights move."""
        found: StepOptions = self.options.optimizer
        return found

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over exactly what trains."""
        own = self.optim.projector_lr if isinstance(self.optim, LoraStepOptions) else None
        groups = optimiser_groups(
            self.model,
            rate=self.optim.learning_rate,
            projector_rate=own,
            decay=self.optim.weight_decay,
        )
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
                right, asked = self._sums(self._verdicts(judged))
                figures |= {"judged_accuracy": right / asked, "judged": asked}
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
        each = self.steps_per_epoch
        metrics: dict[str, Any] = {"epochs": epoch_records(self.history, each)}
        inside = [
            {"step": entry["step"], "epoch": entry["epoch"], **measured(entry)}
            for entry in self.history
            if "eval_loss" in entry and entry["step"] % each
        ]
        write_delta(
            self.options.run.output,
            tensors={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            stage=self.record | {"metrics": metrics | ({"steps": inside} if inside else {})},
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

    def _mine(self, items: list[Conversation]) -> Iterator[list[tuple[Conversation, bool]]]:
        """This process's share, in batches; see ``shares``."""
        mine = shares(items, self.accelerator.process_index, self.accelerator.num_processes)
        for begin in range(0, len(mine), self.optim.batch_size):
            yield mine[begin : begin + self.optim.batch_size]

    def held_losses(self) -> Iterator[tuple[float, int]]:
        """Of each batch of this process the sum over its answer tokens, and their number."""
        asked = self.wrapped if self.deepspeed else self.model
        made = self.exercises
        for group in self._mine(self.held):
            items = [encode(c, made.processor, made.pictures, made.max_length) for c, _ in group]
            for item, (_, counts) in zip(items, group, strict=True):
                item["labels"] = item["labels"] if counts else [-100] * len(item["labels"])
            batch = self.to_device(made.processor.collate(items))
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            loss = asked(**batch, use_cache=False).loss
            yield (loss.item() * tokens if tokens else 0.0), tokens

    def _verdicts(self, judged: list[Conversation]) -> Iterator[tuple[int, int]]:
        """Of each batch how many verdicts are right, and how many were asked for."""
        processor, pictures = self.exercises.processor, self.exercises.pictures
        for group in self._mine(judged):
            prompts = [judged_prompt(c, processor) for c, _ in group]
            shown = [[pictures.pixels(c)] if c.image else [] for c, _ in group]
            said = self.explainer.generate(
                **self.to_device(dict(processor(prompts, shown))),
                do_sample=False,
                max_new_tokens=self.options.data.answer_tokens,
                synced_gpus=self.accelerator.num_processes > 1 and self.deepspeed,
            )
            texts = [decode(processor.tokenizer, row.tolist()) for row in said]
            words = [("real", "fake")[c.label or 0] for c, _ in group]
            right = [parse_verdict(text) == word for text, word in zip(texts, words, strict=True)]
            counts = [counted for _, counted in group]
            yield sum(a and b for a, b in zip(right, counts, strict=True)), sum(counts)


def _what_trains(options: StageOptions) -> tuple[Any, dict[str, Any] | None, Path]:
    """The explainer with what trains in it, ``adapter_config.json``, and where it was read."""
    unset_hf_deepspeed_config()  # of an earlier run, which would have the model read in shards
    held_in = options.model.quantize if isinstance(options.model, QuantizedOptions) else "none"
    explainer, home = load_explainer(
        options.model.model,
        device=load_device(options.run),
        dtype=pick_precision(options.model.precision, options.run.device),
        quantize=None if held_in == "none" else held_in,
        attention=options.model.attn_implementation,
    )
    seed_everything(options.run.seed)
    updates = adapter_of(options)
    model: Any = explainer
    adapter = None
    if updates is None:
        prepare_align(explainer)
    else:
        model, adapter = prepare_lora(explainer, updates)
    if options.run.deepspeed:
        hide_scalars(explainer)
    if options.model.gradient_checkpointing:
        save_memory(explainer)
    return model, adapter, home


def _summary(record: Mapping[str, Any], usable: Usable) -> str:
    counts = usable.counts
    lines = [f"left out, its picture cannot be had: {why}" for why in usable.missing.values()]
    lines.append(
        f"conversations: {counts['train']} to learn from, {counts['validation']} held out; left "
        f"out of {counts['read']}: {counts['too_long']} too long, {counts['missing']} without "
        "their picture"
    )
    lines.append(f"trains: {record['trained_values']:,} values")
    return "\n".join(lines)
