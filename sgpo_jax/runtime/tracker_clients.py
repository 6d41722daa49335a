"""The clients of the trackers, behind the same five methods; each imports its package when it opens."""

import html
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo_jax import config as configs

PROJECT = "sgpo_jax"  # the trackers' own environment variables name another one
_FLUSH = 5  # seconds of scalars that TensorBoard loses when the process is killed


@dataclass(frozen=True)
class Tracked:
    """The run, as its trackers know it."""

    id: str  # stays when the run is resumed
    workdir: Path
    config: Mapping[str, Any]  # as in config.json

    @property
    def name(self) -> str:
        """Returns the name that is shown."""
        return self.workdir.absolute().name


class Client:
    """A tracker that does nothing. The methods of the others may raise anything, or take long."""

    where = ""  # the run is seen; "" is not said

    def __init__(self, run: Tracked):
        """Begins the run, or goes on with it."""

    def begin(self, stage: str, after: int) -> None:
        """Begins a stage whose next step comes after this one."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Takes the finite metrics of one step of a stage."""

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes a table, whose rows all have the same keys."""

    def file(self, path: Path) -> None:
        """Takes a file as it is now."""

    def close(self, failed: bool) -> None:
        """Ends the run, until it is resumed."""


class TensorBoard(Client):
    """Event files in `workdir/tensorboard/STAGE`: metrics, and the config and tables as text. It takes no files."""

    def __init__(self, run: Tracked):
        self._folder, self._config = run.workdir / "tensorboard", run.config
        self._writers: dict[str, Any] = {}

    def begin(self, stage: str, after: int) -> None:
        """Begins a stage; TensorBoard then ignores what an earlier start has logged after this step."""
        from tensorboardX import SummaryWriter  # imports torch where that is installed, which takes a second

        if stage in self._writers:
            self._writers[stage].close()
        writer = SummaryWriter(str(self._folder / stage), purge_step=after + 1, flush_secs=_FLUSH)
        writer.add_text("config", _code(json.dumps(self._config, indent=1)), after + 1)
        self._writers[stage] = writer

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars named STAGE/METRIC."""
        for name, value in values.items():
            self._writer(stage, step).add_scalar(f"{stage}/{name}", value, step)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a table in Markdown. The name begins with that of the stage."""
        self._writer(name.split("/")[0], step).add_text(name, _markdown(rows), step)

    def _writer(self, stage: str, step: int) -> Any:
        if stage not in self._writers:
            self.begin(stage, step - 1)
        return self._writers[stage]

    def close(self, failed: bool) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()


def _code(text: str) -> str:
    """Returns Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as a table in Markdown, with the keys of the first as its head."""

    def line(cells: Iterable[Any]) -> str:
        texts = (html.escape(str(cell)).replace("|", "&#124;").replace("\n", "<br>") for cell in cells)
        return f"| {' | '.join(texts)} |"

    columns = list(rows[0])
    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row.values()) for row in rows)])


class WandB(Client):
    """A run of Weights & Biases; $WANDB_MODE=offline writes it to `workdir/wandb` only."""

    def __init__(self, run: Tracked):
        import wandb

        settings = wandb.Settings(console="off", silent=True, finish_timeout=20.0)
        # It would ask for a key on the terminal, and the run would not know why its input is gone.
        online = wandb.setup().settings.mode == "online"
        if online and not wandb.login(prompt=False, verify=False):
            raise PermissionError("no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        self._wandb, self._id = wandb, run.id
        self._stages: set[str] = set()
        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT, id=run.id, name=run.name, resume="allow",
            dir=run.workdir, config=dict(run.config), settings=settings,
        )  # fmt: skip
        offline = f"`wandb sync {run.workdir / 'wandb'}/offline-run-*` uploads the run"
        self.where = str(self._run.url) if online else offline

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes a row of the history; the axis of a stage is its own steps, because W&B counts differently."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a table, with the step as its first column."""
        columns: list[Any] = ["step", *(key for key in rows[0] if key != "step")]
        data = [[step, *(row[key] for key in columns[1:])] for row in rows]
        self._run.log({name: self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def file(self, path: Path) -> None:
        """Writes an artifact with the run's id in its name; the same file again is another version of it."""
        artifact = self._wandb.Artifact(f"{path.stem}-{self._id}", type=path.stem)
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        """Waits for the upload."""
        self._run.finish(exit_code=int(failed))


class MLflow(Client):
    """A run of MLflow, at $MLFLOW_TRACKING_URI; it is found again by a tag, because MLflow chooses the ids."""

    _TAG = "sgpo_jax.run"

    def __init__(self, run: Tracked):
        import mlflow

        self._client, self._entities = mlflow.MlflowClient(), mlflow.entities
        name = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([experiment_id], f"tags.`{self._TAG}` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(experiment_id, run_name=run.name, tags={self._TAG: run.id}).info.run_id
            fields = configs.flat(dict(run.config))  # parameters never change, so a resumed run cannot log them again
            self._client.log_batch(self._id, params=[mlflow.entities.Param(k, str(v)) for k, v in fields.items()])
        self._client.log_dict(self._id, dict(run.config), "config.json")
        self.where = f"experiment {name}, run {self._id}, at {mlflow.get_tracking_uri()}"

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics named STAGE/METRIC; "@" is written "_at_", as names have none in MLflow."""
        now = int(1000 * time.time())
        names = {name: re.sub(r"[^\w./ :-]", "_", f"{stage}/{name}".replace("@", "_at_")) for name in values}
        metrics = [self._entities.Metric(names[name], value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes NAME_STEP.json, in the format that MLflow's page shows as a table."""
        columns = list(rows[0])
        content = {"columns": columns, "data": [[row[key] for key in columns] for row in rows]}
        self._client.log_dict(self._id, content, f"{name}_{step:06d}.json")

    def file(self, path: Path) -> None:
        """Writes an artifact, in place of the one of this name."""
        self._client.log_artifact(self._id, str(path))

    def close(self, failed: bool) -> None:
        """Marks the run as finished or failed."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Client):
    """A run of Trackio: in its folder on this machine, or in the Space or on the server that its variables name."""

    def __init__(self, run: Tracked):
        import trackio

        name = f"{run.name}-{run.id}"  # by which it is found again
        self._trackio = trackio
        self._run = trackio.init(
            PROJECT, name=name, resume="allow", config=configs.flat(dict(run.config)), embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics named STAGE/METRIC."""
        self._run.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a table."""
        data: Any = [dict(row) for row in rows]
        self._run.log({name: self._trackio.Table(data=data)}, step=step)

    def file(self, path: Path) -> None:
        """Writes an artifact with the run's name in its own; the same file again is another version of it."""
        self._run.log_artifact(str(path), name=f"{path.stem}-{self._run.name}", type=path.stem)

    def close(self, failed: bool) -> None:
        """Waits until everything is stored."""
        self._run.finish()


CLIENTS: dict[str, type[Client]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
