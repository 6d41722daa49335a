"""The page of a run or a lab: one HTML file, made from the files of its folder, that needs no network.

Texts of problems, models and configs are data: Jinja escapes them. The page's Content-Security-Policy runs only the
page's own script and loads nothing.
"""

import base64
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sgpo_jax import config as configs
from sgpo_jax.report import examples, reasoning_steps, titles
from sgpo_jax.runtime.files import jsonl, read_jsonl, write_text
from sgpo_jax.stats import benchmark, claims

EVALUATION_COLUMNS = ["set", "prompt", "", "k", "avg@k, %", "pass@k, %", "maj@k, %", "tokens", "cut, %", "no box, %"]
REFRESH = 30  # seconds after which the page of a running run reloads itself
_RECENT = 10  # steps whose mean reward is shown while no accuracy has been measured

Row = dict[str, Any]


def write_run(workdir: Path, status: str = "", running: bool = False, to: Path | None = None) -> Path:
    """Writes the page of a finished or running run and returns its path.

    Args:
      workdir: folder of the run.
      status: how far the run is, shown at the top.
      running: whether the page reloads itself.
      to: file to write; None is report.html in `workdir`.

    Raises:
      ValueError: there is no run in `workdir`, or one of its files is broken.
    """
    from sgpo_jax.report import figures  # matplotlib takes a fifth of the start of a run, and not every process draws

    config = read_config(workdir)
    rl, sft = read_rows(workdir / "rl.jsonl"), read_rows(workdir / "sft.jsonl")
    results = read_results(workdir)
    steps = [f"{name} {rows[-1]['step']} steps" for name, rows in (("SFT", sft), ("RL", rl)) if rows]
    seconds = sum(row.get("seconds_step") or 0.0 for row in (*sft, *rl))
    facts = [*steps, f"{_duration(seconds)} of training", f"seed {config['seed']}"]
    charts = {name: figures.svg(figure, name) for name, figure in figures.panels(rl).items()}
    if curve := figures.loss_panel(sft):
        charts = {"SFT loss": figures.svg(curve, "SFT loss")} | charts
    starts = _starts(workdir)
    return render(
        workdir, to, status, running, kind="run", title=titles.title_of(config), commit=titles.commit_of(starts),
        facts=facts, cards=accuracy_cards(results) or _training_cards(rl), notes=_fallen(results), charts=charts,
        tables=evaluation_table(results), legend=[], wide=[], config=config, samples=_samples(workdir, config),
        analysis=_analysis(workdir / "analysis.jsonl"), starts=starts,
        downloads=[] if running else downloads({"sft.jsonl": sft, "rl.jsonl": rl}, results),
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
    """Writes the page of a finished or running lab and returns its path.

    Args:
      workdir: folder of the lab.
      rows, tuning, home: as in `claims.tables`.
      runs: row -> folder of its training run.
      status, running, to: as in `write_run`.

    Raises:
      ValueError: there is no lab in `workdir`, or one of its files is broken.
    """
    from sgpo_jax.report import figures

    config = read_config(workdir)
    home_rows = [row for row in rows if row["world"] == home] or [row for row in tuning if row["world"] == home]
    shown = [name for name in dict.fromkeys(row["method"] for row in home_rows) if name != "sft"]
    curves = {name: [read_rows(runs(row) / "rl.jsonl") for row in home_rows if row["method"] == name] for name in shown}
    worlds = claims.across_worlds(rows)
    drawn = {"Worlds": figures.worlds(worlds, shown), "What is kept": figures.kept(worlds)} if worlds else {}
    wide = [(title, figures.svg(figure, f"wide{i}")) for i, (title, figure) in enumerate(drawn.items())]
    counts = {name: len(config["lab"][f"{name}s"]) for name in ("method", "seed", "world")}
    facts = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()]
    samples: list[Any] = []
    for row in [row for row in rows if (row["world"], row["method"]) == (home, "sgpo")][:1]:
        (warm_up,) = (r for r in rows if (r["world"], r["method"], r["seed"]) == (home, "sft", row["seed"]))
        folders = {"before": runs(warm_up) / "eval", "after": runs(row) / "eval"}
        by_set = examples.collect(config["eval"]["sets"], folders)
        samples = [(f"{name}: sgpo in {home}, seed {row['seed']}", *rest) for name, *rest in by_set]
    starts = _starts(runs(home_rows[0])) if home_rows else []
    return render(
        workdir, to, status, running, kind="lab", title=f"Lab · {titles.model_of(config)} · {titles.data_of(config)}",
        commit=titles.commit_of(starts), facts=facts, cards=_lab_cards(rows, home), notes=[],
        charts={name: figures.svg(figure, name) for name, figure in figures.overlay_panels(curves).items()},
        legend=[(name, figures.colour(place)) for place, name in enumerate(shown)], wide=wide,
        tables=claims.tables(rows, tuning, home), config=config, samples=samples, analysis=[], starts=starts,
        downloads=[] if running else downloads({"results.jsonl": rows}, {}),
    )  # fmt: skip


