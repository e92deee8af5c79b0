"""Stages 2 and 3: train parts of an explainer on conversations, and write them as a delta."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.delta import write_delta
from m2f2cli.checkpoints.load import load_explainer
from m2f2cli.data.conversations import Pictures
from m2f2cli.data.transforms import explainer_views
from m2f2cli.errors import ConfigError
from m2f2cli.models.processing import ExplainerProcessor
from m2f2cli.options.train_explainer import (
    INCIDENTAL,
    AlignOptions,
    QuantizedOptions,
    StageOptions,
    adapter_of,
)
from m2f2cli.runtime import process_count, seed_everything
from m2f2cli.training.arguments import pick_precision
from m2f2cli.training.callbacks import Advance, Housekeeping, Notify
from m2f2cli.training.epochs import Steps
from m2f2cli.training.explainer_data import Exercises, Usable, read_usable
from m2f2cli.training.explainer_parts import (
    explainer_of,
    hide_scalars,
    prepare_align,
    prepare_lora,
    save_memory,
    trained,
)
from m2f2cli.training.explainer_settings import (
    read_whole,
    stage_arguments,
    where_to_load,
)
from m2f2cli.training.explainer_trainer import (
    ExplainerTrainer,
    StageReporter,
    stage_figures,
)
from m2f2cli.training.states import (
    PROCESSES,
    check_output,
    claim_output,
    forget_states,
    last_state,
    library_versions,
    same_options,
    state_folder,
)


def train_stage(
    options: StageOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train stage 2 (``AlignOptions``) or 3 (``LoraOptions``) and write the delta folder.

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


@dataclass
class Stage:
    """A run that is ready to start: everything read, built and checked.

    Attributes:
        options: Everything about the run.
        trainer: Holds model, conversations and settings; None where the output is finished.
        steps: Optimiser steps in all.
        record: What goes into ``stage.json`` beside the figures.
        adapter: ``adapter_config.json`` of stage 3.
        notify: Called with lines for people.
    """

    options: StageOptions
    trainer: ExplainerTrainer | None
    steps: int
    record: dict[str, Any]
    adapter: dict[str, Any] | None
    notify: Notify

    def run(self, *, advance: Advance | None = None) -> Path:
        """Train, or go on training, and write the delta folder."""
        run = self.options.run
        if self.trainer is None:
            self.notify(f"'{run.output}' is finished already; nothing to resume.")
            return run.output
        trainer = self.trainer
        state = last_state(state_folder(run.output)) if run.resume else None
        if state is not None:
            self.notify(f"Going on after step {state.name[11:]} of {self.steps}.")
        trainer.add_callback(StageReporter(advance or (lambda *_: None), self.notify))
        trainer.train_from(state)
        tensors = trainer.tensors_to_save()  # in every process: DeepSpeed gathers them
        if trainer.is_world_process_zero():
            write_delta(
                run.output,
                tensors={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                stage=self.record | {"metrics": stage_figures(trainer.state)},
                adapter=self.adapter,
                overwrite=run.overwrite,
            )
            forget_states(run.output)
        trainer.accelerator.wait_for_everyone()
        return run.output


def prepare(options: StageOptions, *, notify: Notify | None = None) -> Stage:
    """Read the data, load the explainer and check everything a run needs, training nothing yet.

    Args:
        options: Everything about the run.
        notify: Called with lines for people.

    Raises:
        As ``train_stage``.
    """
    notify = notify or (lambda _: None)
    run = options.run
    if run.resume and (run.output / "stage.json").exists():
        noted = io.read_stage(run.output).get("options", {})
        same_options(noted, options, INCIDENTAL, where=run.output)
        return Stage(options, None, 0, {}, None, notify)
    check_output(options, INCIDENTAL)
    folder = state_folder(run.output)
    arguments = stage_arguments(options, folder, measures=options.data.validation_share > 0)
    with read_whole(arguments):
        model, adapter, home = _what_trains(options)
    explainer = explainer_of(model)
    processor = ExplainerProcessor.from_folder(home, explainer.config, explainer_views)
    pictures = Pictures(options.data.images)
    usable = read_usable(options.data, processor, pictures)
    steps = options.optimizer
    exercises = Exercises(
        usable,
        processor,
        pictures,
        max_length=options.data.max_length,
        seed=run.seed,
        group=steps.batch_size
        * steps.gradient_accumulation_steps
        * process_count()
        * options.data.group_by_length,
    )
    each = len(
        Steps(len(exercises), steps.batch_size, steps.gradient_accumulation_steps, process_count())
    )
    if each * steps.epochs == 1 and steps.warmup_ratio:
        raise ConfigError(
            "The run has a single step, and warm-up begins at a learning rate of zero: nothing "
            "would be learnt.",
            "Lower --batch-size, raise --epochs, or add --warmup-ratio 0.",
        )
    trainer = ExplainerTrainer(
        model,
        arguments,
        exercises=exercises,
        held=usable.held,
        options=steps,
        answer_tokens=options.data.answer_tokens,
    )
    arguments.logging_steps = min(10, each)
    trainer.add_callback(
        Housekeeping(
            trainer.sampler,
            save_steps=run.save_steps,
            steps_per_epoch=each,
            eval_steps=options.data.eval_steps,
        )
    )
    record = {
        "stage": "align" if isinstance(options, AlignOptions) else "lora",
        "parent": explainer.fingerprint,
        "options": options.to_flat(),
        "data": _data_record(options.data.data, usable),
        "trained_values": sum(weight.numel() for _, weight in trained(model)),
        PROCESSES: process_count(),
        "versions": library_versions("peft", "deepspeed"),
    }
    claim_output(options, INCIDENTAL)
    notify(_summary(record, usable))
    return Stage(options, trainer, each * steps.epochs, record, adapter, notify)


def _what_trains(options: StageOptions) -> tuple[Any, dict[str, Any] | None, Path]:
    """The explainer with what trains in it, ``adapter_config.json``, and where it was read."""
    held_in = options.model.quantize if isinstance(options.model, QuantizedOptions) else "none"
    explainer, home = load_explainer(
        options.model.model,
        device=where_to_load(options),
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


def _data_record(file: Path, usable: Usable) -> dict[str, Any]:
    return {
        "conversations": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **usable.counts,
        "missing_pictures": sorted(usable.missing),
    }


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
