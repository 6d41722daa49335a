"""The page of a run or a lab: one HTML file that needs no network, made of what is in the folder.

Texts of problems, models and configs are data: Jinja escapes them, and the page's Content-Security-Policy lets no
script run but its own, and nothing be loaded.
"""

import base64
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sgpo_jax import config as configs
from sgpo_jax.report import examples, figures, reasoning_steps
from sgpo_jax.runtime.files import read_jsonl
from sgpo_jax.stats import benchmark, claims

REFRESH = 30  # seconds after which the page of a run that goes on is loaded again
_RECENT = 10  # steps whose mean reward stands for an accuracy that was not measured

Row = dict[str, Any]


def write_run(workdir: Path, status: str = "", running: bool = False, to: Path | None = None) -> Path:
    """Writes the page of a run, as far as it has come.

    Args:
      workdir: folder of the run.
      status: how far it is.
      running: the page loads itself again.
      to: file to write; None is report.html in `workdir`.

    Raises:
      ValueError: there is no run in `workdir`, or a file of it is broken.
    """
    config = read_config(workdir)
    rl, sft = _rows(workdir / "rl.jsonl"), _rows(workdir / "sft.jsonl")
    results = {
        when: {kind: _json(path)["results"] for kind in ("unguided", "guided")
               if (path := workdir / "eval" / f"{when}_{kind}.json").is_file()}
        for when in ("before", "after")
    }  # fmt: skip
    done = [f"{name} {rows[-1]['step']} steps" for name, rows in (("SFT", sft), ("RL", rl)) if rows]
    seconds = sum(row.get("seconds_step") or 0.0 for row in (*sft, *rl))
    facts = [config["model"]["source"], *done, f"{_duration(seconds)} of training", f"seed {config['seed']}"]
    charts = {name: figures.svg(figure, name) for name, figure in figures.panels(rl).items()}
    if curve := figures.loss_panel(sft):
        charts = {"SFT loss": figures.svg(curve, "SFT loss")} | charts
    return _write(
        workdir, to, status, running, kind="run", facts=facts, cards=_cards(results) or _training_cards(rl),
        charts=charts, tables=_evaluation_table(results), legend=[], wide=[], config=config,
        samples=_samples(workdir, config), analysis=_analysis(workdir / "analysis.jsonl"), starts=_starts(workdir),
    )  # fmt: skip


def write_lab(
    workdir: Path,
    rows: Sequence[Row],
    tuning: Sequence[Row],
    *,
    home: str,
    runs: Callable[[Row], Path],
    status: str = "",
    running: bool = False,
    to: Path | None = None,
) -> Path:
    """Writes the page of a lab, as far as it has come.

    Args:
      workdir: folder of the lab.
      rows, tuning, home: as in `claims.tables`.
      runs: folder of the training run that a row is of.
      status, running, to: as in `write_run`.

    Raises:
      ValueError: there is no lab in `workdir`, or a file of it is broken.
    """
    config = read_config(workdir)
    here = [row for row in rows if row["world"] == home] or [row for row in tuning if row["world"] == home]
    methods = [name for name in dict.fromkeys(row["method"] for row in here) if name != "sft"]
    curves = {name: [_rows(runs(row) / "rl.jsonl") for row in here if row["method"] == name] for name in methods}
    worlds = claims.across_worlds(rows)
    wide = [("Worlds", figures.svg(figures.worlds(worlds, methods), "worlds"))] if worlds else []
    counts = {name: len(config["lab"][f"{name}s"]) for name in ("method", "seed", "world")}
    facts = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()] + [config["model"]["source"]]
    shown: list[Any] = []
    for row in [row for row in rows if (row["world"], row["method"]) == (home, "sgpo")][:1]:
        (warm_up,) = (r for r in rows if (r["world"], r["method"], r["seed"]) == (home, "sft", row["seed"]))
        folders = {"before": runs(warm_up) / "eval", "after": runs(row) / "eval"}
        of_run = examples.of_sets(config["eval"]["sets"], folders)
        shown = [(f"{name}: sgpo in {home}, seed {row['seed']}", *rest) for name, *rest in of_run]
    return _write(
        workdir, to, status, running, kind="lab", facts=facts, cards=_lab_cards(rows, home),
        charts={name: figures.svg(figure, name) for name, figure in figures.overlay_panels(curves).items()},
        legend=[(name, figures.colour(place)) for place, name in enumerate(methods)], wide=wide,
        tables=claims.tables(rows, tuning, home), config=config, samples=shown, analysis=[],
        starts=_starts(runs(here[0])) if here else [],
    )  # fmt: skip


