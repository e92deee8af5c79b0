"""The page of a report, and the plots of reports and sweeps. Import it only when drawing.

The page is one HTML file that needs nothing else, on screen, phone and paper; what it looks like is
in ``assets/report.html``. Plots are drawn by matplotlib.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from m2f2cli import metrics
from m2f2cli.data.corruptions import CORRUPTIONS, SEVERITIES
from m2f2cli.data.images import read_picture
from m2f2cli.errors import InputError, MissingExtraError
from m2f2cli.evaluation.report import Mistake, find_mistakes
from m2f2cli.evaluation.truth import FAKE, REAL, Joined

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "eval", "Drawing a report") from error

if TYPE_CHECKING:
    from m2f2cli.evaluation.robustness import Row

SHOWN = 24  # mistakes
THUMBNAIL = 160  # pixels of the longer side


def render_page(report: Mapping[str, Any], joined: Joined) -> str:
    """The page of a report and its items, as HTML without references to other files or hosts.

    Pictures of mistakes are read from their files.
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
        bars=_kind_bars(kinds),
        forgery_names=sorted({n for row in report["forgeries"].values() for n in row}),
        score_plots=[*_score_plots(joined), *_risk_plot(report)],
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
    return {"source": _data_uri("image/svg+xml", drawn(figure)), "words": words}


def _kind_bars(kinds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str] | None:
    """The bars of each manipulation; None where no figure has a value."""
    drawable = [
        name
        for name in ("auc", "accuracy")
        if any((figures.get(name) or {}).get("value") is not None for figures in kinds.values())
    ]
    if not drawable:
        return None
    words = f"Bars: {' and '.join(drawable)} of each manipulation with intervals; the table above."
    return _plot(bars(kinds, drawable), words)


def _score_plots(joined: Joined) -> Iterator[dict[str, str]]:
    """The plots of the probabilities, or the words for one that cannot be drawn."""
    given = [i for i in joined.items if i.fake_probability is not None and i.label in (REAL, FAKE)]
    if not given:
        return
    labels = np.array([item.label for item in given])
    scores = np.array([item.fake_probability for item in given], dtype=np.float64)
    if len(set(labels)) == 2:
        words = f"ROC curve of {len(given):,} items, area {metrics.roc_auc(labels, scores):.4f}."
        yield _plot(roc(labels, scores, joined.threshold), words)
    else:
        absent = "real" if REAL not in labels else "forged"
        yield {"words": f"There is no ROC curve: there are no {absent} pictures with a score."}
    yield _plot(
        histograms(labels, scores, joined.threshold),
        "Histogram of the fake probabilities of real and of forged pictures.",
    )
    yield _plot(
        reliability(labels, scores),
        "Reliability: share of forged pictures against the mean fake probability of ten equal "
        "bins; on the dotted line when calibrated. Numbers count pictures.",
    )


