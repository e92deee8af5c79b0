"""How ``m2f2 explain`` asks, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from m2f2cli.errors import UsageError
from m2f2cli.inference.pipeline import DetectOptions
from m2f2cli.inference.questions import CONDITIONS, Question, choose
from m2f2cli.models.conversation import Template, template


@dataclass(frozen=True)
class ExplainOptions:
    """How to judge and explain.

    Attributes:
        detect: How faces are found and judged; ``batch_size`` counts the answers written at a time.
        questions: The user's own questions.
        regions: Of ``explain_questions.REGIONS``; all when ``questions`` is empty too.
        judge: Ask for the judgement only.
        condition: What questions say of the face: ``detector``: its verdict, nothing when that is
            uncertain; ``none``: nothing; ``truth``: its label, for data sets only.
        template: A conversation template; None takes the checkpoint's.
        max_new_tokens: Longest answer.
        sample: Draw words by chance instead of taking the likeliest.
        temperature: Divides the logits before drawing; None means 1.
        top_p: Draw from the likeliest words that together have this probability; None means 1.
        seed: Of the draws; with it, face and question fix them, whatever else is in the run.
        quantize: ``4bit`` or ``8bit`` for the language model's layers, or None.
    """

    detect: DetectOptions = field(default_factory=DetectOptions)
    questions: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    judge: bool = False
    condition: str = "detector"
    template: str | None = None
    max_new_tokens: int = 512
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise UsageError(
                f"Unknown condition '{self.condition}'.", f"Use one of: {', '.join(CONDITIONS)}."
            )
        if self.max_new_tokens < 1:
            raise UsageError("An answer needs at least one new token.")
        if not self.sample and (self.temperature is not None or self.top_p is not None):
            raise UsageError(
                "A temperature or top-p does nothing while the likeliest word is taken.",
                "Add --sample.",
            )
        if self.temperature is not None and not self.temperature > 0:
            raise UsageError(f"The temperature must be above 0, not {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"Top-p must lie in (0, 1], not {self.top_p}.")
        self.chosen()  # complains about questions before any work
        if self.template is not None:
            template(self.template)

    def chosen(self) -> tuple[Question, ...]:
        """What is asked of each face."""
        return choose(self.questions, self.regions, judge=self.judge)

    def pick_template(self, trained_with: str) -> Template:
        """The template to ask in."""
        return template(self.template or trained_with)

    def sampling(self) -> dict[str, float] | None:
        """How words are drawn, as records say it; None when the likeliest is taken."""
        if not self.sample:
            return None
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
        }

    def for_crops(self) -> ExplainOptions:
        """The same, every picture taken as a crop."""
        return replace(self, detect=replace(self.detect, faces="none"))
