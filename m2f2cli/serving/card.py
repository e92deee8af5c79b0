"""What there is to know about a model before trusting it, for the page."""

from __future__ import annotations

import re
from pathlib import Path

from m2f2cli.inference.session import Session
from m2f2cli.models.loading import resolve_checkpoint
from m2f2cli.serving import wording

_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_MOST = 200_000  # characters of a card
GENERAL = f"""## Limits

- {wording.OPINION}
- A model knows the kinds of forgery, cameras and compression that it was trained on. Of others it
  may be wrong with great confidence.
- {wording.MAP_LEGEND}
- Reasons, where there are any, are what a language model finds to say about the verdict. They are
  hints where to look, not evidence.
- Do not decide anything about a person by this page alone.
"""


def card_of(session: Session) -> str:
    """The model card in Markdown: the checkpoint's own ``README.md`` after what always holds.

    Args:
        session: The loaded model.
    """
    settings = session.settings
    facts = (
        f"## The model\n\n`{settings.model}`, fingerprint `{settings.model_fingerprint}`. "
        f"Threshold {wording.percent(settings.threshold)}"
    )
    if settings.uncertain:
        low, high = (wording.percent(value) for value in settings.uncertain)
        facts += f"; between {low} and {high} it does not decide"
    return f"{GENERAL}\n{facts}.\n\n{_own_card(session.name)}"


def _own_card(name: str) -> str:
    if not name or not (Path(name).exists() or name == "lite"):
        return ""
    file = resolve_checkpoint(name) / "README.md"
    if not file.is_file():
        return ""
    return _HEADER.sub("", file.read_text(encoding="utf-8", errors="replace")[:_MOST])
