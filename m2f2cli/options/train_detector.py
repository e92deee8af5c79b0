"""The options of ``m2f2 train-detector``, in groups; ``config`` checks and spells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import Options, flag_name, option, required
from m2f2cli.options.recipes import read_recipe
from m2f2cli.options.training_data import DataOptions
from m2f2cli.options.training_pictures import AugmentOptions, PseudoFakeOptions


@dataclass(frozen=True)
class ModelOptions(Options):
    """What the detector is made of and what of it trains."""

    model: str | None = option(
        None,
        "Start from this detector (folder or 'lite') instead of building a new one.",
    )
    backbone: str = option(
        "densenet121",
        "CNN backbone by its timm name (published: densenet121, efficientnet_b4), or none.",
    )
    backbone_weights: str = option(
        "pretrained",
        "Weights the backbone starts from: a .pth or .safetensors file, 'pretrained' (timm's, "
        "downloaded once) or 'none' (random).",
        key=True,
    )
    clip: str = option(
        "openai/clip-vit-large-patch14-336",
        "CLIP tower: a folder or Hub id with a transformers CLIPModel (or its vision part alone), "
        "or openclip:NAME/PRETRAINED.",
    )
    clip_lora: int = option(
        0,
        "Rank of LoRA in the CLIP tower's query and value layers, folded into the result; 0 none.",
        low=0,
        key=True,
    )
    clip_blocks: tuple[int, ...] = option(
        (),
        "CLIP blocks, from 1, whose class token and patch mean the head reads; none as published.",
        key=True,
    )
    hidden_size: int = option(
        1024, "Width that CLIP, prompt and backbone features are projected to.", low=1, key=True
    )
    prompt_tokens: int = option(7, "Learnable tokens of the forgery prompt.", low=1, key=True)
    vision_layer: int = option(
        -2, "CLIP hidden state that is read; negative counts from the last.", key=True
    )
    forgery_map: bool = option(True, "Build the forgery prompt and its map.", key=True)
    head_normalize: bool = option(
        False, "Divide the head's input by its L2 norm (GenD: true).", key=True
    )
    head_hidden: int | None = option(
        None, "Width of a hidden layer in the head; none as published.", low=1, key=True
    )
    kind_logits: bool = option(
        False,
        "Give each kind of forgery (manipulation, or sub-folder of fake/) a logit of its own; the "
        "largest is the fake logit.",
        key=True,
    )
    bridge: bool = option(
        False, "Build the paper's bridge between backbone and CLIP layers.", key=True
    )
    image_size: int | None = option(
        None, "Edge of the network's input in pixels; CLIP's own if unset.", low=8
    )
    normalization: str = option(
        "clip", "Mean and deviation of the input.", "clip", "imagenet", "half", key=True
    )
    train: str = option(
        "published",
        "What trains: published (all but CLIP), head (projections, bridge, prompt, alphas, head), "
        "norms (as head, and the LayerNorms of CLIP's vision part), prompt (prompt tokens and "
        "alphas), everything (CLIP too).",
        *("published", "head", "norms", "prompt", "everything"),
    )
    freeze_stages: int = option(
        0,
        "Leave the stem and this many first stages of the backbone as they are; 0 none.",
        low=0,
        key=True,
    )
    freeze_batch_norm: bool = option(
        False, "Keep the BatchNorm statistics of the backbone as they are.", key=True
    )

    def check(self) -> None:
        """A start from a detector brings its own shape."""
        own = ("model", "train", "clip_lora", "freeze_stages", "freeze_batch_norm")
        for item in fields(ModelOptions):
            changed = getattr(self, item.name) != item.default
            if self.model and changed and item.name not in own:
                raise ConfigError(
                    f"{flag_name(item.name)} does not go with --model: the starting detector "
                    "decides its own shape.",
                    f"Leave out {flag_name(item.name)} or --model.",
                )
        if self.clip_lora and self.train in ("head", "prompt", "everything"):
            raise ConfigError(
                f"--clip-lora does not go with --train {self.train}.",
                "Use --train published or norms.",
            )


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """How the weights move."""

    epochs: int = option(200, "Passes over the data (published: 200).", low=1)
    batch_size: int = option(80, "Pictures a batch and process (published: 80).", low=1)
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients make one step together.", low=1
    )
    optimizer: str = option("adam", "Update rule (published: adam).", "adam", "adamw", key=True)
    beta2: float = option(0.999, "Decay of its second moment.", low=0.5, high=0.99999, key=True)
    learning_rate: float = option(1e-3, "Of the backbone (published: 1e-3).", low=0.0)
    layer_decay: float = option(
        1.0,
        "Factor on --learning-rate for each backbone stage away from the last; 1 is off.",
        low=0.01,
        high=1.0,
        key=True,
    )
    head_lr: float | None = option(
        None, "Of projections, bridge and head; --learning-rate if unset.", low=0.0, key=True
    )
    prompt_lr: float = option(1e-3, "Of the prompt tokens.", low=0.0, key=True)
    vision_alpha_lr: float = option(1e-3, "Of alpha_vision (published: 1e-3).", low=0.0, key=True)
    text_alpha_lr: float = option(3e-3, "Of alpha_text (published: 3e-3).", low=0.0, key=True)
    clip_lr: float = option(
        1e-5,
        "Of CLIP, where --train everything, --train norms or --clip-lora lets it move.",
        low=0.0,
        key=True,
    )
    weight_decay: float = option(1e-6, "Weight decay (published: 1e-6).", low=0.0, key=True)
    decay_all: bool = option(
        True,
        "Decay biases, norms and alphas too (published), not only matrices and filters.",
        key=True,
    )
    schedule: str = option(
        "plateau",
        "Learning rates over time: plateau (published: cut when the validation loss stalls), "
        "cosine (to zero) or constant.",
        *("plateau", "cosine", "constant"),
        key=True,
    )
    warmup_ratio: float = option(
        0.0,
        "Share of all steps over which cosine and constant rise from zero.",
        low=0,
        high=1,
        key=True,
    )
    plateau_factor: float = option(
        0.4,
        "Factor of a plateau's cut (published: 0.4).",
        low=0,
        high=0.99,
        open_low=True,
        key=True,
    )
    plateau_patience: int = option(
        6, "Epochs without a better loss before a cut (published: 6).", low=0, key=True
    )
    plateau_cooldown: int = option(
        5, "Epochs after a cut that are not counted (published: 5).", low=0, key=True
    )
    max_grad_norm: float = option(
        0.0, "Scale gradients down to this norm; 0 leaves them (published).", low=0.0, key=True
    )
    ema_decay: float = option(
        0.0,
        "Decay of a running average of the weights, which is then what is measured and kept; 0 is "
        "off, 0.98 to 0.9999 are usual.",
        low=0.0,
        high=0.999999,
    )
    select: str = option(
        "auc",
        "Validation figure that decides which epoch is kept.",
        *("auc", "ap", "loss", "last"),
        key=True,
    )
    early_stopping_patience: int = option(
        0,
        "Stop after so many epochs in a row without a better --select figure; 0 never.",
        low=0,
        key=True,
    )

    def check(self) -> None:
        """A warm-up needs a schedule that has one; an early stop a figure to watch."""
        if self.early_stopping_patience and self.select == "last":
            raise ConfigError(
                "--early-stopping-patience has no figure to watch with --select last.",
                "Use --select auc, ap or loss.",
            )
        if self.warmup_ratio and self.schedule == "plateau":
            raise ConfigError(
                "--warmup-ratio has no effect with --schedule plateau.",
                "Use --schedule cosine or constant.",
            )


@dataclass(frozen=True)
class ObjectiveOptions(Options):
    """What the weights are pulled towards."""

    balance: bool = option(
        False, "Let real and forged pictures take turns in every batch, repeating the rarer."
    )
    fit_head: bool = option(
        False,
        "Before the first step fit the head to fixed features of one epoch's pictures.",
        key=True,
    )
    pairs: bool = option(
        False,
        "Put each forged picture in a batch with a real one of the same identity, as far as there "
        "is one.",
        key=True,
    )
    alignment: float = option(
        0.0, "Weight of drawing features of one class together (GenD: 0.1).", low=0.0, key=True
    )
    uniformity: float = option(
        0.0, "Weight of spreading features over the unit sphere (GenD: 0.5).", low=0.0, key=True
    )
    label_smoothing: float = option(
        0.0, "Share of each target spread over both classes.", low=0.0, high=0.99, key=True
    )
    dropout: float = option(
        0.0, "Share of the head's inputs dropped while training.", low=0.0, high=0.95, key=True
    )
    mixup: float = option(
        0.0, "Alpha of mixup's Beta distribution; 0 is off, 0.2 is usual.", low=0.0, key=True
    )
    kind_weight: float = option(
        0.0,
        "Weight of telling the manipulations apart as a second task (names or sub-folders of fake/ "
        "give the kind). Its head is dropped after training.",
        low=0.0,
        key=True,
    )
    judgement_weight: float = option(
        0.0,
        "Weight of foretelling what --annotations say: how forged each region looks, which flaws "
        "are named. Its head is dropped after training.",
        low=0.0,
        key=True,
    )
    map_weight: float = option(
        0.0,
        "Weight of drawing the forgery map towards the blended area of pseudo-fakes, and to "
        "nothing on real pictures.",
        low=0.0,
        key=True,
    )
    soft_labels: Path | None = option(
        None,
        "JSON lines {'sample': path inside --data, 'fake_probability': p} of teachers to learn "
        "from; several lines on one picture are averaged.",
        key=True,
    )
    soft_weight: float = option(
        0.5, "Share of the target that --soft-labels decide.", low=0.0, high=1.0, key=True
    )


@dataclass(frozen=True)
class TrainingRunOptions(Options):
    """Where the result of any training goes and how the machines are used."""

    # How a run is carried out, never what comes of it: these may differ on --resume.
    incidental: ClassVar[frozenset[str]] = frozenset(
        ("output", "recipe", "workers", "cache", "save-steps", "resume", "overwrite", "report-to")
    )
    output: Path = required("Folder for the result; it must not exist yet.")
    seed: int = option(0, "Seed of every random choice but the split.", low=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    deterministic: bool = option(
        False, "Make CUDA runs repeat bit by bit, at some speed; CPU runs do anyway.", key=True
    )
    save_steps: int = option(
        0,
        "Save the state every so many steps, and after each epoch; 0 for epochs only.",
        low=0,
        key=True,
    )
    resume: bool = option(
        False, "Go on from the last saved state of this output, or begin if there is none."
    )
    overwrite: bool = option(False, "Replace an existing output and forget its saved state.")

    def check(self) -> None:
        """One may go on or begin anew, not both."""
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other.", "Give one of them.")


@dataclass(frozen=True)
class RunOptions(TrainingRunOptions):
    """Where the result goes and how the machine is used."""

    recipe: str | None = option(
        None,
        "Settings to start from, by name: fine-tune (the default with --model), generalize, "
        "published, published-efficientnet-b4, robust or small-data. Flags, environment and "
        "--config file go before them.",
        below=read_recipe,
    )
    save_dtype: str = option(
        "float32",
        "Type of the weights in the result; float16 halves the folder.",
        *("float32", "float16", "bfloat16"),
        key=True,
    )
    precision: str = option(
        "auto",
        "Arithmetic: float32, or mixed precision in bfloat16 or float16; auto is bfloat16 on CUDA "
        "and float32 elsewhere.",
        *("auto", "float32", "bfloat16", "float16"),
    )
    report_to: str = option(
        "auto",
        "Write curves for TensorBoard; auto does so where it is installed.",
        *("auto", "tensorboard", "none"),
        key=True,
    )


@dataclass(frozen=True)
class TrainDetectorOptions(Options):
    """Every option of ``m2f2 train-detector``."""

    data: DataOptions
    model: ModelOptions
    optimizer: OptimizerOptions
    objective: ObjectiveOptions
    augment: AugmentOptions
    pseudo: PseudoFakeOptions
    run: RunOptions

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainDetectorOptions:
        """As ``Options.from_flat``; a start from a detector takes ``fine-tune`` unless told."""
        if values.get("model") is not None and values.get("recipe") is None:
            values = {**values, "recipe": "fine-tune"}
        return super().from_flat(values)

    def check(self) -> None:
        """Objectives have what they learn from."""
        if self.objective.pairs and self.objective.balance:
            raise ConfigError("--pairs and --balance exclude each other.", "Give one of them.")
        if self.objective.pairs and self.optimizer.batch_size % 2:
            raise ConfigError(
                f"--pairs needs an even --batch-size, not {self.optimizer.batch_size}."
            )
        if self.objective.judgement_weight and self.data.annotations is None:
            raise ConfigError(
                "--judgement-weight needs the judgements to learn.", "Give --annotations DIR."
            )
        if self.objective.map_weight and not (self.model.forgery_map or self.model.model):
            raise ConfigError("--map-weight needs the forgery map.", "Leave out --no-forgery-map.")
