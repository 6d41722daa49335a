"""Figures of runs, drawn from their metrics rows into files; no display is needed."""

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sgpo_jax.stats.benchmark import CONTEXTS
from sgpo_jax.stats.claims import Standing

# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_CONTEXT_COLOURS = dict(zip(CONTEXTS, (_BLUE, _ORANGE), strict=True))
_WHISKERS: dict[str, Any] = dict(fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
_DPI = 150
_LABELLED = 60  # most tokens for which each has its text beneath
# Colour as matplotlib writes it -> CSS variable of the page, which may be light or dark.
_PAGE_COLOURS = {
    "#000000": "currentColor", "#e6e6e6": "var(--rule)", _BLUE.lower(): "var(--blue)", _ORANGE.lower(): "var(--orange)"
}  # fmt: skip
_ROUNDING = 1e-6  # by which a mean may lie outside its interval when all samples are equal


class _Panel(NamedTuple):
    title: str
    unit: str
    curves: tuple[tuple[str, str, str], ...]  # metric, label, colour
    top: float | None = None  # upper end of the axis, if the metric has a maximum
    percent: bool = False


_REWARD = _Panel(
    "Reward",
    "correct answers",
    (("reward_auto", CONTEXTS[False], _BLUE), ("reward_guided", CONTEXTS[True], _ORANGE)),
    top=1.0,
    percent=True,
)
_PANELS = (
    _REWARD,
    _Panel("Distillation weight α", "mean over problems", (("alpha", "", _BLUE),)),
    _Panel("KL(guided ‖ unguided)", "nats per token", (("token_kl", "", _BLUE),)),
    _Panel("KL above the clip", "share of target tokens", (("kl_clip_share", "", _BLUE),), percent=True),
    _Panel("Entropy", "nats per token", (("entropy", "", _BLUE),)),
    _Panel("Response length", "tokens", (("response_length", "", _BLUE),)),
    _Panel("Gradient norm", "before clipping", (("grad_norm", "", _BLUE),)),
    _Panel("Sampler-trainer mismatch", "nats per token", (("logp_mismatch", "", _BLUE),)),
)


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the metrics of an RL run against the training step, one panel for each quantity.

    Thin lines are single steps, thick lines their running mean over a tenth of the run. A panel without metrics in any
    row is left out. Steps without a value (null) are gaps.

    Args:
        rows: metrics rows as `files.read_jsonl` returns them.
        path: file to write; its suffix chooses the format (png, pdf, svg).

    Raises:
        ValueError: no row has any of the metrics shown.
    """
    panels = _present(rows)
    if not panels:
        raise ValueError(f"rows must hold at least one of {[p.curves[0][0] for p in _PANELS]}")
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.3 * columns, 2.6 * lines)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_panel(axes, panel, rows)
        if index + columns >= len(panels):
            axes.set_xlabel("training step")
    figure.savefig(path, dpi=_DPI)


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Returns {title: figure} of the panels of `training_curves` as separate small figures; empty without metrics."""
    figures = {panel.title: _figure(3.6, 2.5) for panel in _present(rows)}
    for panel in _present(rows):
        _draw_panel(figures[panel.title].add_subplot(), panel, rows)
    return figures


def loss_panel(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Returns a figure of the warm-up's loss on training and held-out responses, or None without rows."""
    if not rows:
        return None
    figure = _figure(3.6, 2.5)
    curves = (("loss", "training", _BLUE), ("validation_loss", "held out", _ORANGE))
    _draw_panel(figure.add_subplot(), _Panel("SFT loss", "nats per token", curves), rows)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Returns a figure as an <svg> element whose colours are the page's CSS variables --rule, --blue and --orange.

    Args:
        figure: drawn without a background.
        name: the figure's name in its page; figures with different names share no ids.
    """
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    opening, _, rest = text.partition(">")
    opening = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", opening)
    rest = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", rest)  # ids such as figure_1, which every figure has
    rest = rest.replace(' xlink:href="', ' href="')
    rest = re.sub(r" font-family: [^;\"]*;", "", rest)
    for colour, variable in _PAGE_COLOURS.items():
        rest = rest.replace(colour, variable)
    return f'{opening} role="img">{rest}'


def summary(
    rows: Sequence[Mapping[str, Any]],
    before: Mapping[str, tuple[float, float, float]],
    after: Mapping[str, tuple[float, float, float]],
    path: str | os.PathLike[str],
) -> None:
    """Draws the reward during training beside the accuracy on held-out problems before and after.

    Args:
        rows: metrics rows with `reward_auto` and `reward_guided`.
        before: context ("unguided", "guided" or both) -> (accuracy, low, high), all in 0..1, where low and high are
            the bounds of the 95 % interval.
        after: like `before`, after training.
        path: file to write; its suffix chooses the format (png, pdf, svg).

    Raises:
        ValueError: a context is unknown or not in both, or an accuracy lies outside its interval.
    """
    for when, results in (("before", before), ("after", after)):
        if not results or not results.keys() <= _CONTEXT_COLOURS.keys() or results.keys() != before.keys():
            raise ValueError(f"{when} must hold the same of {[*CONTEXTS]} as before: {[*results]}")
    for context, (accuracy, low, high) in [*before.items(), *after.items()]:
        if not -_ROUNDING <= low - _ROUNDING <= accuracy <= high + _ROUNDING <= 1 + _ROUNDING:
            raise ValueError(f"{context}: accuracy {accuracy} must lie in its interval [{low}, {high}], in 0..1")
    figure = _figure(9, 3.6)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_panel(curves, _REWARD, rows)
    curves.set_xlabel("training step")

    ticks: dict[float, str] = {}
    for index, context in enumerate(before):
        accuracy, low, high = np.array([before[context], after[context]]).T
        places = 2.3 * index + np.arange(2)
        pair = bars.bar(places, accuracy, 0.9, color=_CONTEXT_COLOURS[context])
        pair[0].set_alpha(0.45)  # the pale bar is the earlier one
        lengths = np.maximum((accuracy - low, high - accuracy), 0.0)
        bars.errorbar(places, accuracy, lengths, **_WHISKERS)
        for x, value, top in zip(places, accuracy, high, strict=True):
            bars.annotate(f"{value:.0%}", (x, top), (0, 3), textcoords="offset points", ha="center")
        ticks |= {places[0]: "before", places.mean(): f"\n{context}", places[1]: "after"}
    bars.set_xticks(list(ticks), list(ticks.values()))
    bars.tick_params(axis="x", length=0)
    _tidy(bars, "Held-out accuracy, 95% interval", "correct answers", top=1.1, percent=True)
    bars.set_yticks(np.linspace(0, 1, 6))
    figure.savefig(path, dpi=_DPI)


def overlay(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: str | os.PathLike[str]) -> None:
    """Draws the training of several methods in the same panels: the mean over runs, and a band from minimum to maximum.

    Args:
        runs: method -> metrics rows of each of its runs. Running means over a tenth of the run are drawn.
        path: file to write; its suffix chooses the format (png, pdf, svg).

    Raises:
        ValueError: no row has any of the metrics shown.
    """
    panels = _compared(runs)
    if not panels:
        raise ValueError(f"rows must hold at least one of {[p.curves[0][0] for p in _PANELS]}")
    figure = _figure(13.2, 6.4)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(2, -(-len(panels) // 2), index + 1)
        _draw_overlay(axes, panel, runs)
        axes.set_xlabel("training step")
    entries = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in entries}
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=_DPI)


def overlay_panels(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Figure]:
    """Returns {title: figure} of the panels of `overlay` as separate small figures without a legend."""
    figures = {panel.title: _figure(3.6, 2.5) for panel in _compared(runs)}
    for panel in _compared(runs):
        _draw_overlay(figures[panel.title].add_subplot(), panel, runs)
    return figures


def colour(place: int) -> str:
    """Returns the colour "#rrggbb" of the method at `place`: ten strong colours, then pale ones."""
    pairs = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = [*pairs[::2], *pairs[1::2]]
    return to_hex(colours[place % len(colours)])


def _compared(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> list[_Panel]:
    all_rows = [row for method_runs in runs.values() for rows in method_runs for row in rows]
    return [p for p in _present(all_rows, first=True) if p.curves[0][0] != "logp_mismatch"]


def _draw_overlay(axes: Axes, panel: _Panel, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    metric = panel.curves[0][0]
    for place, (method, method_runs) in enumerate(runs.items()):
        curves = [c for rows in method_runs if (c := _curve(rows, metric)) is not None]
        if not curves:
            continue
        shortest = min(len(steps) for steps, _ in curves)
        steps, values = curves[0][0][:shortest], np.stack([v[:shortest] for _, v in curves])
        axes.plot(steps, values.mean(axis=0), color=colour(place), linewidth=1.5, label=method)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour(place), alpha=0.12, linewidth=0)
    _tidy(axes, panel.title, panel.unit, panel.top, panel.percent)


def _present(rows: Sequence[Mapping[str, Any]], first: bool = False) -> list[_Panel]:
    """Returns the panels that have a metric in the rows; with `first`, those whose first metric is in the rows."""
    present = {key for row in rows for key, value in row.items() if value is not None}
    return [p for p in _PANELS if any(metric in present for metric, _, _ in p.curves[: 1 if first else None])]


def _curve(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns (steps, running means) of a metric, or None if no row has it."""
    points = np.array([(row["step"], row[metric]) for row in rows if row.get(metric) is not None], dtype=float)
    return None if not len(points) else (points[:, 0], _running_mean(points[:, 1], len(points) // 20))


def worlds(standings: Sequence[Standing], overlaid: Iterable[str]) -> Figure:
    """Returns a figure of each method's lead over GRPO in each world, and its accuracy before and after.

    Args:
        standings: as `claims.across_worlds` returns them.
        overlaid: methods of `overlay` or `overlay_panels`; they get the same colours in this figure.
    """
    names = list(dict.fromkeys(standing.world for standing in standings))
    methods = list(dict.fromkeys(standing.method for standing in standings))
    order = list(dict.fromkeys([*overlaid, *methods]))
    figure = _figure(10.5, 1.4 + 0.16 * (len(methods) + 1) * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for place, method in enumerate(methods):
        in_worlds = [standing for standing in standings if standing.method == method]
        heights = np.array([-names.index(s.world) + 0.6 * (0.5 - (place + 0.5) / len(methods)) for s in in_worlds])
        for axes, values in ((left, [s.ahead for s in in_worlds]), (right, [s.after for s in in_worlds])):
            if not values[0].pairs:  # GRPO minus GRPO
                continue
            means = np.array([value.mean for value in values])
            whiskers = np.array([(v.mean - v.low, v.high - v.mean) for v in values]).T
            whiskers = np.where(np.isfinite(whiskers), whiskers, 0.0)
            shade = colour(order.index(method))
            axes.errorbar(means, heights, xerr=whiskers, **_WHISKERS | {"ecolor": shade})
            axes.plot(means, heights, "o", color=shade, label=method if axes is right else None)
    before = {standing.world: standing.before for standing in standings}
    starts = [before[name] for name in names]
    right.plot(starts, -np.arange(len(names)), "|", color="black", label="before", markersize=14)
    left.axvline(0, color="0.5", linewidth=0.8)
    left.set_title("Minus GRPO, 95% interval", loc="left", fontsize="medium", fontweight="bold")
    left.set_yticks(-np.arange(len(names)), names)
    right.set_title("Held-out accuracy, 95% interval", loc="left", fontsize="medium", fontweight="bold")
    right.set_xlim(-0.02, 1.02)
    figure.legend(loc="outside lower right", ncols=len(methods) + 1, frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    return figure


def kept(standings: Sequence[Standing]) -> Figure:
    """Returns a figure of accuracy after RL against the part of guided accuracy that is left, a panel for each world.

    Args:
        standings: as `claims.across_worlds` returns them.
    """
    names = list(dict.fromkeys(standing.world for standing in standings))
    methods = list(dict.fromkeys(standing.method for standing in standings))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(10.5, 0.6 + 3.0 * lines)
    panels = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.remove()
    for axes, name in zip(panels, names, strict=False):
        for world, method, *_, after, _, share in standings:
            if world == name and share is not None:
                place = methods.index(method)
                axes.plot(share, after.mean, "osD^v"[place % 5], color=colour(place), label=method)
        axes.set_title(name, loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel("guided accuracy, after / before")
        axes.set_ylabel("accuracy")
        axes.set_xlim(0, 1.05)
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    shown = {line.get_label(): line for axes in panels[: len(names)] for line in axes.get_lines()}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(6, len(shown)), frameon=False)
    return figure


def token_kl(lines: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the mean KL of each response's steps and, beneath on the same axis, the KL of its tokens.

    Args:
        lines: as `analyze.run` returns them.
        path: file to write; its suffix chooses the format (png, pdf, svg).
    """
    columns = min(2, len(lines))
    figure = _figure(7.0 * columns, 3.4 * -(-len(lines) // columns))
    parts = np.ravel(figure.subfigures(-(-len(lines) // columns), columns, squeeze=False))
    with matplotlib.rc_context({"text.parse_math": False}):  # a response may hold any text
        for part, line in zip(parts, lines, strict=False):
            _draw_token_kl(part.subplots(2, 1, sharex=True, height_ratios=(2, 3)), line)
    figure.savefig(path, dpi=_DPI)


def _draw_token_kl(axes: Sequence[Axes], line: Mapping[str, Any]) -> None:
    means, tokens = axes
    for index, step in enumerate(line["steps"]):
        start, width = step["start"] - 0.5, step["stop"] - step["start"]
        means.bar(start, step["mean_kl"], width, align="edge", color=_BLUE, alpha=(0.9, 0.6)[index % 2])
        tokens.axvline(start, color="0.8", linewidth=0.8)
    places = np.arange(len(line["token_kl"]))
    tokens.bar(places, line["token_kl"], 0.9, color=_ORANGE)
    title = f"{line['id']} [{line['outcome']}]  KL(guided ‖ unguided)"
    _tidy(means, title, "step, nats", None, False)
    highest = max([*line["token_kl"], 1e-3])
    _tidy(tokens, "", "token, nats", 1.05 * highest, False)
    tokens.set_xlim(-0.5, max(len(places), 1) - 0.5)
    if line["delta"] and highest >= line["delta"]:
        tokens.axhline(line["delta"], color="black", linewidth=0.8, linestyle=":", label="delta")
        tokens.legend(frameon=False, loc="upper right")
    if len(places) <= _LABELLED:
        shown = [piece.strip()[:12] or "·" for piece in line["tokens"]]
        tokens.set_xticks(places, shown, rotation=90, fontsize="x-small")
    else:
        tokens.set_xlabel("token of the response")
    means.tick_params(axis="x", length=0, labelbottom=False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    return figure


def _draw_panel(axes: Axes, panel: _Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    for metric, label, colour in panel.curves:
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        mean = _running_mean(values, len(values) // 20)
        axes.plot(steps, mean, color=colour, linewidth=1.8, label=label)
    if len(panel.curves) > 1:
        axes.legend(frameon=False, loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    _tidy(axes, panel.title, panel.unit, panel.top, panel.percent)


def _running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean of the values at most `reach` places from each of `values` [steps], without missing ones."""
    means = np.full(len(values), np.nan)
    for index in range(len(values)):
        near = values[max(0, index - reach) : index + reach + 1]
        near = near[np.isfinite(near)]
        if near.size:
            means[index] = near.mean()
    return means


def _tidy(axes: Axes, title: str, unit: str, top: float | None, percent: bool) -> None:
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    # No metric is negative. An axis that starts at zero makes a small change look small.
    highest = 1.05 * axes.dataLim.ymax
    axes.set_ylim(0, top or (highest if 0 < highest < np.inf else 1.0))  # without a number there is no highest
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else "{x:g}")