def _risk_plot(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The plot of risk against coverage, with the point of the stored rule where it is known."""
    curve, figures = report["risk_coverage"], report["figures"]
    if curve is None:
        return
    words = (
        "Risk and coverage: with the surest calls first, the share of wrong ones among those given "
        "against the share that is given."
    )
    point = [figures.get(name) or {"value": None} for name in ("coverage", "risk")]
    if known := all(figure["value"] is not None for figure in point):
        coverage, risk = map(_with_interval, point)
        words += (
            f" The point is the stored rule: it decides {coverage}, and {risk} of that wrongly."
        )
    yield _plot(risk_coverage(curve, point if known else None), words)


def _with_interval(figure: Mapping[str, Any]) -> str:
    words = f"{figure['value']:.1%}"
    return (
        words if figure["low"] is None else f"{words} ({figure['low']:.1%} to {figure['high']:.1%})"
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


REAL_COLOR, FAKE_COLOR, INK = "#2563a8", "#c2410c", "#444444"
SCORE_BINS = 25
_DIAGONAL: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 1, "linestyle": ":"}
_STYLE: Any = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "m2f2",  # equal reports have equal bytes
}


def roc(labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> Figure:
    """The ROC curve, with the operating point of the stored threshold.

    Args:
        labels: int (N,), 0 or 1, both present.
        scores: float (N,), fake probabilities in [0, 1].
        threshold: Fake from here on; None draws no point.
    """
    figure, axes = _canvas()
    curve = metrics.Ranking(labels, scores).curve()
    words = f"AUC {metrics.area(curve):.3f}"
    axes.plot([0, 1], [0, 1], **_DIAGONAL)
    axes.plot(*curve.rates(), color=FAKE_COLOR, linewidth=1.8, label=words)
    if threshold is not None:
        at = [(scores[labels == label] >= threshold).mean() for label in (REAL, FAKE)]
        axes.plot(*at, "o", color=INK, label=f"threshold {threshold:.3g}")
    axes.set(
        xlabel="false-positive rate: real called fake",
        ylabel="true-positive rate: fake called fake",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def histograms(labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> Figure:
    """How the fake probabilities of real and of forged pictures are spread.

    Arguments as for ``roc``; one class may be absent.
    """
    figure, axes = _canvas()
    edges = np.linspace(0.0, 1.0, SCORE_BINS + 1)
    for label, word, color in ((REAL, "real", REAL_COLOR), (FAKE, "fake", FAKE_COLOR)):
        own = scores[labels == label]
        if len(own):
            shares = np.histogram(own, edges)[0] / len(own)
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(shares, edges, color=color, label=f"{word} ({len(own):,})")
    if threshold is not None:
        words = f"threshold {threshold:.3g}"
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label=words)
    axes.set(xlabel="fake probability", ylabel="share of the class", xlim=(0, 1))
    _legend_above(axes, columns=3)
    return figure


def reliability(labels: np.ndarray, scores: np.ndarray) -> Figure:
    """How often pictures of one fake probability are forged: on the diagonal when calibrated."""
    figure, axes = _canvas()
    axes.plot([0, 1], [0, 1], **_DIAGONAL)
    found = metrics.reliability(labels, scores)
    counts, means, shares = (values[found.counts > 0] for values in found)
    axes.plot(means, shares, color=FAKE_COLOR, linewidth=1.2)
    axes.scatter(means, shares, s=12 + 160 * counts / counts.max(), color=FAKE_COLOR, alpha=0.6)
    for x, y, count in zip(means, shares, counts, strict=True):
        offset, side = ((0, 9), "bottom") if y < 0.9 else ((0, -9), "top")
        _annotate(axes, f"{count:,}", (x, y), offset, ha="center", va=side)
    axes.set(
        xlabel="mean fake probability of the bin",
        ylabel="share that is forged",
        xlim=(-0.03, 1.03),
        ylim=(-0.05, 1.05),
        aspect="equal",
    )
    return figure


def _reach(figure: Mapping[str, Any]) -> list[list[float]] | None:
    """How far an interval reaches to either side of its value; None without one."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    return None if low is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def risk_coverage(
    curve: Mapping[str, Sequence[float]], point: Sequence[Mapping[str, Any]] | None
) -> Figure:
    """The share of wrong calls against the share of calls given.

    Args:
        curve: ``coverage`` and ``risk``, each in [0, 1].
        point: Coverage and risk of the stored rule as JSON values (``value``, ``low``, ``high``);
            None draws no point.
    """
    figure, axes = _canvas()
    axes.step(
        [0, *curve["coverage"]], [curve["risk"][0], *curve["risk"]],
        where="pre", color=FAKE_COLOR, linewidth=1.8, label="by confidence",
    )  # fmt: skip
    if point:
        (x, across), (y, along) = ((one["value"], _reach(one)) for one in point)
        axes.errorbar([x], [y], xerr=across, yerr=along, fmt="o", color=INK, label="stored rule")
    axes.set(
        xlabel="coverage: share of the pictures that is called",
        ylabel="risk: share of those called wrongly",
        xlim=(0, 1.02),
        ylim=(0, None),
    )
    _legend_above(axes, columns=2)
    return figure


