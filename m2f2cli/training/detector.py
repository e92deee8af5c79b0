"""Stage 1: train a detector from labelled pictures to a checkpoint folder.

``prepare`` puts data, network, objective and trainer together; ``DetectorTrainer`` says what is
particular to detectors about the loop of ``trainer``; ``build_detector`` makes the network that
training starts from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import m2f2cli.models  # noqa: F401 - makes torchvision importable, which transformers asks for

# isort: split
import numpy as np
import torch
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Subset, default_collate
from transformers.utils import logging as transformers_logging

from m2f2cli.checkpoints import io
from m2f2cli.checkpoints.io import check_names_and_shapes, open_weight_file
from m2f2cli.checkpoints.keymaps import to_timm
from m2f2cli.checkpoints.load import load_detector
from m2f2cli.data.readers.ddvqa import FLAWS, REGIONS
from m2f2cli.data.video import evenly
from m2f2cli.errors import CheckpointError, ConfigError, M2F2Error
from m2f2cli.files import json_bytes
from m2f2cli.metrics import average_precision, roc_auc
from m2f2cli.models.backbone import Backbone, check_backbone
from m2f2cli.models.clip import blocks_needed, load_clip
from m2f2cli.models.detector import CLIP_MEAN, CLIP_STD, Detector, DetectorConfig
from m2f2cli.models.domain import Domain
from m2f2cli.options.train_detector import ModelOptions, TrainDetectorOptions
from m2f2cli.runtime import seed_everything
from m2f2cli.training.head import collect, fit_head
from m2f2cli.training.objective import Objective
from m2f2cli.training.pictures import (
    PictureCollator,
    PictureStore,
    TrainingPictures,
    ValidationPictures,
    read_targets,
)
from m2f2cli.training.sources import read_sources
from m2f2cli.training.states import check_output, finished, state_folder
from m2f2cli.training.trainer import (
    WEIGHTS,
    Advance,
    Batch,
    Finished,
    Notify,
    Trainer,
    make_accelerator,
    pick_precision,
    pick_tracker,
    run_record,
)

STAGE = "train-detector"
_BETTER_IS_LARGER = {"auc": True, "ap": True, "loss": False, "last": True}
# Of each set: more pictures add minutes, not knowledge.
_DOMAIN_PICTURES = 2048
NORMALIZATIONS = {
    "clip": (CLIP_MEAN, CLIP_STD),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# The published bridge reads CLIP layers 6, 10 and 14 of the 23 that run, 64 wide, into 128.
_BRIDGE_DEPTHS = (6 / 23, 10 / 23, 14 / 23)
_BRIDGE = {"width": 64, "heads": 4, "size": 128}


def train_detector(
    options: TrainDetectorOptions, *, advance: Advance | None = None, notify: Notify | None = None
) -> Path:
    """Train a detector; write and return its folder, of the epoch that did best when measured.

    ``advance`` is called after each step with the steps done and text to show beside a progress
    bar, ``notify`` with messages for the user.

    Raises:
        ConfigError: Options do not go together, or not with those of the state to resume.
        InputError: The data is missing, unreadable, lacks a class or cannot be split.
        CheckpointError: A starting weight does not fit, or the output exists.
        M2F2Error: The training has diverged.
    """
    return prepare(options, notify=notify).run(advance=advance)


def prepare(
    options: TrainDetectorOptions, *, notify: Notify | None = None
) -> DetectorTrainer | Finished:
    """Read the data, build the model and check everything a run needs, training nothing yet.

    Args and errors are those of ``train_detector``.
    """
    notify = notify or (lambda _: None)
    run, data = options.run, options.data
    if finished(options):
        return Finished(run.output, notify)
    check_output(options)
    precision = pick_precision(run.precision, run.device)
    pick_tracker(run.report_to)
    left_out: list[str] = []
    parts = read_sources(data, seed=run.seed, notify=left_out.append)
    skip = data.unreadable == "skip"
    train, held = stores = [PictureStore(p, data.cache, skip=skip, notify=notify) for p in parts]
    left_out += [name for store in stores for name in store.skipped]
    for name in left_out:
        notify(f"left out, missing or unreadable: {name}")
    seed_everything(run.seed)
    detector = build_detector(options.model, data.crop_margin, parts[0].kinds())
    targets = read_targets(options, detector, parts[0])
    objective = Objective(detector, options, len(targets.kinds), len(REGIONS) + len(FLAWS))
    pictures = TrainingPictures(train, options, detector.config, targets)
    measured = ValidationPictures(held, data.validation_frames, detector.config)
    counts: dict[str, Any] = {
        name: {
            "fingerprint": part.fingerprint(),
            **store.samples.counts(),
            "videos": sum(sample.clip is not None for sample in store.samples.samples),
            "items": items,
        }
        for name, part, store, items in zip(
            ("train", "validation"), parts, stores, (len(pictures), len(measured)), strict=True
        )
    }
    record = run_record(
        STAGE,
        options,
        parent=detector.fingerprint,
        data=counts | {"unreadable": left_out},
        trained_values=objective.trained_values(),
    )
    notify(_summary(record))
    return DetectorTrainer(
        objective,
        dataset=pictures,
        measured=measured,
        familiar=ValidationPictures(train, 1, detector.config),
        options=options,
        accelerator=make_accelerator(run, precision),
        record=record,
        notify=notify,
    )


def _summary(record: Mapping[str, Any]) -> str:
    parts = []
    for word in ("train", "validation"):
        counts = {k: n for k, n in record["data"][word].items() if isinstance(n, int)}
        people, videos, items = (counts.pop(key) for key in ("identities", "videos", "items"))
        total = sum(counts.values())
        nouns = [f"{total - videos} pictures"] if total > videos else []
        nouns += [f"{videos} videos"] if videos else []
        each = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        often = f", {items} an epoch" if items != total else ""
        parts.append(f"{word}: {' and '.join(nouns)} of {people} identities ({each}){often}")
    values = ", ".join(f"{group} {n:,}" for group, n in record["trained_values"].items())
    return "\n".join((*parts, f"trains: {values}"))


class DetectorTrainer(Trainer):
    """Trains an ``Objective`` and writes the detector of its best epoch, with a domain check."""

    def __init__(
        self,
        objective: Objective,
        *,
        measured: ValidationPictures,
        familiar: ValidationPictures,
        **shared: Any,
    ) -> None:
        self.measured = measured
        self.familiar = familiar
        super().__init__(objective, **shared)
        options = self.options
        self.collate = PictureCollator(options.objective.mixup, options.run.seed, self.sampler)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Adam or AdamW over the stage's groups; every trainable parameter exactly once."""
        groups = self.model.optimizer_groups()
        covered = sum(len(group["params"]) for group in groups)
        trainable = sum(p.requires_grad for p in self.model.parameters())
        if covered != trainable:
            raise LookupError(f"{covered} of {trainable} trainable parameters are in a group.")
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optim.optimizer]
        return kind(groups, betas=(0.9, self.optim.beta2))

    def begin(self) -> None:
        """Fit the head, where the options say so, and say how long the training will take."""
        took = self._time_of_an_item()
        items = len(self.dataset)
        # A backward pass costs twice its forward pass.
        seconds = self.optim.epochs * (3 * items + len(self.measured)) * took
        if self.options.objective.fit_head:
            self.notify(f"Fitting the head to fixed features of {items} pictures.")
            unmixed = PictureCollator(0.0, self.options.run.seed, self.sampler)
            loader = DataLoader(self.dataset, self.optim.batch_size, collate_fn=unmixed)
            ridge = fit_head(
                self.model.detector,
                (self.to_device(batch) for batch in loader),
                self._plain_batches(self.measured, len(self.measured)),
            )
            self.notify(f"The head is fitted (ridge {ridge:g}): {self.describe(self.evaluate())}.")
        self.notify(f"{self.steps} steps will take about {math.ceil(seconds / 60)} min.")

    def _plain_batches(self, pictures: ValidationPictures, most: int) -> Iterator[Batch]:
        """Up to ``most`` pictures, evenly spread, as the detector will see them."""
        chosen = Subset(pictures, evenly(len(pictures), most))
        return (self.to_device(batch) for batch in DataLoader(chosen, self.optim.batch_size))

    def _time_of_an_item(self) -> float:
        """Seconds that preparing and judging a held-out picture take, all processes together."""
        count = min(self.optim.batch_size, len(self.measured))
        self.model.eval()
        took = 0.0
        for _ in range(2):  # the first pass allocates
            began = time.perf_counter()
            batch = self.to_device(default_collate([self.measured[n] for n in range(count)]))
            with torch.no_grad():
                float(self.model(batch["pixel_values"], batch["labels"])["loss"])
            took = time.perf_counter() - began
        return took / count / self.accelerator.num_processes

    def build_scheduler(self) -> Any:
        """The published plateau rule on the validation loss, or as in the base."""
        if self.optim.schedule != "plateau":
            return super().build_scheduler()
        factor, patience = self.optim.plateau_factor, self.optim.plateau_patience
        cooldown = self.optim.plateau_cooldown
        return ReduceLROnPlateau(
            self.optimizer, factor=factor, patience=patience, cooldown=cooldown
        )

    def loss(self, batch: Batch, total: int) -> torch.Tensor:
        """The objective's loss; a batch of fewer items than its step's mean counts less."""
        loss: torch.Tensor = self.wrapped(**batch)["loss"]
        return loss / total

    def after_step(self) -> None:
        """Take the new weights into the running average, where there is one."""
        if self.model.average is not None:
            self.model.average.update(self.model.detector)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure on the held-out pictures, in all processes together; see ``measure``."""
        count = self.accelerator.num_processes
        if count > 1:  # each process has its own BatchNorm statistics; one is saved
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        loader: DataLoader[Any] = DataLoader(
            self.measured,
            batch_sampler=[[i for i, _ in b] for b in self.share(range(len(self.measured)))],
            collate_fn=self.collate,
            num_workers=self.options.data.workers,
        )
        logits = torch.cat([self.model(**self.to_device(batch))["logits"] for batch in loader])
        labels = self.measured.labels
        gathered = self.accelerator.gather(logits).double().cpu().numpy()
        # Process p has items p, p + processes, ...; repeats stand at the end.
        in_order = gathered.reshape(count, -1, 2).swapaxes(0, 1).reshape(-1, 2)[: len(labels)]
        return measure(in_order, labels)

    def after_epoch(self, figures: Mapping[str, float]) -> None:
        """Cut the learning rate on a plateau, and note whether the epoch is the best."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(figures["loss"])
        select = self.optim.select
        value = float(self.step) if select == "last" else figures[select]
        larger = _BETTER_IS_LARGER[select]
        if self.best is None or (value > self.best[1] if larger else value < self.best[1]):
            self.best = (self.step, value)

    def stopped(self) -> bool:
        """Whether the selected figure has not got better for ``early_stopping_patience`` epochs."""
        waited = (self.step - (self.best[0] if self.best else 0)) // self.steps_per_epoch
        return bool(0 < self.optim.early_stopping_patience <= waited)

    def describe(self, figures: Mapping[str, float]) -> str:
        """The figures in words."""
        return (
            f"validation loss {figures['loss']:.4f}, "
            f"AUC {figures['auc']:.4f}, AP {figures['ap']:.4f}"
        )

    @torch.no_grad()
    def finished_detector(self) -> Detector:
        """The detector as it is to be kept, with its domain check.

        The check learns from the features of up to 2,048 training pictures, evenly spread; the
        share ``data.domain_quantile`` of as many held-out ones lies inside. No check for 0.
        """
        detector = Detector(DetectorConfig.from_dict(self.model.detector.config.to_dict()))
        detector.load_state_dict(self.model.result())
        detector.to(self.accelerator.device).eval()
        quantile = self.options.data.domain_quantile
        if not quantile:
            return detector.cpu()

        def features(pictures: ValidationPictures) -> torch.Tensor:
            return collect(detector, self._plain_batches(pictures, _DOMAIN_PICTURES))["features"]

        detector.domain = Domain.fit(features(self.familiar))
        limit = detector.domain(features(self.measured)).quantile(quantile)
        detector.config.domain = {"limit": float(limit), "size": len(detector.domain.basis)}
        return detector.cpu()

    def write(self) -> None:
        """Write the detector of the best epoch."""
        if not self.accelerator.is_main_process:
            return
        run, best = self.options.run, self.best[0] if self.best else self.step
        self.restore(load_file(state_folder(run.output) / f"checkpoint-{best}" / WEIGHTS))
        epochs = self.epoch_records()
        chosen = next(record for record in epochs if record["step"] == best)
        metrics: dict[str, Any] = {"selected": chosen, "epochs": epochs}
        if epochs[-1]["epoch"] < self.optim.epochs:
            metrics["stopped_after"] = epochs[-1]["epoch"]
            self.notify(
                f"Stopped after epoch {epochs[-1]['epoch']}: no better "
                f"{self.optim.select} for {self.optim.early_stopping_patience} epochs."
            )
        detector = self.finished_detector()
        config, kind = detector.config, getattr(torch, run.save_dtype)
        processor = io.preprocessor_config(config.image_size, config.image_mean, config.image_std)
        written = {"architectures": ["Detector"], "dtype": run.save_dtype}
        io.write_checkpoint(
            run.output,
            config=config.to_dict() | written,
            tensors={
                name: tensor.to(kind) if tensor.is_floating_point() else tensor
                for name, tensor in detector.state_dict().items()
            },
            stage=self.record | {"metrics": metrics},
            extra_files={"preprocessor_config.json": json_bytes(processor)},
            overwrite=run.overwrite,
        )
        self.notify(
            f"Kept epoch {chosen['epoch']}: AUC {chosen['auc']:.4f}, AP {chosen['ap']:.4f}, "
            f"validation loss {chosen['validation_loss']:.4f}."
        )


