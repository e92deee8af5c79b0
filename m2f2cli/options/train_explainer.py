"""The options of ``m2f2 align`` and ``m2f2 lora``, in groups; ``config`` checks and spells them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2f2cli.errors import ConfigError
from m2f2cli.options.fields import Options, option, required
from m2f2cli.options.train_detector import TrainingRunOptions

DEEPSPEED = ("zero2", "zero3", "zero3-offload")


@dataclass(frozen=True)
class ConversationOptions(Options):
    """What to learn from."""

    data: Path = required("Conversation JSON, as 'm2f2 prepare ddvqa' writes it.", metavar="FILE")
    images: Path = required(
        "Folder of its pictures, or of the HDF5 files that names like "
        "FF++_Deepfakes_c40://000_003_17 speak of."
    )
    limit: int = option(
        0, "Use only so many conversations, evenly spaced in the file: for trials; 0 is all.", low=0
    )
    missing: str = option(
        "error",
        "A picture that is missing, unreadable or another one: error, or skip its conversations "
        "and count them.",
        "error",
        "skip",
        key=True,
    )
    max_length: int = option(
        2048, "Tokens of a conversation, the picture's included (published: 2048).", low=8, key=True
    )
    too_long: str = option(
        "skip",
        "A longer conversation: skip and count it, or error. Answers are never cut.",
        "skip",
        "error",
        key=True,
    )
    validation_share: float = option(
        0.0,
        "Share held out to measure on after each epoch, cut between identities (published: 0).",
        low=0.0,
        high=0.9,
    )
    eval_steps: int = option(
        0, "Measure on it every so many steps too; 0 for after each epoch only.", low=0, key=True
    )
    split_seed: int = option(0, "Seed that decides which identities are held out.", low=0, key=True)
    answer_tokens: int = option(
        128, "Longest answer generated when held-out conversations are judged.", low=1, key=True
    )
    group_by_length: bool = option(True, "Put conversations of like length into a batch.", key=True)
    workers: int = option(0, "Processes that read pictures; 0 reads in the training's own.", low=0)

    def check(self) -> None:
        """Measuring needs something to measure on."""
        if self.eval_steps and not self.validation_share:
            raise ConfigError(
                "--eval-steps has nothing to measure on.", "Add --validation-share 0.05."
            )


@dataclass(frozen=True)
class ExplainerOptions(Options):
    """What it starts from and how it is held in memory."""

    model: str = required(
        "The explainer to start from: a checkpoint folder or Hub id.", metavar="DIR|HUB-ID"
    )
    precision: str = option(
        "auto",
        "Arithmetic and frozen weights: float32, bfloat16 or float16, what trains being float32 "
        "anyway; auto is bfloat16 (published) on CUDA and float32 elsewhere.",
        *("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(
        True, "Save memory by computing layers twice (published)."
    )
    attn_implementation: str = option(
        "auto",
        "transformers' attention; auto is flash-attn where installed, else torch's own.",
        key=True,
    )


@dataclass(frozen=True)
class QuantizedOptions(ExplainerOptions):
    """What it starts from and how it is held in memory."""

    quantize: str = option(
        "none", "Hold the language model's layers in 4 or 8 bits (QLoRA).", "none", "4bit", "8bit"
    )


@dataclass(frozen=True)
class AdapterOptions(Options):
    """The low-rank updates, on every linear layer of the language model but its head."""

    lora_r: int = option(128, "Rank of an update (published: 128).", low=1)
    lora_alpha: int = option(256, "An update counts alpha / r (published: 256).", low=1)
    lora_dropout: float = option(
        0.05, "Dropout before it (published: 0.05).", low=0.0, high=0.95, key=True
    )


@dataclass(frozen=True)
class StepOptions(Options):
    """How the weights move."""

    epochs: int = option(1, "Passes over the data (published: 1).", low=1)
    batch_size: int = option(40, "Conversations a batch and process (published: 40).", low=1)
    gradient_accumulation_steps: int = option(
        1, "Batches whose gradients make one step together.", low=1
    )
    learning_rate: float = option(2e-5, "Of AdamW (published: 2e-5).", low=0.0)
    weight_decay: float = option(0.0, "Weight decay (published: 0).", low=0.0, key=True)
    schedule: str = option(
        "cosine",
        "Learning rate over time (published: cosine).",
        *("cosine", "linear", "constant"),
        key=True,
    )
    warmup_ratio: float = option(
        0.03,
        "Share of all steps over which it rises from zero (published: 0.03).",
        low=0,
        high=1,
        key=True,
    )
    max_grad_norm: float = option(
        1.0, "Scale gradients down to this norm (published: 1); 0 leaves them.", low=0.0, key=True
    )


@dataclass(frozen=True)
class LoraStepOptions(StepOptions):
    """How the weights move."""

    batch_size: int = option(20, "Conversations a batch and process (published: 20).", low=1)
    learning_rate: float = option(2e-5, "Of the low-rank updates (published: 2e-5).", low=0.0)
    projector_lr: float = option(2e-5, "Of both projectors (published: 2e-5).", low=0.0, key=True)


@dataclass(frozen=True)
class StageRunOptions(TrainingRunOptions):
    """Where the result goes and how the machines are used."""

    deepspeed: str | None = option(
        None,
        "Train under DeepSpeed: zero2 (published), zero3, zero3-offload, or a file of settings.",
    )
    save_steps: int = option(
        100,
        "Save the state every so many steps, and after each epoch; 0 for epochs only.",
        low=0,
        key=True,
    )
    report_to: str = option(
        "auto",
        "Where curves go: tensorboard, wandb, none; auto is TensorBoard where it is installed.",
        *("auto", "tensorboard", "wandb", "none"),
        key=True,
    )

    def check(self) -> None:
        """DeepSpeed's settings must be there."""
        super().check()
        if (
            self.deepspeed
            and self.deepspeed not in DEEPSPEED
            and not Path(self.deepspeed).is_file()
        ):
            raise ConfigError(
                f"--deepspeed '{self.deepspeed}' is no file.",
                f"Use {', '.join(DEEPSPEED)} or a JSON file.",
            )


@dataclass(frozen=True)
class AlignOptions(Options):
    """Every option of ``m2f2 align``."""

    data: ConversationOptions
    model: ExplainerOptions
    optimizer: StepOptions
    run: StageRunOptions


@dataclass(frozen=True)
class LoraOptions(Options):
    """Every option of ``m2f2 lora``."""

    data: ConversationOptions
    model: QuantizedOptions
    adapter: AdapterOptions
    optimizer: LoraStepOptions
    run: StageRunOptions


StageOptions = AlignOptions | LoraOptions