def live(workdir: Path, seconds: float, stage: str, total: int) -> Callable[[int], None]:
    """`show(step)`, which writes the page of a run that goes on, at most once in so many seconds; 0 is never."""
    last = -math.inf

    def show(step: int) -> None:
        nonlocal last
        if seconds and time.monotonic() - last >= seconds:
            attempt(write_run, workdir, f"{stage} step {step} of {total}", running=True)
            last = time.monotonic()  # after it, so that a slow page cannot take more than its share

    return show


def attempt(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls `write`; whatever goes wrong with a page is one line, and the run goes on."""
    try:
        write(*args, **kwargs)
    except Exception as error:
        print(f"report: not written: {type(error).__name__}: {error}", flush=True)


def _write(workdir: Path, to: Path | None, status: str, running: bool, **content: Any) -> Path:
    loader = PackageLoader("sgpo_jax.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("report.html").render(
        **content, title=workdir.absolute().name, status=status, refresh=REFRESH if running else 0,
        strengths=partial(_strengths, delta=content["config"]["rl"]["delta"]),
        script=script, script_digest=digest, changed=_changed(content["config"]),
        fields=sorted(configs.flat(content["config"]).items()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    path = to or workdir / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of the run or lab in `workdir`, as JSON has it.

    Raises:
      ValueError: there is none.
    """
    if not (workdir / "config.json").is_file():
        raise ValueError(f"workdir={str(workdir)!r}: must be the folder of a run or a lab, which has a config.json")
    return _json(workdir / "config.json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _rows(path: Path) -> list[Row]:
    return read_jsonl(path) if path.is_file() else []


def _changed(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value, the recipe's value) where the config is not the paper's recipe."""
    recipe = configs.flat(json.loads(configs.to_json(configs.base())))
    return [(name, value, recipe.get(name, "")) for name, value in configs.flat(config).items()
            if name not in recipe or recipe[name] != value]  # fmt: skip


def _starts(run: Path) -> list[tuple[str, list[Any]]]:
    """(name, its value at each start) of the environment of a run."""
    path = run / "environment.json"
    starts = _json(path) if path.is_file() else []
    names = dict.fromkeys(name for start in starts for name in start)
    return [(name, [start.get(name) for start in starts]) for name in names]


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _bounds(low: float, high: float, sign: str = "") -> str:
    return f"[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _card(label: str, values: Iterable[str], note: str, bounds: Iterable[str] = (), between: str = "→") -> Row:
    return {"label": label, "values": [*values], "bounds": [*bounds], "note": note, "between": between}


def _cards(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Accuracy of each set before and after, guided and not, with 95 % intervals."""
    cards = []
    kinds = dict.fromkeys(kind for found in results.values() for kind in found)
    names = dict.fromkeys(name for found in results.values() for sets in found.values() for name in sets)
    for name in names:
        for kind in kinds:
            found = [sets[kind][name] for sets in results.values() if name in sets.get(kind, {})]
            note = f"{found[0]['problems']} problems, 95 % intervals"
            if len(found) == 2:
                mean, low, high = benchmark.gain(found[0]["per_problem"], found[1]["per_problem"])
                note = f"{100 * mean:+.1f} points {_bounds(low, high, '+')} over {found[0]['problems']} problems"
            bounds = [_bounds(*result["intervals"]["accuracy"]) for result in found]
            cards.append(_card(f"{name}, {kind}", [_percent(r["accuracy"]) for r in found], note, bounds))
    return cards


def _training_cards(rows: Sequence[Row]) -> list[Row]:
    """Where no evaluation is there yet: the reward during training, at its beginning and now."""
    cards = []
    for metric, label in (("reward_auto", "reward, unguided"), ("reward_guided", "reward, guided")):
        values = [row[metric] for row in rows if row.get(metric) is not None]
        if values:
            ends = np.mean(values[:_RECENT]), np.mean(values[-_RECENT:])
            note = f"of training problems, mean of the first and the last {min(_RECENT, len(values))} steps"
            cards.append(_card(label, [_percent(float(x)) for x in ends], note))
    return cards


def _lab_cards(rows: Sequence[Row], home: str) -> list[Row]:
    """SGPO against each of the paper's competitors in the first world, and how many of its claims hold."""
    cards = []
    for method in ("grpo", "luffy", "hpt"):
        apart = claims.paired(rows, home, "sgpo", method)
        if not apart.pairs:
            continue
        ends = [claims.interval([*claims.by_seed(rows, home, name).values()]) for name in (method, "sgpo")]
        known = math.isfinite(apart.low)
        note = f"{100 * apart.mean:+.1f} points {_bounds(apart.low, apart.high, '+') if known else ''}"
        note += f", paired over {apart.pairs} seeds" if apart.pairs > 1 else ", one seed"
        bounds = [_bounds(e.low, e.high) for e in ends] if known else []
        cards.append(_card(f"{method.upper()} vs SGPO", [_percent(end.mean) for end in ends], note, bounds, "vs"))
    if found := [verdict for _, _, verdict in claims.claims(rows, home)]:
        note = ", ".join(f"{found.count(name)} {name}" for name in dict.fromkeys(found))
        cards.append(_card("the paper's claims", [str(len(found))], note))
    return cards


def _evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    lines = []
    for when, kinds in results.items():
        for kind, sets in kinds.items():
            for name, result in sets.items():
                most = max(int(key.partition("@")[2]) for key in result if key.startswith("pass@"))
                shares = [f"{_percent(result[m])} {_bounds(*result['intervals'][m])}"
                          for m in ("accuracy", f"pass@{most}", f"maj@{most}")]  # fmt: skip
                numbers = [f"{result['length']:.1f}", _percent(result["truncated"]), _percent(result["no_box"])]
                lines.append([name, kind, f"{when} RL", str(most), *shares, *numbers])
    columns = ["set", "prompt", "", "k", "avg@k, %", "pass@k, %", "maj@k, %", "tokens", "cut, %", "no box, %"]
    order = {name: i for i, name in enumerate(dict.fromkeys(line[0] for line in lines))}
    lines.sort(key=lambda line: (order[line[0]], line[1] == "guided"))
    return [("Evaluation, with 95 % bootstrap intervals over problems", columns, lines)] if lines else []


def _samples(workdir: Path, config: dict[str, Any]) -> list[tuple[str, examples.Samples, str]]:
    """(set, samples, column they are counted by): of the last stage, or else of the latest evaluation in training."""
    sets = config["eval"]["sets"]
    found = examples.of_sets(sets, {when: workdir / "eval" / when for when in ("before", "after")})
    analysed = _rows(workdir / "analysis_generations.jsonl")
    found = [(name, examples.with_token_kl(shown, analysed), judged) for name, shown, judged in found]
    return found or examples.of_sets(sets, {"during": workdir / "rl" / "generations"})


def _analysis(path: Path) -> list[Row]:
    """The lines of analysis.jsonl, their tokens grouped by step: (text, nats, strength of the colour, above delta)."""
    lines = _rows(path)
    for line in lines:
        strongest = max((step["mean_kl"] for step in line["steps"]), default=0.0) or 1.0
        for step in line["steps"]:
            part = slice(step["start"], step["stop"])
            texts = [text.replace("\n", "↵") for text in line["tokens"][part]]
            pairs = zip([texts[0].lstrip(), *texts[1:]], line["token_kl"][part], strict=True)
            step["share"] = step["mean_kl"] / strongest
            step["tokens"] = _strengths(pairs, line["delta"] or math.inf)
    return lines


def _strengths(pairs: Iterable[tuple[str, float]], delta: float) -> list[tuple[str, float, float, bool]]:
    """(text, nats, strength of the colour, whether it is above delta) of tokens."""
    clip = delta if math.isfinite(delta) else None
    return [(text, kl, reasoning_steps.strength(kl, clip), kl > delta) for text, kl in pairs]
