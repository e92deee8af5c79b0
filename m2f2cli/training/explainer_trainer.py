"""The Hugging Face Trainer for stages 2 and 3: frozen parts, measuring, states, DeepSpeed.

A step's loss is the mean over all answer tokens of the step, whatever the number of processes and
batches it is dealt out to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from m2f2cli.checkpoints.io import check_names_and_shapes
from m2f2cli.data.conversations import Conversation
from m2f2cli.data.judgement import parse
from m2f2cli.errors import InputError, M2F2Error
from m2f2cli.models.tokenizer import decode
from m2f2cli.options.train_explainer import LoraStepOptions, StepOptions
from m2f2cli.training.callbacks import Reporter
from m2f2cli.training.epochs import BatchSampler, Steps
from m2f2cli.training.explainer_data import Exercises, encode, judged_prompt, shares
from m2f2cli.training.explainer_parts import (
    PROJECTORS,
    explainer_of,
    optimiser_groups,
    trained,
)
from m2f2cli.training.states import StatefulTrainer


class ExplainerTrainer(StatefulTrainer):
    """A Trainer for an explainer with most of it frozen.

    Args:
        model: What trains; see ``explainer_parts``.
        arguments: The Trainer's settings.
        exercises: What to learn from.
        held: What to measure on after each epoch.
        options: Learning rates, weight decay, batches.
        answer_tokens: Longest answer generated in measuring.
    """

    control: TrainerControl
    optimizer: Any

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        *,
        exercises: Exercises,
        held: list[Conversation],
        options: StepOptions,
        answer_tokens: int,
    ) -> None:
        self.options = options
        self.exercises = exercises
        self.held = held
        self.answer_tokens = answer_tokens
        self.explainer = explainer_of(model)
        steps = Steps(
            len(exercises),
            options.batch_size,
            options.gradient_accumulation_steps,
            arguments.world_size,
        )
        self.sampler = BatchSampler(steps, arguments.process_index)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=exercises.processor.collate,
            train_dataset=exercises,
            eval_dataset=held or None,
        )
        self.remove_callback(PrinterCallback)

    def train_from(self, saved: Path | None) -> None:
        """Train from the start or from a saved state.

        Raises:
            InputError: A picture cannot be read any more.
        """
        try:
            self.train(resume_from_checkpoint=str(saved) if saved is not None else None)
        except InputError as error:  # a worker's has its whole traceback for a message
            message = error.message.rpartition(f"{InputError.__name__}: ")[2].strip()
            hint = "Mend the file and give the same command with --resume."
            raise InputError(message, error.status, hint) from error

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **named: Any
    ) -> Any:
        """The loss; the detector's BatchNorm and dropout stay as they are when it is asked.

        Projectors that no picture of the batch reaches get a zero gradient, which several
        processes need in order to agree.
        """
        self.explainer.detector.eval()
        found = super().compute_loss(model, inputs | {"use_cache": False}, *arguments, **named)
        loss, *rest = found if isinstance(found, tuple) else (found,)
        ids = self.explainer.config
        for token, part in zip(
            (ids.image_token_id, ids.deepfake_token_id), PROJECTORS, strict=True
        ):
            if not bool((inputs["input_ids"] == token).any()):
                for weight in getattr(self.explainer, part).parameters():
                    loss = loss + 0 * weight.sum() if weight.requires_grad else loss
        return (loss, *rest) if rest else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over exactly what trains."""
        if self.optimizer is None:
            own = self.options.projector_lr if isinstance(self.options, LoraStepOptions) else None
            groups = optimiser_groups(
                self.model,
                rate=self.options.learning_rate,
                projector_rate=own,
                decay=self.options.weight_decay,
            )
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        return self.optimizer

    def tensors_to_save(self) -> dict[str, torch.Tensor]:
        """What trains, whole and in float32; to be called in every process."""
        if not self.is_deepspeed_enabled:
            return {name: weight.detach() for name, weight in trained(self.model)}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(weight) for name, weight in trained(self.model)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what ``tensors_to_save`` gave."""
        weights = dict(trained(self.model))
        check_names_and_shapes(tensors, weights, what="The saved state")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(tensors[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what trains; DeepSpeed saves its own, with the optimiser."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, saved: Any) -> Any:
        """Leave what is frozen out of DeepSpeed's states, which it would save and want whole."""
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, saved)
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.model_wrapped
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        if saved is not None:
            engine.load_checkpoint(saved, load_module_strict=False)
            self._load_optimizer_and_scheduler(saved)
        return found

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on the held-out conversations.

        Returns:
            ``eval_loss``, nats an answer token; and where any of them holds a verdict,
            ``eval_judged_accuracy``, the share whose generated answer has the same verdict, and
            ``eval_judged``, how many. The same for any number of processes.

        Raises:
            M2F2Error: The training has diverged.
        """
        self.model.eval()
        judged = [c for c in self.held if c.label is not None]
        with torch.no_grad(), self.accelerator.autocast():
            loss, tokens = self._sums(self._losses())
            metrics = {"eval_loss": loss / max(tokens, 1)}
            if judged:
                right, asked = self._sums(self._verdicts(judged))
                metrics |= {"eval_judged_accuracy": right / asked, "eval_judged": asked}
        if not metrics["eval_loss"] < float("inf"):
            raise M2F2Error(
                "The training has diverged: the validation loss is no longer a finite number.",
                "Lower --learning-rate and begin anew with --overwrite.",
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _sums(self, pairs: Iterator[tuple[float, int]]) -> tuple[float, float]:
        """Sums over batches and processes."""
        here = torch.tensor(list(pairs), dtype=torch.float64).sum(dim=0)
        if self.args.world_size > 1:
            device = self.args.device
            here = here.float() if device.type == "mps" else here
            here = self.accelerator.reduce(here.to(device), reduction="sum")
        return float(here[0]), float(here[1])

    def _mine(self, items: list[Conversation]) -> Iterator[list[tuple[Conversation, bool]]]:
        mine = shares(items, self.args.process_index, self.args.world_size)
        for begin in range(0, len(mine), self.options.batch_size):
            yield mine[begin : begin + self.options.batch_size]

    def _losses(self) -> Iterator[tuple[float, int]]:
        """Of each batch the sum over its answer tokens, and their number."""
        asked = self.model_wrapped if self.is_deepspeed_enabled else self.model
        made = self.exercises
        for group in self._mine(self.held):
            items = [encode(c, made.processor, made.pictures, made.max_length) for c, _ in group]
            for item, (_, counts) in zip(items, group, strict=True):
                item["labels"] = item["labels"] if counts else [-100] * len(item["labels"])
            batch = self._prepare_inputs(made.processor.collate(items))
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            loss = asked(**batch, use_cache=False).loss
            yield (loss.item() * tokens if tokens else 0.0), tokens

    def _verdicts(self, judged: list[Conversation]) -> Iterator[tuple[int, int]]:
        """Of each batch how many verdicts are right, and how many were asked for."""
        processor, pictures = self.exercises.processor, self.exercises.pictures
        for group in self._mine(judged):
            prompts = [judged_prompt(c, processor) for c, _ in group]
            shown = [[pictures.pixels(c)] if c.image else [] for c, _ in group]
            batch = self._prepare_inputs(dict(processor(prompts, shown)))
            said = self.explainer.generate(
                **batch,
                do_sample=False,
                max_new_tokens=self.answer_tokens,
                synced_gpus=self.args.world_size > 1 and self.is_deepspeed_enabled,
            )
            texts = [decode(processor.tokenizer, row.tolist()) for row in said]
            words = [("real", "fake")[c.label or 0] for c, _ in group]
            right = [parse(text) == word for text, word in zip(texts, words, strict=True)]
            counts = [counted for _, counted in group]
            yield sum(a and b for a, b in zip(right, counts, strict=True)), sum(counts)


class StageReporter(Reporter):
    """Says the figures of a stage."""

    def figures(self, logs: Mapping[str, float]) -> str:
        """See the base."""
        if "eval_loss" not in logs:
            return ""
        words = f"validation loss {logs['eval_loss']:.4f}"
        if "eval_judged" in logs:
            share = logs["eval_judged_accuracy"]
            words += f", judged accuracy {share:.4f} of {logs['eval_judged']:.0f}"
        return words


def stage_figures(state: TrainerState) -> dict[str, list[dict[str, float]]]:
    """The run so far: ``epochs``, and ``steps`` where it was measured within epochs."""
    epochs, steps = epoch_figures(state), step_figures(state)
    return {"epochs": epochs} | ({"steps": steps} if steps else {})


def step_figures(state: TrainerState) -> list[dict[str, float]]:
    """What was measured within epochs, one record a measurement."""
    return [
        {"step": entry["step"], "epoch": entry["epoch"], **_measured(entry)}
        for entry in state.log_history
        if "eval_loss" in entry and _inside(state, entry)
    ]


def _inside(state: TrainerState, entry: Mapping[str, float]) -> bool:
    """Whether an entry was logged before the last step of its epoch."""
    return entry["step"] % (state.max_steps // state.num_train_epochs) != 0


def _measured(entry: Mapping[str, float]) -> dict[str, float]:
    names = {
        "eval_loss": "validation_loss",
        "eval_judged_accuracy": "judged_accuracy",
        "eval_judged": "judged",
    }
    return {name: entry[key] for key, name in names.items() if key in entry}


def epoch_figures(state: TrainerState) -> list[dict[str, float]]:
    """The run so far, one record an epoch: mean training loss, and figures where measured."""
    records: list[dict[str, float]] = []
    for entry in state.log_history:
        epoch = -int(-entry["epoch"] // 1)  # the one it is in, or has just ended
        if "eval_loss" in entry and _inside(state, entry):
            continue
        if "loss" in entry or "eval_loss" in entry:
            if not records or records[-1]["epoch"] != epoch:
                records.append({"epoch": epoch, "begin": records[-1]["step"] if records else 0})
            record = records[-1]
        if "loss" in entry:
            before = record.get("step", record["begin"])
            steps = entry["step"] - before
            total = record.get("loss", 0.0) * (before - record["begin"]) + entry["loss"] * steps
            record["step"] = entry["step"]
            record["loss"] = total / max(entry["step"] - record["begin"], 1)
            record["learning_rate"] = entry["learning_rate"]
        elif "eval_loss" in entry:
            record |= _measured(entry)
    return [{k: v for k, v in record.items() if k != "begin"} for record in records]
