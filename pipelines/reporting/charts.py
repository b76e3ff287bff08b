"""Draw the report's charts as SVG, with text as text and the page's colours."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pbe.errors import printable
from pbe.evaluate.metrics.intervals import Estimate

NAME_CHARACTERS = 40  # of a class, in a chart
SWEEP_COLUMNS = 4  # panels in a row
INK = "#010203"  # replaced by currentColor


@contextmanager
def _style() -> Iterator[Any]:
    """Import pyplot with the page's style, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # names are no formulas, whatever dollars they have
        "text.usetex": False,
        "svg.hashsalt": "pbe",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        yield plt
        plt.close("all")


def _colour(index: int) -> str:
    """Return a placeholder for the page's variable --v<index>; `_svg` replaces it."""
    return f"#0400{index:02x}"


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has fonts for all scripts
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    return re.sub(r'style="[^"<>]*"', lambda style: _page_colours(style[0]), svg[svg.index("<svg") :])


def _page_colours(style: str) -> str:
    """Put the page's colours into an attribute, only there: a class may be called #010203."""
    style = style.replace(INK, "currentColor")
    return re.sub("#0400(..)", lambda found: f"var(--v{int(found[1], 16) % 4})", style)


def _shown(name: str) -> str:
    """A name from data, as long as a chart has room for."""
    name = printable(name)
    return name if len(name) <= NAME_CHARACTERS else name[: NAME_CHARACTERS - 1] + "…"


def loss_svg(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Plot each variant's loss over steps: every logged point and a running mean."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with _style() as plt:
        figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
        for index, (name, history) in enumerate(histories.items()):
            steps, losses = ([row[key] for row in history] for key in ("step", "loss"))
            window = max(1, len(losses) // 12)
            if window > 1:
                axes.plot(steps, losses, color=_colour(index), linewidth=0.8, alpha=0.3)
            mean = _running_mean(losses, window)
            axes.plot(steps[window - 1 :], mean, color=_colour(index), linewidth=2, label=name)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        narrow = high < 8 * low  # labels at 1, 2 and 5 would be too few
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:g}" if narrow or f"{value:e}"[0] in "25" else "")
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (log)")
        axes.legend(frameon=False, loc="lower left")
        return _svg(figure)


def sweep_svg(curves: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Plot one panel per metric: value and 95 % interval over the guidance scale."""
    rows = -(-len(curves) // SWEEP_COLUMNS)
    with _style() as plt:
        figure, grid = plt.subplots(rows, SWEEP_COLUMNS, figsize=(10, 2.5 * rows), layout="constrained", squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index >= len(curves):
                axes.set_axis_off()
                continue
            label, curve = list(curves.items())[index]
            scales, found = [float(scale) for scale in curve], [*curve.values()]
            values = [estimate.value for estimate in found]
            # an interval around a mean of seeds may exclude its value; error bars cannot be negative
            below = [max(0.0, estimate.value - estimate.low) for estimate in found]
            above = [max(0.0, estimate.high - estimate.value) for estimate in found]
            axes.errorbar(scales, values, [below, above], color=_colour(0), linewidth=2, elinewidth=1, capsize=2)
            axes.set_title(label, fontsize=11)
            axes.set_xticks(scales, [*curve])
            axes.set_xlabel("guidance scale")
        return _svg(figure)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    return np.convolve(values, np.full(window, 1 / window), mode="valid").tolist() if len(values) else []


def areas_svg(all_areas: np.ndarray, kept_areas: np.ndarray) -> str:
    """Plot a histogram of relative box areas on a log axis: all boxes and kept boxes."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    edges = np.geomspace(1e-4, 1, 33)
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(5.4, 2.8), layout="constrained")
        for index, (label, areas) in enumerate((("read", all_areas), ("kept", kept_areas))):
            colour, alpha = _colour(index), 0.35 if index == 0 else 0.9
            axes.hist(np.clip(areas, edges[0], 1), bins=edges, color=colour, alpha=alpha, label=label)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("box area / photo area (log)")
        axes.set_ylabel("boxes")
        axes.legend(frameon=False, loc="upper left")
        return _svg(figure)


def classes_svg(classes: Sequence[tuple[str, int, int]]) -> str:
    """Plot bars of the most frequent classes, given (name, boxes read, boxes kept)."""
    names = [_shown(name) for name, _, _ in classes][::-1]
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(5.4, 0.6 + 0.26 * len(names)), layout="constrained")
        for index, counts in enumerate(([c[1] for c in classes][::-1], [c[2] for c in classes][::-1])):
            alpha = 0.35 if index == 0 else 0.9
            axes.barh(range(len(names)), counts, color=_colour(index), alpha=alpha, label=("read", "kept")[index])
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("boxes")
        axes.legend(frameon=False, loc="lower right")
        return _svg(figure)