def bars(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Figures of each manipulation as bars with their intervals.

    Args:
        rows: Manipulation to figures as JSON values (``value``, ``low``, ``high``), in [0, 1].
        names: Which figures to draw, at most two; undefined ones get no bar.
    """
    figure, axes = _canvas(height=1.1 + 0.42 * len(rows))
    thickness = 0.8 / len(names)
    for number, (name, color) in enumerate(zip(names, (FAKE_COLOR, REAL_COLOR), strict=False)):
        shift = (number - (len(names) - 1) / 2) * thickness
        for place, figures in enumerate(rows.values()):
            value, low, high = ((figures.get(name) or {}).get(k) for k in ("value", "low", "high"))
            if value is None:
                continue
            at = place + shift
            axes.barh([at], [value], height=thickness * 0.9, color=color, alpha=0.75)
            if low is not None and high is not None:
                axes.plot([low, high], [at, at], color="#111111", linewidth=1.2, marker="|")
            _annotate(axes, f"{value:.3f}", (max(value, high or 0.0), at), (4, 0), va="center")
        axes.barh([np.nan], [np.nan], color=color, alpha=0.75, label=name.replace("_", " "))
    # Names of bearable length, and no mathematics of matplotlib's.
    kinds = [kind if len(kind) <= 28 else kind[:27] + "…" for kind in rows]
    axes.set_yticks(range(len(rows)), [kind.replace("$", r"\$") for kind in kinds])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.14), xticks=np.linspace(0, 1, 6), ylim=(len(rows) - 0.5, -0.5))
    _legend_above(axes, columns=2)
    return figure


def _annotate(axes: Axes, text: str, at: Any, offset: tuple[int, int], **align: Any) -> None:
    axes.annotate(
        text, at, xytext=offset, textcoords="offset points", fontsize=7, color=INK, **align
    )


def _legend_above(axes: Axes, *, columns: int) -> None:
    axes.legend(
        frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns
    )


def _canvas(height: float = 3.6) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        return figure, figure.add_subplot()


def drawn(figure: Figure, form: str = "svg") -> bytes:
    """A figure as the bytes of an SVG or PNG file."""
    data = io.BytesIO()
    with mpl.rc_context(_STYLE):
        dated: dict[str, Any] = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 110}
        figure.savefig(data, format=form, **dated)
    return data.getvalue()


def sweep_curves(rows: Sequence[Row], form: str = "svg") -> bytes:
    """AUC with its interval, and the share in the domain, against severity, as SVG or PNG."""
    clean, corrupted = rows[0], [row for row in rows if row.corruption in CORRUPTIONS]
    names = list(dict.fromkeys(row.corruption for row in corrupted))
    across = max(1, min(4, len(names)))
    down = max(1, -(-len(names) // across))
    figure = Figure(figsize=(2.5 * across, 2.1 * down + 0.5), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, name, [clean, *(row for row in corrupted if row.corruption == name)])
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    if names:
        handles, words = panels[0].get_legend_handles_labels()
        figure.legend(handles, words, loc="outside upper center", ncols=3, frameon=False)
    return drawn(figure, form)


def _panel(panel: Any, name: str, rows: Sequence[Row]) -> None:
    panel.axhline(0.5, **_DIAGONAL)
    known = [(row.severity, row.auc) for row in rows if row.auc.value is not None]
    bounds = [(step, auc.low, auc.high) for step, auc in known if auc.low is not None]
    if bounds:
        panel.fill_between(
            *zip(*bounds, strict=True),
            color=FAKE_COLOR, alpha=0.18, linewidth=0, label="its interval",
        )  # fmt: skip
    panel.plot(
        [step for step, _ in known],
        [auc.value for _, auc in known],
        color=FAKE_COLOR, marker="o", markersize=3, label="AUC",
    )  # fmt: skip
    inside = [(row.severity, row.in_domain) for row in rows if row.in_domain is not None]
    if inside:
        panel.plot(
            *zip(*inside, strict=True),
            color=INK, linewidth=1, linestyle="--", label="share in domain",
        )  # fmt: skip
    values = CORRUPTIONS[name].values
    panel.set_title(f"{name}: {CORRUPTIONS[name].parameter}", fontsize=8, color=INK)
    panel.set_xticks([0, *SEVERITIES], ["-", *(f"{value:.3g}" for value in values)], fontsize=7)
    panel.set_ylim(-0.03, 1.03)
    panel.spines[["top", "right"]].set_visible(False)