def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Validation figures of logits (N, 2): ``loss`` in nats, ``auc``, ``ap``, ``accuracy`` at 0.5.

    Raises:
        M2F2Error: The training has diverged.
    """
    if not np.isfinite(logits).all():
        raise M2F2Error(
            "The training has diverged: the detector's answers are no longer finite numbers.",
            "Lower --learning-rate or set --max-grad-norm 1, and begin anew with --overwrite.",
        )
    margin = logits[:, 1] - logits[:, 0]
    return {
        "loss": float(np.logaddexp(0.0, np.where(labels == 1, -margin, margin)).mean()),
        "auc": roc_auc(labels, margin),
        "ap": average_precision(labels, margin),
        "accuracy": float(((margin > 0) == labels).mean()),
    }


def build_detector(
    options: ModelOptions, crop_margin: float, kinds: Sequence[str] = ()
) -> Detector:
    """Build the detector that training starts from, in float32 on the CPU.

    It stores the margin of the face crops it will see, and has neither a domain check nor a
    ``kind_margin``: those describe another training. ``kinds`` are those of forgery in the data.

    Raises:
        CheckpointError: A weights file, CLIP folder or starting detector is missing or does not
            fit.
        ConfigError: An architecture is unknown or sizes do not go together.
    """
    if options.model:
        return _from_detector(options.model, crop_margin)
    transformers_logging.disable_progress_bar()
    if options.backbone != "none":
        check_backbone(options.backbone, options.image_size)
    try:
        spec, clip_tensors = load_clip(options.clip)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The CLIP tower '{options.clip}' cannot be loaded: {type(error).__name__}.",
            "Check the name and the connection, or give a folder: --clip DIR.",
        ) from error
    if options.image_size:
        spec, clip_tensors = resize_clip(spec, clip_tensors, options.image_size)
    mean, std = NORMALIZATIONS[options.normalization]
    vision = spec["vision"]
    total = vision["num_hidden_layers" if spec["library"] == "transformers" else "layers"]
    bridge: dict[str, Any] | None = None
    if options.bridge:
        blocks = blocks_needed(total, options.vision_layer)
        bridge = _BRIDGE | {"clip_layers": [max(1, round(d * blocks)) for d in _BRIDGE_DEPTHS]}
    config = DetectorConfig(
        backbone=None if options.backbone == "none" else options.backbone,
        clip=spec,
        hidden_size=options.hidden_size,
        prompt_tokens=options.prompt_tokens,
        vision_layer=options.vision_layer,
        clip_blocks=options.clip_blocks,
        forgery_map=options.forgery_map,
        head_normalize=options.head_normalize,
        head_hidden=options.head_hidden,
        kinds=kinds if options.kind_logits else None,
        bridge=bridge,
        image_size=vision["image_size"],
        image_mean=list(mean),
        image_std=list(std),
        crop={"detector": "dlib", "margin": crop_margin},
    )
    detector = Detector(config)
    wanted = detector.clip.state_dict()
    kept = {key: clip_tensors[key] for key in wanted if key in clip_tensors}  # blocks that run
    check_names_and_shapes(kept, wanted, what=f"The CLIP tower '{options.clip}'")
    detector.clip.load_state_dict(kept)
    if detector.backbone is not None:
        load_backbone(detector.backbone, options.backbone, options.backbone_weights)
    return detector


def _from_detector(name: str, crop_margin: float) -> Detector:
    parent = load_detector(name, device="cpu", dtype="float32")
    crop = {**parent.config.crop, "margin": crop_margin}
    fresh = DetectorConfig()
    calibrated = ("domain", "kind_margin", "score_temperature", "threshold", "uncertain")
    changed = {name: getattr(fresh, name) for name in calibrated} | {"crop": crop}
    detector = Detector(DetectorConfig.from_dict(parent.config.to_dict() | changed))
    kept = detector.state_dict().keys()  # all but the domain check
    detector.load_state_dict({name: parent.state_dict()[name] for name in kept})
    detector.fingerprint = parent.fingerprint
    return detector


def load_backbone(backbone: Backbone, name: str, source: str) -> None:
    """Give a backbone, by its timm name, its starting weights, all but the classifier, strictly.

    ``source`` is ``none``, ``pretrained`` (timm's own) or a weights file.

    Raises:
        CheckpointError: The file is missing or does not fit, or timm's weights cannot be loaded.
    """
    import timm

    if source == "none":
        return
    net = backbone.net
    if source == "pretrained":
        try:
            loaded = timm.create_model(name, pretrained=True, num_classes=0, global_pool="")
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The pre-trained weights of '{name}' cannot be loaded: {type(error).__name__}.",
                "Give --backbone-weights FILE, or none to start at random.",
            ) from error
        net.load_state_dict(loaded.state_dict())
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise CheckpointError(
            f"There is no backbone weights file '{path}'.", "Check --backbone-weights."
        )
    classifier = net.default_cfg.get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wanted = net.state_dict()
    stored = to_timm(open_weight_file(path).tensors, list(wanted), classifier)
    counters = {k: t for k, t in wanted.items() if k.endswith("num_batches_tracked")}
    tensors = counters | {key: tensor.load() for key, tensor in stored.items()}
    check_names_and_shapes(tensors, wanted, what=f"'{path}'")
    net.load_state_dict(tensors)


def resize_clip(
    spec: dict[str, Any], tensors: dict[str, torch.Tensor], image_size: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Fit a CLIP vision part to another picture size by resampling its position embeddings.

    ``spec`` and ``tensors`` are as ``models.clip.load_clip`` gives them.

    Raises:
        ConfigError: The size is no multiple of the patch size.
    """
    vision = spec["vision"]
    patch = vision["patch_size"]
    if image_size == vision["image_size"]:
        return spec, tensors
    if image_size % patch:
        raise ConfigError(
            f"--image-size {image_size} is no multiple of the CLIP tower's patch size {patch}.",
            f"Use --image-size {max(1, round(image_size / patch)) * patch}.",
        )
    key = (
        "vision.embeddings.position_embedding.weight"
        if spec["library"] == "transformers"
        else "vision.visual.positional_embedding"
    )
    old, new = vision["image_size"] // patch, image_size // patch
    resized = resample_abs_pos_embed(tensors[key][None], [new, new], [old, old])[0]
    return {**spec, "vision": {**vision, "image_size": image_size}}, {**tensors, key: resized}
