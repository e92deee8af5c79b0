"""The picture of a robustness sweep. Import this module only when drawing: it needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from m2f2cli.data.corruptions import CORRUPTIONS, SEVERITIES
from m2f2cli.evaluation.plots import FAKE_COLOUR, INK, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from m2f2cli.evaluation.robustness import Row

_COLUMNS = 4  # panels side by side


def draw(rows: Sequence[Row], form: str = "svg") -> bytes:
    """Draw AUC with its interval, and the share in the domain, against severity.

    Args:
        rows: Of a sweep, untouched pictures first.
        form: ``svg`` or ``png``.
    """
    clean, spoilt = rows[0], rows[1:]
    names = list(dict.fromkeys(row.corruption for row in spoilt))
    across = max(1, min(_COLUMNS, len(names)))
    down = max(1, -(-len(names) // across))
    figure = Figure(figsize=(2.5 * across, 2.1 * down + 0.5), layout="constrained")
    panels = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, name, [clean, *(row for row in spoilt if row.corruption == name)])
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
            steps, low, high, color=FAKE_COLOUR, alpha=0.18, linewidth=0, label="its interval"
        )
    panel.plot(
        [step for step, _, _ in known],
        [value for _, value, _ in known],
        color=FAKE_COLOUR, marker="o", markersize=3, label="AUC",
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
