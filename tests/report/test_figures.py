"""The figures, looked at through what matplotlib was asked to draw."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from sgpo_jax.report import figures
from sgpo_jax.stats import claims

ROWS = [
    {"step": 1, "reward_auto": 0.25, "reward_guided": 0.5, "alpha": 0.5, "loss": 9.0},
    {"step": 2, "reward_auto": 0.75, "reward_guided": 0.5, "alpha": None, "loss": 9.0},
    {"step": 3, "reward_auto": 0.5, "reward_guided": 1.0, "alpha": 0.25, "loss": 9.0},
]
BEFORE = {"unguided": (0.2, 0.15, 0.3), "guided": (0.6, 0.5, 0.7)}
AFTER = {"unguided": (0.7, 0.6, 0.75), "guided": (0.9, 0.85, 1.0)}


@pytest.fixture
def drawn(monkeypatch):
    """Returns the list of the figures saved during the test, in order."""
    saved = []
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def curve(axes, index):
    """Returns the raw values of curve `index` as (steps, values); its smoothed curve is the next line."""
    line = axes.get_lines()[2 * index]
    return list(line.get_xdata()), list(line.get_ydata())


def test_training_curves_shows_the_rows(tmp_path, drawn):
    figures.training_curves(ROWS, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    reward, alpha = drawn[0].axes  # the panels whose metrics are there, and no other
    assert (reward.get_title("left"), alpha.get_title("left")) == ("Reward", "Distillation weight α")
    assert curve(reward, 0) == ([1, 2, 3], [0.25, 0.75, 0.5])
    assert curve(reward, 1) == ([1, 2, 3], [0.5, 0.5, 1.0])
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["unguided", "guided"]
    steps, values = curve(alpha, 0)
    assert steps == [1, 2, 3] and values[0] == 0.5 and values[1] != values[1]


@pytest.mark.parametrize("loss", [None, float("nan"), 0.0])
def test_a_run_without_a_number_has_its_panels(tmp_path, drawn, loss):
    rows = [{"step": step, "reward_auto": 0.5, "token_kl": loss} for step in (1, 2)]
    figures.training_curves(rows, tmp_path / "curves.png")
    assert all(axes.get_ylim()[1] == 1.0 for axes in drawn[0].axes)
    assert figures.loss_panel([{"step": 1, "loss": loss}, {"step": 2, "loss": None}])


def test_every_panel_names_its_unit(tmp_path, drawn):
    metrics = [metric for panel in figures._PANELS for metric, _, _ in panel.curves]
    figures.training_curves([{"step": 1, **dict.fromkeys(metrics, 0.0)}], tmp_path / "curves.pdf")
    assert len(drawn[0].axes) == len(figures._PANELS)
    assert all(axes.get_ylabel() for axes in drawn[0].axes)
    assert [bool(axes.get_xlabel()) for axes in drawn[0].axes] == [False] * 4 + [True] * 4


def test_thick_lines_are_centred_means_that_skip_gaps():
    values = np.array([1.0, 2.0, np.nan, 4.0])
    assert figures._running_mean(values, 1).tolist() == [1.5, 1.5, 3.0, 4.0]
    assert figures._running_mean(np.array([np.nan, 1.0]), 0)[1] == 1.0


def test_nothing_to_draw_is_an_error(tmp_path):
    for rows in ([], [{"step": 1, "loss": 1.0}], [{"step": 1, "alpha": None}]):
        with pytest.raises(ValueError, match="rows must hold at least one of"):
            figures.training_curves(rows, tmp_path / "curves.png")


def test_summary_shows_accuracies_and_their_intervals(tmp_path, drawn):
    figures.summary(ROWS, BEFORE, AFTER, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    curves, bars = drawn[0].axes
    assert curve(curves, 1)[1] == [0.5, 0.5, 1.0]
    assert [bar.get_height() for bar in bars.patches] == [0.2, 0.7, 0.6, 0.9]
    assert [text.get_text() for text in bars.texts] == ["20%", "70%", "60%", "90%"]
    names = [label.get_text().strip() for label in bars.get_xticklabels()]
    assert names == ["before", "unguided", "after", "before", "guided", "after"]
    ends = [y for whisker in bars.collections for segment in whisker.get_segments()
            for y in segment[:, 1]]  # fmt: skip
    assert ends == pytest.approx([0.15, 0.3, 0.6, 0.75, 0.5, 0.7, 0.85, 1.0])


def test_summary_of_unguided_accuracy_alone(tmp_path, drawn):
    before, after = ({"unguided": results["unguided"]} for results in (BEFORE, AFTER))
    figures.summary(ROWS, before, after, tmp_path / "summary.png")
    assert [bar.get_height() for bar in drawn[0].axes[1].patches] == [0.2, 0.7]


def test_summary_forgives_rounding(tmp_path):
    same = {"unguided": (1.0, 1.0 + 1e-9, 1.0 - 1e-9), "guided": (0.0, 0.0, 0.0)}
    figures.summary(ROWS, same, same, tmp_path / "summary.png")


def test_summary_refuses_wrong_accuracies(tmp_path):
    with pytest.raises(ValueError, match="after must hold the same"):
        figures.summary(ROWS, BEFORE, {"unguided": (0.7, 0.6, 0.75)}, tmp_path / "summary.png")
    for wrong in ({}, {"oracle": (0.7, 0.6, 0.75)}):
        with pytest.raises(ValueError, match="before must hold the same"):
            figures.summary(ROWS, wrong, wrong, tmp_path / "summary.png")
    for wrong in ((0.7, 0.75, 0.8), (0.9, 0.6, 0.8), (70.0, 60.0, 75.0), (0.5, -0.1, 0.6)):
        with pytest.raises(ValueError, match=r"guided: accuracy .* must lie in its interval"):
            figures.summary(ROWS, BEFORE, {**AFTER, "guided": wrong}, tmp_path / "summary.png")


def test_methods_are_laid_over_each_other(tmp_path, drawn):
    """The figure has the mean of each method's runs and their band, over the steps that all runs have."""
    runs = {
        "sgpo": [ROWS, [{**row, "reward_auto": row["reward_auto"] / 2} for row in ROWS[:2]]],
        "grpo": [[{key: value for key, value in row.items() if key != "alpha"} for row in ROWS]],
    }
    figures.overlay(runs, tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 0
    reward, alpha = drawn[0].axes
    sgpo, grpo = reward.get_lines()
    assert list(sgpo.get_xdata()) == [1, 2] and list(sgpo.get_ydata()) == [0.1875, 0.5625]
    assert list(grpo.get_ydata()) == [0.25, 0.75, 0.5]
    band = reward.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.125, 0.75)
    assert [line.get_label() for line in alpha.get_lines()] == ["sgpo"]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["sgpo", "grpo"]
    with pytest.raises(ValueError, match="at least one of"):
        figures.overlay({"sgpo": [[{"step": 1, "loss": 1.0}]]}, tmp_path / "none.png")


