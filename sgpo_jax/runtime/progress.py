"""One line of progress, with the time left."""

from datetime import timedelta

# Metrics worth a place on the progress line, in this order: name, label, format.
_SHOWN = (
    ("loss", "loss", ".4f"),
    ("validation_loss", "val", ".4f"),
    ("reward_auto", "auto", ".3f"),
    ("reward_guided", "guided", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("alpha", "alpha", ".3f"),
    ("token_kl", "kl", ".3f"),
    ("response_length", "len", ".0f"),
    ("tokens_per_second", "tok/s", ".0f"),
    ("tokens_per_second_rollout", "gen tok/s", ".0f"),
    ("tokens_per_second_update", "train tok/s", ".0f"),
)


def progress_line(
    name: str,
    step: int,
    total_steps: int,
    metrics: dict[str, int | float],
    seconds_left: float | None,
) -> str:
    """Returns the progress as one line of text: position, time left, the telling metrics.

    Args:
        name: the stage.
        step: steps done.
        total_steps: steps in all.
        metrics: the step's metrics; those that have no place on the line are left out.
        seconds_left: None when not known yet.
    """
    parts = [f"{name} {step}/{total_steps}"]
    if seconds_left is not None:
        parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    parts += [f"{label} {metrics[key]:{form}}" for key, label, form in _SHOWN if key in metrics]
    return "  ".join(parts)
