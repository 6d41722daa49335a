"""Signs of a collapse, from rows made up for the purpose."""

import pytest

from sgpo_jax import config as configs
from sgpo_jax.training import collapse

HEALTHY = {
    "entropy": 0.5, "response_length": 90.0, "truncated": 0.1, "identical": 0.2, "kl_clip_share": 0.02, "guidance": 0.5,
}  # fmt: skip


@pytest.fixture
def limits():
    limits = configs.base().monitor
    limits.window = 3
    return limits


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("entropy", 0.001, "entropy is 0.001, below monitor.least_entropy=0.005: the policy hardly explores"),
        ("response_length", 1.0, "response_length is 1, below monitor.least_length=2"),
        ("truncated", 0.95, "truncated is 0.95, above monitor.most_truncated=0.9"),
        ("identical", 1.0, "identical is 1, above monitor.most_identical=0.98"),
        ("kl_clip_share", 0.75, "kl_clip_share is 0.75, above monitor.most_clipped=0.5"),
        ("guidance", -0.4, "guidance is -0.4, below monitor.least_guidance=-0.3: guided responses are worse"),
    ],
)
def test_each_sign_is_seen_in_the_mean_of_the_window(limits, metric, value, expected):
    sick = HEALTHY | {metric: value}
    assert collapse.signs([HEALTHY] * 9, limits) == {}
    assert collapse.signs([sick] * 2, limits) == {}, "too few rows to tell"
    assert collapse.signs([sick, sick, sick, HEALTHY, HEALTHY, sick], limits) == {}, "two of the window are well"
    (found,) = collapse.signs([HEALTHY, sick, sick, sick], limits).values()
    assert found.startswith(expected)
    for unknown in (None, float("nan"), float("inf"), -float("inf")):
        assert collapse.signs([sick, sick, sick | {metric: unknown}], limits) == {}
    without = {name: other for name, other in HEALTHY.items() if name != metric}
    assert collapse.signs([without] * 3, limits) == {}, "plain GRPO has no KL"


@pytest.mark.parametrize("metric", ["reward_guided", "solved"])
def test_a_fall_is_measured_from_the_first_window(limits, metric):
    rows = [HEALTHY | {metric: value} for value in (1.0, 0.9, 0.8, 0.2, 0.5, 0.5, 0.5, 0.1, 0.0)]
    assert [len(collapse.signs(rows[:count], limits)) for count in range(1, 10)] == [0, 0, 0, 0, 0, 0, 0, 1, 1]
    (found,) = collapse.signs(rows, limits).values()
    assert found.startswith(f"{metric} is 0.2, a fall by 0.7, above monitor.most_")
    assert collapse.signs([HEALTHY, *rows[1:]], limits) == {}, "the start is not known"
    watch = collapse.Watch(limits, rows[:7])
    limits.action = "stop"
    assert watch(rows[7]).startswith(f"{metric} is 0.3667"), "a resumed run knows its start"


def test_every_limit_is_a_field_of_the_config(limits):
    assert {*collapse.LIMITS, "window", "action", "most_rollbacks"} == set(limits)


def test_a_sign_is_said_once_and_again_when_it_comes_back(limits, capsys):
    limits.window = 1
    watch = collapse.Watch(limits, [])
    sick = HEALTHY | {"entropy": 0.0}
    said = []
    for row in (HEALTHY, sick, sick, HEALTHY, sick):
        assert watch(row) == ""
        said.append(capsys.readouterr().out.count("warning: entropy is 0, below"))
    assert said == [0, 1, 0, 0, 1]
    limits.action = "stop"
    watch = collapse.Watch(limits, [])
    assert watch(HEALTHY) == "" and watch(sick).startswith("entropy is 0, below")


def test_a_resumed_run_knows_the_rows_of_before(limits, capsys):
    sick = HEALTHY | {"entropy": 0.0}
    limits.action = "stop"
    watch = collapse.Watch(limits, [HEALTHY, sick, sick])
    assert watch(sick).startswith("entropy is 0, below") and "warning: entropy is 0" in capsys.readouterr().out
    watch = collapse.Watch(limits, [sick, sick, sick])
    assert watch(sick).startswith("entropy is 0, below") and capsys.readouterr().out == "", "said already"