def test_a_few_methods_have_strong_colours_and_twenty_have_different_ones():
    def lightness(place):
        return sum(int(figures.colour(place)[start : start + 2], 16) for start in (1, 3, 5)) / (3 * 255)

    assert len({figures.colour(place) for place in range(20)}) == 20 and figures.colour(20) == figures.colour(0)
    assert all(lightness(place) < lightness(place + 10) for place in range(10)), "the pale one of each pair is later"


def test_what_is_kept_is_drawn_in_a_panel_for_each_world(tmp_path, drawn):
    none, after = claims.interval([]), claims.interval([0.5, 0.7])
    found = [
        claims.Standing("base", "grpo", 1.0, 0.2, after, none, 0.9),
        claims.Standing("base", "sgpo", 1.0, 0.2, after, none, 0.25),
        claims.Standing("rare", "sgpo", 1.0, 0.1, none, none, None),
    ]
    figures.kept(found).savefig(tmp_path / "kept.png")
    base, rare = drawn[0].axes
    points = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in base.get_lines()}
    assert points == {"grpo": (0.9, after.mean), "sgpo": (0.25, after.mean)} and not rare.get_lines()
    assert [axes.get_title(loc="left") for axes in (base, rare)] == ["base", "rare"]


def test_worlds_are_drawn_with_their_intervals(tmp_path, drawn):
    def difference(mean, half):
        return claims.Difference(mean, mean - half, mean + half, 5)

    def standing(world, method, before, after, ahead):
        return claims.Standing(world, method, 1.0, before, difference(*after), ahead, None)

    none = claims.interval([])
    found = [
        standing("base", "grpo", 0.25, (0.8, 0.02), none),
        standing("base", "sgpo", 0.25, (0.85, 0.01), difference(0.05, 0.03)),
        standing("rare", "grpo", 0.02, (0.1, 0.02), none),
        standing("rare", "sgpo", 0.02, (0.5, 0.01), difference(0.4, float("inf"))),
    ]
    figures.worlds(found, ["luffy", "hpt", "sgpo"]).savefig(tmp_path / "worlds.png")
    left, right = drawn[0].axes
    labels = {text.get_position()[1]: text.get_text() for text in left.get_yticklabels()}
    assert labels == {0: "base", -1: "rare"}, "the first one on top"
    (points,) = [line for line in left.get_lines() if line.get_marker() == "o"]
    assert points.get_color() == figures.colour(2), "as beside luffy and hpt"
    assert list(points.get_xdata()) == [0.05, 0.4] and np.diff(points.get_ydata()) == pytest.approx([-1])
    ends = left.collections[0].get_segments()
    assert [list(segment[:, 0]) for segment in ends] == [pytest.approx([0.02, 0.08]), pytest.approx([0.4, 0.4])]
    marks = {line.get_label(): line for line in right.get_lines()}
    found = {name: list(line.get_xdata()) for name, line in marks.items() if not name.startswith("_")}
    assert found == {"grpo": [0.8, 0.1], "sgpo": [0.85, 0.5], "before": [0.25, 0.02]}
    heights = {name: line.get_ydata() for name, line in marks.items()}
    assert (heights["grpo"] > heights["sgpo"]).all() and np.ptp([*heights["grpo"][:1], *heights["sgpo"][:1]]) < 0.5
