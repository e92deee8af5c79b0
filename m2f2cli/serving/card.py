"""What there is to know about a model before trusting it, for the page."""

from __future__ import annotations

import re
from pathlib import Path

from m2f2cli.checkpoints.hub import BUNDLED, find_explainer, resolve_checkpoint
from m2f2cli.inference.session import Session
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
    return "\n\n".join([GENERAL, f"{facts}.", *_own_cards(session)])


def _own_cards(session: Session) -> list[str]:
    """The checkpoint's own card; of a bundled explainer, the bundled detector's as well."""
    name = session.name
    if not (name in BUNDLED or Path(name).is_dir()):
        return []
    folders = [find_explainer(name)] if session.explains else []
    files = [folder / "README.md" for folder in dict.fromkeys([*folders, resolve_checkpoint(name)])]
    return [
        _HEADER.sub("", file.read_text(encoding="utf-8", errors="replace")[:_MOST])
        for file in files
        if file.is_file()
    ]
