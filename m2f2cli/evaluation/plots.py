"""The plots of reports and sweeps, drawn by matplotlib. Import this module only when drawing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from m2f2cli import metrics
from m2f2cli.data.corruptions import CORRUPTIONS, SEVERITIES
from m2f2cli.errors import MissingExtraError

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "eval", "Drawing a report") from error

if TYPE_CHECKING:
    from m2f2cli.evaluation.robustness import Row

REAL_COLOR, FAKE_COLOR, INK = "#2563a8", "#c2410c", "#444444"
SCORE_BINS = 25
_STYLE: dict[str, Any] = {
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
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":")
    axes.plot(
        *curve.rates(), color=FAKE_COLOR, linewidth=1.8, label=f"AUC {metrics.area(curve):.3f}"
    )
    if threshold is not None:
        at = (scores[labels == 0] >= threshold).mean(), (scores[labels == 1] >= threshold).mean()
        axes.plot(*at, "o", color=INK, label=f"threshold {threshold:.3g}")
    axes.set(
        xlabel="false-positive rate: real called fake",
        ylabel="true-positive rate: fake called fake",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    _legend(axes, loc="lower right")
    return figure


def histograms(labels: np.ndarray, scores: np.ndarray, threshold: float | None) -> Figure:
    """How the fake probabilities of real and of forged pictures are spread.

    Args:
        labels: int (N,), 0 or 1; one class may be absent.
        scores: float (N,) in [0, 1].
        threshold: Drawn as a line; None for none.
    """
    figure, axes = _canvas()
    edges = np.linspace(0.0, 1.0, SCORE_BINS + 1)
    for label, word, color in ((0, "real", REAL_COLOR), (1, "fake", FAKE_COLOR)):
        own = scores[labels == label]
        if len(own):
            shares = np.histogram(own, edges)[0] / len(own)
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(shares, edges, color=color, label=f"{word} ({len(own):,})")
    if threshold is not None:
        axes.axvline(
            threshold, color=INK, linewidth=1, linestyle="--", label=f"threshold {threshold:.3g}"
        )
    axes.set(xlabel="fake probability", ylabel="share of the class", xlim=(0, 1))
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def reliability(labels: np.ndarray, scores: np.ndarray) -> Figure:
    """How often pictures of one fake probability are forged: on the diagonal when calibrated.

    Args:
        labels: int (N,), 0 or 1.
        scores: float (N,) in [0, 1].
    """
    figure, axes = _canvas()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, linestyle=":")
    found = metrics.reliability(labels, scores)
    used = found.counts > 0
    counts, means, shares = found.counts[used], found.probability[used], found.frequency[used]
    axes.plot(means, shares, color=FAKE_COLOR, linewidth=1.2)
    axes.scatter(means, shares, s=12 + 160 * counts / counts.max(), color=FAKE_COLOR, alpha=0.6)
    for x, y, count in zip(means, shares, counts, strict=True):
        above = y < 0.9
        axes.annotate(
            f"{count:,}",
            (x, y),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=7,
            color=INK,
        )
    axes.set(
        xlabel="mean fake probability of the bin",
        ylabel="share that is forged",
        xlim=(-0.03, 1.03),
        ylim=(-0.05, 1.05),
        aspect="equal",
    )
    return figure


def bars(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Figures of each manipulation as bars with their metrics.

    Args:
        rows: Manipulation to figures as JSON values (``value``, ``low``, ``high``), in [0, 1].
        names: Which figures to draw, at most two; undefined ones get no bar.
    """
    figure, axes = _canvas(height=1.1 + 0.42 * len(rows))
    thickness = 0.8 / len(names)
    places = np.arange(len(rows))
    for number, (name, color) in enumerate(zip(names, (FAKE_COLOR, REAL_COLOR), strict=False)):
        shift = (number - (len(names) - 1) / 2) * thickness
        for place, found in zip(places, rows.values(), strict=True):
            _bar(axes, found.get(name) or {}, place + shift, thickness=thickness, color=color)
        axes.barh([np.nan], [np.nan], color=color, alpha=0.75, label=name.replace("_", " "))
    axes.set_yticks(places, [_short(kind) for kind in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.14), xticks=np.linspace(0, 1, 6), ylim=(len(rows) - 0.5, -0.5))
    _legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def _bar(
    axes: Axes, found: Mapping[str, Any], place: float, *, thickness: float, color: str
) -> None:
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    if value is None:
        return
    axes.barh([place], [value], height=thickness * 0.9, color=color, alpha=0.75)
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color="#111111", linewidth=1.2, marker="|")
    axes.annotate(
        f"{value:.3f}", (max(value, high or 0.0), place), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=7, color=INK,
    )  # fmt: skip


def _short(text: str) -> str:
    """A manipulation's name as a label: of bearable length, and no mathematics of matplotlib's."""
    plain = text if len(text) <= 28 else text[:27] + "…"
    return plain.replace("$", r"\$")


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(frameon=False, fontsize=8, **place)


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


_COLUMNS = 4  # panels side by side


def sweep_curves(rows: Sequence[Row], form: str = "svg") -> bytes:
    """Draw AUC with its interval, and the share in the domain, against severity.

    Args:
        rows: Of a sweep, untouched pictures first.
        form: ``svg`` or ``png``.
    """
    clean, corrupted = rows[0], rows[1:]
    names = list(dict.fromkeys(row.corruption for row in corrupted))
    across = max(1, min(_COLUMNS, len(names)))
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


def _panel(panel: Axes, name: str, rows: Sequence[Row]) -> None:
    panel.axhline(0.5, color="#bbbbbb", linewidth=1, linestyle=":")
    known = [(r.severity, r.auc.value, r.auc) for r in rows if r.auc.value is not None]
    bounds = [(s, a.low, a.high) for s, _, a in known if a.low is not None and a.high is not None]
    if bounds:
        steps, low, high = zip(*bounds, strict=True)
        panel.fill_between(
            steps, low, high, color=FAKE_COLOR, alpha=0.18, linewidth=0, label="its interval"
        )
    panel.plot(
        [step for step, _, _ in known],
        [value for _, value, _ in known],
        color=FAKE_COLOR, marker="o", markersize=3, label="AUC",
    )  # fmt: skip
    inside = [(row.severity, row.in_domain) for row in rows if row.in_domain is not None]
    if inside:
        panel.plot(
            [step for step, _ in inside],
            [share for _, share in inside],
            color=INK, linewidth=1, linestyle="--", label="share in domain",
        )  # fmt: skip
    values = CORRUPTIONS[name].values
    panel.set_title(f"{name}: {CORRUPTIONS[name].parameter}", fontsize=8, color=INK)
    panel.set_xticks([0, *SEVERITIES], ["-", *(f"{value:.3g}" for value in values)], fontsize=7)
    panel.set_ylim(-0.03, 1.03)
    panel.spines[["top", "right"]].set_visible(False)
