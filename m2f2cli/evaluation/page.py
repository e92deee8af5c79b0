"""The page of a report: one HTML file that needs nothing else, on screen, phone and paper.

What it looks like is in ``assets/report.html``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from m2f2cli.data.images import read_picture
from m2f2cli.errors import InputError
from m2f2cli.evaluation import plots
from m2f2cli.evaluation.report import Mistake, find_mistakes
from m2f2cli.evaluation.truth import FAKE, REAL, Joined
from m2f2cli.metrics import roc_auc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 24  # mistakes
THUMBNAIL = 160  # pixels of the longer side


def render_page(report: Mapping[str, Any], joined: Joined) -> str:
    """Write the page.

    Args:
        report: Of ``report.build_report``.
        joined: The items it was made of; pictures of mistakes are read from their files.

    Returns:
        HTML without references to other files or hosts.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("m2f2cli", "assets"),
        autoescape=True,
        finalize=_one_line,
        undefined=jinja2.ChainableUndefined,
    )
    pages.filters["indented"] = _indented
    kinds = report["per_kind"]
    counts = ", ".join(f"{n:,} {name}" for name, n in report["counts"].items() if n)
    return pages.get_template("report.html").render(
        report=report,
        facts={
            "Data": f"{report['dataset']}, split {report['split']}",
            "Items": counts,
            "Model": report["model"]["name"] or "not said by the predictions",
            "Made": f"{report['created']} by m2f2 {report['versions']['m2f2cli']}",
        },
        kind_figures=list(dict.fromkeys(name for figures in kinds.values() for name in figures)),
        bars=_bars(kinds),
        score_plots=list(_score_plots(joined)),
        mistakes=_mistakes(joined),
    )


def _one_line(value: object) -> object:
    """A string of any origin on one line, its control characters spelled out."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in " ".join(value.split())
    )


def _indented(values: Mapping[str, Any]) -> Markup:
    return escape(json.dumps(values, ensure_ascii=True, indent=2))


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _plot(figure: Figure, words: str) -> dict[str, str]:
    return {"source": _data_uri("image/svg+xml", plots.drawn(figure)), "words": words}


def _bars(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str] | None:
    """The bars of each manipulation; None where no figure has a value."""
    drawable = [
        name
        for name in ("auc", "accuracy")
        if any((figures.get(name) or {}).get("value") is not None for figures in kinds.values())
    ]
    if not drawable:
        return None
    words = f"Bars: {' and '.join(drawable)} of each manipulation with intervals; the table above."
    return _plot(plots.bars(kinds, drawable), words)


def _score_plots(joined: Joined) -> Iterator[dict[str, str]]:
    """The plots of the probabilities, or the words for one that cannot be drawn."""
    given = [i for i in joined.items if i.fake_probability is not None and i.label in (REAL, FAKE)]
    if not given:
        return
    labels = np.array([item.label for item in given])
    scores = np.array([item.fake_probability for item in given], dtype=np.float64)
    if len(set(labels)) == 2:
        words = f"ROC curve of {len(given):,} items, area {roc_auc(labels, scores):.4f}."
        yield _plot(plots.roc(labels, scores, joined.threshold), words)
    else:
        absent = "real" if REAL not in labels else "forged"
        yield {"words": f"There is no ROC curve: there are no {absent} pictures with a score."}
    yield _plot(
        plots.histograms(labels, scores, joined.threshold),
        "Histogram of the fake probabilities of real and of forged pictures.",
    )
    yield _plot(
        plots.reliability(labels, scores),
        "Reliability: share of forged pictures against the mean fake probability of ten equal "
        "bins; on the dotted line when calibrated. Numbers count pictures.",
    )


def _mistakes(joined: Joined) -> dict[str, Any]:
    found = find_mistakes(joined)
    titles = {"scores": "Most confident mistakes", "explanation": "Questions without an answer"}
    return {
        "title": titles.get(joined.task, "Wrong and unread answers"),
        "rule": f"at the threshold {joined.threshold_used:g}" if joined.task == "scores" else "",
        "found": len(found),
        "whole": len(joined.items),
        "shown": [_mistake(mistake) for mistake in found[:SHOWN]],
    }


def _mistake(mistake: Mistake) -> dict[str, Any]:
    """What the page says of an item; its picture small and inside the page, or why it is not."""
    item = mistake.item
    truth = {REAL: "real", FAKE: "forged"}.get(item.label)
    if truth and item.kind not in ("real", "fake"):
        truth += f" ({item.kind})"
    words = [f"truth: {truth}"] if truth else []
    words.append(mistake.words)
    if item.in_domain is False:
        words.append("unlike the training pictures")
    shown: dict[str, Any] = {"name": item.name, "words": words}
    shown["answer"] = " ".join((item.answer or "").split())
    if item.file is None:
        return shown
    try:
        small = Image.fromarray(read_picture(item.file).pixels)
    except InputError as error:
        return shown | {"unreadable": error.status}
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    return shown | {"thumbnail": _data_uri("image/jpeg", data.getvalue())}
