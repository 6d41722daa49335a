"""Trains: runs the stages of a config in order, each from where it stopped."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from sgpo_jax import cli, config_checks, rewards, sharding
from sgpo_jax import config as configs
from sgpo_jax import policy as policies
from sgpo_jax.cli.processes import join
from sgpo_jax.policy import Run
from sgpo_jax.report import page
from sgpo_jax.runtime import distributed, environment, is_first, lock, memory, mirror, preemption, trackers, write_text
from sgpo_jax.training import final_eval, inputs, rl, sft, stage


def run(config, workdir: Path) -> None:
    """Runs the stages of the config in order, each from where it stopped."""
    mesh = sharding.make_mesh(**config.mesh)
    config_checks.check_mesh(config, mesh)
    rewards.check(config.rl.reward)
    mirror.share(workdir)
    with lock.hold(workdir) if is_first() else contextlib.nullcontext():
        if is_first():
            # A run that was refused over its rows or its model has left a config too, which binds nobody.
            begun = any(any(workdir.glob(pattern)) for pattern in ("eval/*", "rl/rollbacks.json"))
            if begun or any(stage.has_begun(workdir, name) for name in ("sft", "rl")):
                configs.check_resume(config, workdir / "config.json")
            write_text(workdir / "config.json", configs.to_json(config))
            environment.record(workdir)
        distributed.wait_for(partial(lock.seen, workdir), workdir)
        _run_stages(config, workdir, mesh)


def found(config, workdir: Path) -> list[str]:
    """Returns what a resumed run finds, as in "SFT finished at step 320", "RL resumes at step 17 of 50"."""
    steps = {name: stage.find_step(config, workdir, name, "last") for name in ("sft", "rl") if name in config.stages}
    done = [name for name, step in steps.items() if step is not None]
    lines = []
    for name in done:
        total = config[name].steps
        if name != done[-1] or steps[name] == total or any((workdir / "eval").glob("*.json")):
            lines.append(f"{name.upper()} finished at step {steps[name]}")
        else:
            lines.append(f"{name.upper()} resumes at step {steps[name]}" + f" of {total}" * bool(total))
    return lines


def _run_stages(config, workdir: Path, mesh: Mesh) -> None:
    if lines := found(config, workdir):
        print(mirror.shown(f"{workdir}: {'; '.join(lines)}"), flush=True)
    run, initial = stage.open_run(config, workdir, mesh)
    if not lines:
        policies.check_weights(config.model.source)
    with trackers.Trackers.from_config(config, workdir) as tracked:
        _train(replace(run, trackers=tracked), initial)


def _train(run: Run, initial: Callable) -> None:
    config, workdir = run.config, run.workdir
    stage.check_positions(run)
    sampling = rl.step_sampling(run) if "rl" in config.stages else None  # refuses slots that do not fit
    warmed_up = partial(stage.warmed_up, run, initial)
    try:
        # The rows of both stages are read first: what is wrong with those of RL is said before the warm-up.
        demonstrations = inputs.demonstrations(run) if "sft" in config.stages else None
        problems = inputs.problems(run) if "rl" in config.stages else None
        if demonstrations:
            sft.train(run, initial, demonstrations)
        if problems and sampling:
            rl.train(run, warmed_up, inputs.with_own_strategies(run, problems, warmed_up), sampling)
        if "eval" in config.stages:
            final_eval.write(run, warmed_up)
    finally:  # also after a failure, else the page would say that the run is still running
        if is_first():
            page.attempt(page.write_run, workdir)
            run.trackers.file(workdir / "report.html")
            print(mirror.shown(f"Page: {workdir / 'report.html'}"), flush=True)


def main(config, given) -> None:
    """Checks the config and the flags, joins the other processes, and runs."""
    config_checks.check(config)
    trackers.check(config.trackers)
    workdir = cli.folder("workdir", given.workdir)
    join(config, given)
    preemption.watch(config.grace)
    memory.trim_after_compiling()
    run(config, workdir)