def live(workdir: Path, seconds: float, stage: str, total: int) -> Callable[[int], None]:
    """Returns `show(step)`, which writes the page of a running run.

    Args:
      workdir: folder of the run.
      seconds: least time between two pages; 0 never writes one.
      stage: the stage's name in the page's status.
      total: steps of the stage.
    """
    last = -math.inf

    def show(step: int) -> None:
        nonlocal last
        if seconds and time.monotonic() - last >= seconds:
            attempt(write_run, workdir, f"{stage} step {step} of {total}", running=True)
            last = time.monotonic()  # read after writing, so that a slow page does not slow the run down

    return show


def attempt(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Calls `write`. An error in writing a page is printed as one line and does not stop the run."""
    try:
        write(*args, **kwargs)
    except Exception as error:
        print(f"report: not written: {type(error).__name__}: {error}", flush=True)


def render(workdir: Path, to: Path | None, status: str, running: bool, **content: Any) -> Path:
    """Writes a page and returns its path.

    Args:
      workdir: folder of the run or the lab; its name is shown.
      to, status, running: as in `write_run`.
      content: the variables of templates/report.html.
    """
    loader = PackageLoader("sgpo_jax.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    config = content.pop("config")
    text = environment.get_template("report.html").render({
        "name": workdir.absolute().name, "status": status, "refresh": REFRESH if running else 0,
        "strengths": partial(_strengths, delta=config["rl"]["delta"]), "script": script, "script_digest": digest,
        "sides": ["here", "recipe"], "changed": _changed(config), "fields": sorted(configs.flat(config).items()),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **content,
    })  # fmt: skip
    path = to or workdir / "report.html"
    write_text(path, text)
    return path


def read_config(workdir: Path) -> dict[str, Any]:
    """Reads the config of the run or lab in `workdir` as a dict.

    Raises:
      ValueError: there is no config.
    """
    if not (workdir / "config.json").is_file():
        raise ValueError(f"workdir={str(workdir)!r}: must be the folder of a run or a lab, which has a config.json")
    return _json(workdir / "config.json")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_rows(path: Path) -> list[Row]:
    """Reads the rows of a JSONL file; none where there is no file."""
    return read_jsonl(path) if path.is_file() else []


def read_results(workdir: Path) -> dict[str, dict[str, Any]]:
    """Reads {"before" or "after": {context: {set: result}}} of the final evaluations that a run has."""
    return {
        when: {context: _json(path)["results"] for context in benchmark.CONTEXTS
               if (path := workdir / "eval" / f"{when}_{context}.json").is_file()}
        for when in ("before", "after")
    }  # fmt: skip


def _fallen(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a note on each set where guided accuracy is lower after RL than before, beyond chance."""
    notes = []
    before, after = (results[when].get("guided", {}) for when in ("before", "after"))
    for name in [name for name in before if name in after]:
        mean, _, high = benchmark.gain(before[name]["per_problem"], after[name]["per_problem"])
        if high < 0:
            ends = (_percent(result["accuracy"]) for result in (before[name], after[name]))
            notes.append(
                f"Guided accuracy on {name} has fallen, from {' to '.join(ends)} % ({100 * mean:+.1f} points). No term "
                "of the objective trains guided answers; what the model learns without strategies can disturb them. In "
                "use it gets no strategy, so the unguided accuracy counts."
            )
    return notes


def downloads(files: Mapping[str, Sequence[Row]], results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (name, content in base64, size) of the files behind a page."""
    texts = {name: jsonl(rows) for name, rows in files.items() if rows}
    if any(results.values()):
        texts["evaluation.json"] = json.dumps(results, indent=1) + "\n"
    return [
        (name, base64.b64encode(text.encode()).decode(), f"{max(len(text) // 1000, 1)} kB")
        for name, text in texts.items()
    ]


def _changed(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns (field, value, the recipe's value) of every field that differs from the paper's recipe."""
    recipe = configs.flat(configs.to_dict(configs.base()))
    return [(name, value, recipe.get(name, "")) for name, value in configs.flat(config).items()
            if name not in recipe or recipe[name] != value]  # fmt: skip


def _starts(run: Path) -> list[tuple[str, list[Any]]]:
    """Returns (name, its value at each start) of the environment of a run."""
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


def accuracy_cards(results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Returns cards with the accuracy of each set and context before and after RL, with 95 % intervals."""
    cards = []
    contexts = dict.fromkeys(context for by_context in results.values() for context in by_context)
    names = dict.fromkeys(name for by_context in results.values() for sets in by_context.values() for name in sets)
    for name in names:
        for context in contexts:
            ends = [sets[context][name] for sets in results.values() if name in sets.get(context, {})]
            note = f"{ends[0]['problems']} problems, 95 % intervals"
            if len(ends) == 2:
                mean, low, high = benchmark.gain(ends[0]["per_problem"], ends[1]["per_problem"])
                note = f"{100 * mean:+.1f} points {_bounds(low, high, '+')} over {ends[0]['problems']} problems"
            bounds = [_bounds(*result["intervals"]["accuracy"]) for result in ends]
            cards.append(_card(f"{name}, {context}", [_percent(r["accuracy"]) for r in ends], note, bounds))
    return cards


def _training_cards(rows: Sequence[Row]) -> list[Row]:
    """Returns cards for a run without an evaluation: the training reward at its beginning and now."""
    cards = []
    for metric, label in (("reward_auto", "reward, unguided"), ("reward_guided", "reward, guided")):
        values = [row[metric] for row in rows if row.get(metric) is not None]
        if values:
            ends = np.mean(values[:_RECENT]), np.mean(values[-_RECENT:])
            note = f"of training problems, mean of the first and the last {min(_RECENT, len(values))} steps"
            cards.append(_card(label, [_percent(float(x)) for x in ends], note))
    return cards


def _lab_cards(rows: Sequence[Row], home: str) -> list[Row]:
    """Returns cards that compare SGPO with each of the paper's competitors at home and count the claims that hold."""
    cards = []
    for method in ("grpo", "luffy", "hpt"):
        difference = claims.paired(rows, home, "sgpo", method)
        if not difference.pairs:
            continue
        ends = [claims.interval([*claims.by_seed(rows, home, name).values()]) for name in (method, "sgpo")]
        has_interval = math.isfinite(difference.low)
        note = f"{100 * difference.mean:+.1f} points "
        note += _bounds(difference.low, difference.high, "+") if has_interval else ""
        note += f", paired over {difference.pairs} seeds" if difference.pairs > 1 else ", one seed"
        bounds = [_bounds(end.low, end.high) for end in ends] if has_interval else []
        cards.append(_card(f"{method.upper()} vs SGPO", [_percent(end.mean) for end in ends], note, bounds, "vs"))
    if verdicts := [verdict for _, _, verdict in claims.claims(rows, home)]:
        note = ", ".join(f"{verdicts.count(name)} {name}" for name in dict.fromkeys(verdicts))
        cards.append(_card("the paper's claims", [str(len(verdicts))], note))
    return cards


def evaluation_table(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns the table (title, columns, lines) of all evaluation results, in a list that is empty without results."""
    lines = []
    for when, by_context in results.items():
        for context, sets in by_context.items():
            for name, result in sets.items():
                k = max(int(key.partition("@")[2]) for key in result if key.startswith("pass@"))
                shares = [f"{_percent(result[m])} {_bounds(*result['intervals'][m])}"
                          for m in ("accuracy", f"pass@{k}", f"maj@{k}")]  # fmt: skip
                numbers = [f"{result['length']:.1f}", _percent(result["truncated"]), _percent(result["no_box"])]
                lines.append([name, context, f"{when} RL", str(k), *shares, *numbers])
    order = {name: i for i, name in enumerate(dict.fromkeys(line[0] for line in lines))}
    lines.sort(key=lambda line: (order[line[0]], line[1] == "guided"))
    return [("Evaluation, with 95 % bootstrap intervals over problems", EVALUATION_COLUMNS, lines)] if lines else []


def _samples(workdir: Path, config: dict[str, Any]) -> list[tuple[str, examples.Samples, str]]:
    """Returns (set, samples, column they are counted by) of the final evaluations, or the latest in training."""
    sets = config["eval"]["sets"]
    final = examples.collect(sets, {when: workdir / "eval" / when for when in ("before", "after")})
    analysed = read_rows(workdir / "analysis_generations.jsonl")
    final = [(name, examples.with_token_kl(samples, analysed), column) for name, samples, column in final]
    return final or examples.collect(sets, {"during": workdir / "rl" / "generations"})


def _analysis(path: Path) -> list[Row]:
    """Reads analysis.jsonl and adds to each step its tokens as (text, nats, strength of the colour, above delta)."""
    lines = read_rows(path)
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
    """Returns (text, nats, strength of the colour, whether it is above delta) of each token."""
    clip = delta if math.isfinite(delta) else None
    return [(text, kl, reasoning_steps.strength(kl, clip), kl > delta) for text, kl in pairs]
