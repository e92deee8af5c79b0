"""The page of a report: one HTML file that needs nothing else, on screen, phone and paper."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from m2f2cli.data.images import read_picture
from m2f2cli.errors import InputError
from m2f2cli.evaluation import plots
from m2f2cli.evaluation.mistakes import Mistake, find_mistakes, threshold_of
from m2f2cli.evaluation.scored import FAKE, REAL, Scored, ScoredSet
from m2f2cli.metrics import roc_auc

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 24  # mistakes
THUMBNAIL = 160  # pixels of the longer side

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.notes { background: var(--soft); border-left: 4px solid #d69e2e; padding: .6rem 1rem .6rem 2rem;
  font-size: .9rem; }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .8rem; }
figure.plot img { width: 100%; max-width: 30rem; background: #fff; border-radius: 6px; }
figure.item img { max-width: 100%; border-radius: 4px; }
.none { background: var(--soft); padding: .6rem 1rem; font-size: .9rem; }
pre { overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }
@media print { body { max-width: none; font-size: 11px; }
  .grid.small { grid-template-columns: repeat(5, 1fr); } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(report: Mapping[str, Any], scored: ScoredSet) -> str:
    """Write the page.

    Args:
        report: Of ``report.build_report``.
        scored: The items it was made of; pictures of mistakes are read from their files.

    Returns:
        HTML without references to other files or hosts.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    title = f"{report['dataset']}, {report['protocol']['name']} protocol"
    notes = "".join(f"<li>{_text(note)}</li>" for note in report["notes"])
    body = [
        f"<h1>{_text(title)}</h1>",
        _facts(report),
        f'<ul class="notes">{notes}</ul>' if notes else "",
        "<h2>Figures</h2>",
        _figures(report["figures"], report["protocol"]["definition"].get("level")),
        "<h2>By manipulation</h2>",
        _kinds(report["per_kind"]),
        "<h2>Scores</h2>",
        _score_plots(scored),
        *_mistakes(scored),
        "<h2>How it was measured</h2>",
        _details("Protocol", report["protocol"]),
        _details("Versions", report["versions"]),
        *(_details(name.capitalize(), report[name]) for name in ("data", "predictions", "model")),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    """A string of any origin as HTML: escaped, on one line, control characters spelled out."""
    line = " ".join(str(value).split())
    shown = (
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in line
    )
    return html.escape("".join(shown))


def _facts(report: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{n:,} {name}" for name, n in report["counts"].items() if n)
    facts = {
        "Data": f"{report['dataset']}, split {report['split']}",
        "Items": counts,
        "Model": report["model"]["name"] or "not said by the predictions",
        "Made": f"{report['created']} by m2f2 {report['versions']['m2f2cli']}",
    }
    return _table((), [(name, _text(value)) for name, value in facts.items()])


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()
) -> str:
    """A table of cells that are HTML already; ``right`` numbers columns of figures."""
    head = "".join(f'<th scope="col">{_text(word)}</th>' for word in heads)
    lines = [f"<thead><tr>{head}</tr></thead>"] if heads else []
    numbers = set(right)
    for row in rows:
        first, *rest = row
        cells = "".join(
            f'<td class="n">{cell}</td>' if place in numbers else f"<td>{cell}</td>"
            for place, cell in enumerate(rest, start=1)
        )
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def number(value: float | None) -> str:
    """A figure for reading: four decimals."""
    return "–" if value is None else f"{value:.4f}"


def interval(figure: Mapping[str, Any]) -> str:
    """The interval of a figure for reading; empty without one."""
    if figure.get("low") is None or figure.get("high") is None:
        return ""
    return f"{figure['low']:.4f} – {figure['high']:.4f}"


def interval_title(level: float | None) -> str:
    """The heading over intervals of one level."""
    return f"{100 * level:g} % interval" if level else "interval"


def _figures(figures: Mapping[str, Mapping[str, Any]], level: float | None) -> str:
    rows = [
        (_text(name), number(f["value"]), interval(f), _text(f["note"] or ""))
        for name, f in figures.items()
    ]
    return _table(("figure", "value", interval_title(level), ""), rows, right=(1, 2))


def _kinds(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    if not kinds:
        return _instead("This report tells no manipulations apart.")
    names = list(dict.fromkeys(name for figures in kinds.values() for name in figures))
    rows = []
    for kind, figures in kinds.items():
        found = {name: figures.get(name) or {"value": None} for name in names}
        cells = [f"{number(f['value'])} <small>{interval(f)}</small>" for f in found.values()]
        if (count := found.get("count")) is not None:
            cells[names.index("count")] = f"{count['value']:,.0f}"
        rows.append((_text(kind), *cells))
    table = _table(("manipulation", *names), rows, right=range(1, len(names) + 1))
    drawable = [
        name
        for name in ("auc", "accuracy")
        if any((figures.get(name) or {}).get("value") is not None for figures in kinds.values())
    ]
    if not drawable:
        return table
    drawn = plots.bars(kinds, drawable)
    what = " and ".join(drawable)
    return table + _plot(
        drawn, f"Bars: {what} of each manipulation with intervals; the table above."
    )


def _score_plots(scored: ScoredSet) -> str:
    given = [i for i in scored.items if i.fake_probability is not None and i.label in (REAL, FAKE)]
    if not given:
        return _instead(
            "There is no ROC curve, no histogram and no reliability diagram: these predictions "
            "carry no probabilities."
        )
    labels = np.array([item.label for item in given])
    scores = np.array([item.fake_probability for item in given], dtype=np.float64)
    blocks = []
    if len(set(labels)) == 2:
        drawn = plots.roc(labels, scores, scored.threshold)
        words = f"ROC curve of {len(given):,} items, area {roc_auc(labels, scores):.4f}."
        blocks.append(_plot(drawn, words))
    else:
        absent = "real" if REAL not in labels else "forged"
        blocks.append(
            _instead(f"There is no ROC curve: there are no {absent} pictures with a score.")
        )
    drawn = plots.histograms(labels, scores, scored.threshold)
    blocks.append(
        _plot(drawn, "Histogram of the fake probabilities of real and of forged pictures.")
    )
    drawn = plots.reliability(labels, scores)
    blocks.append(
        _plot(drawn, "Reliability: share of forged pictures against the mean fake probability of "
              "ten equal bins; on the dotted line when calibrated. Numbers count pictures.")
    )  # fmt: skip
    return f'<div class="grid">{"".join(blocks)}</div>'


def _plot(figure: Figure, words: str) -> str:
    picture = _data_uri("image/svg+xml", plots.drawn(figure))
    return (
        f'<figure class="plot"><img src="{picture}" alt="{_text(words)}">'
        f"<figcaption>{_text(words)}</figcaption></figure>"
    )


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _instead(words: str) -> str:
    return f'<p class="none">{_text(words)}</p>'


def _mistakes(scored: ScoredSet) -> list[str]:
    found = find_mistakes(scored)
    text = scored.task != "scores"
    if scored.task == "explanation":
        title = "Questions without an answer"
    else:
        title = "Wrong and unread answers" if text else "Most confident mistakes"
    shown = found[:SHOWN]
    rule = "" if text else f" at the threshold {threshold_of(scored):g}"
    count = f"{len(found):,} of {len(scored.items):,} items{rule}"
    if not found:
        return [f"<h2>{title}</h2>", _instead(f"There are none{rule}.")]
    items = "".join(_mistake(mistake) for mistake in shown)
    return [
        f"<h2>{title}</h2>",
        f"<p>{count}{f', the first {SHOWN} of them' if len(found) > SHOWN else ''}.</p>",
        f'<div class="grid small">{items}</div>',
    ]


def _mistake(mistake: Mistake) -> str:
    item = mistake.item
    truth = "" if item.label not in (REAL, FAKE) else ("forged" if item.label else "real")
    if truth and item.kind not in ("real", "fake"):
        truth += f" ({item.kind})"
    words = [f"<strong>{_text(item.name)}</strong>", _text(f"truth: {truth}") if truth else ""]
    words.append(_text(mistake.words))
    if item.in_domain is False:
        words.append("unlike the training pictures")
    if item.answer and item.answer.strip():
        answer = " ".join(item.answer.split())
        words.append(f"<q>{_text(answer[:300])}</q>{'…' if len(answer) > 300 else ''}")
    caption = "<br>".join(part for part in words if part)
    return f'<figure class="item">{_thumbnail(item)}<figcaption>{caption}</figcaption></figure>'


def _thumbnail(item: Scored) -> str:
    """The picture, small and inside the page; or why it is not there."""
    if item.file is None:
        return ""
    try:
        picture = read_picture(item.file)
    except InputError as error:
        return f'<p class="none">No picture: {_text(error.status)}</p>'
    small = Image.fromarray(picture.pixels)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=80)
    uri = _data_uri("image/jpeg", data.getvalue())
    return f'<img src="{uri}" alt="{_text(item.name)}" loading="lazy">'


def _details(title: str, values: Mapping[str, Any]) -> str:
    text = html.escape(json.dumps(values, ensure_ascii=True, indent=2))
    return f"<details><summary>{_text(title)}</summary><pre>{text}</pre></details>"
