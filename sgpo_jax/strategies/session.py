"""A session with a paid model: its client, journal, budget and progress, as an extraction and an audit need them."""

import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sgpo_jax import policy as policies
from sgpo_jax import sharding
from sgpo_jax.runtime import tables
from sgpo_jax.runtime.journal import Journal
from sgpo_jax.runtime.progress import Progress
from sgpo_jax.strategies import budget, clients, prompts


@dataclass(frozen=True)
class Session:
    """An open session; see `open_session`."""

    model: str  # the model's name
    journal: Journal
    fields: ConfigDict  # the config's section `extract`
    ask: clients.Ask
    meter: budget.Meter
    stop: threading.Event
    spent_before: tuple[float, ...]  # `_spent` at the start

    def payer(self, id: str) -> budget.Paid:
        """Returns `paid` for one problem: see `budget.payer`."""
        return budget.payer(id, self.ask, self.journal, self.meter, self.model, self.stop)

    def work_through(
        self, name: str, rows: Sequence[dict[str, str]], total: int, work: Callable[[dict[str, str]], str]
    ) -> str:
        """Runs `work` on the rows that are not finished yet, and shows the progress.

        Args:
          name: the work's name.
          rows: the rows to work on.
          total: number of rows, with those that an earlier run has finished.
          work: row -> reason of its verdict.

        Returns:
          What is not finished and why, or "".
        """
        before, reasons = total - len(rows), Counter[str]()
        with Progress(name, total, before, live=True) as progress:

            def done(reason: str) -> None:
                reasons[reason] += 1
                finished = before + reasons.total() - reasons["left_open"]
                spent = [f"tokens {self.meter.tokens_in + self.meter.tokens_out}", f"cost {self.meter.spent:.4f}"]
                counts = [f"{reason} {count}" for reason, count in reasons.most_common()]
                progress.show(finished, note="  ".join([*counts, *spent, f"retries {self.meter.retries}"]))

            return budget.work_through(
                rows, work, concurrency=self.fields.concurrency, max_failures=self.fields.max_failures,
                stop=self.stop, done=done,
            )  # fmt: skip

    def print_spent(self) -> None:
        """Prints the table of calls, tokens and cost, of this run and in all."""
        names, forms = ("calls", "tokens in", "tokens out", "cost"), ("d", "d", "d", ".4f")
        numbers = zip(names, forms, self.spent_before, _spent(self.meter), strict=True)
        lines: list[tuple[str, object, str]] = [
            (name, format(now - before, form), format(now, form)) for name, form, before, now in numbers
        ]
        lines.append(("retries", self.meter.retries, ""))
        # Why requests were tried again; the reasons' last words may differ from one to the next.
        lines += [(f"  {self.meter.last[kind][:80]}", n, "") for kind, n in self.meter.reasons.most_common(8)]
        tables.table("Spent", ["", "this run", "in all"], lines)


@contextlib.contextmanager
def open_session(config: ConfigDict, role: str, path: Path, settings: dict[str, Any]) -> Iterator[Session]:
    """Opens the journal and the model of a role.

    Args:
      config: the config; its section `extract` names the model, its prices and the budget.
      role: "strong" or "judge".
      path: the journal.
      settings: what shapes the replies besides the model; the journal accepts only equal settings.

    Raises:
      ValueError: a field or an environment variable of the model is missing, or the journal refuses the settings.
    """
    fields, model = config.extract, config.extract[role]
    name, stop = model_name(config, role), threading.Event()
    meter = budget.Meter(model.price_in, model.price_out, fields.budget_tokens, fields.budget_cost)
    with Journal(path, settings) as journal:
        for reply in journal.replies():  # the budget is for all runs together
            meter.count(reply["prompt_tokens"], reply["completion_tokens"])
        spent_before = _spent(meter)
        # Loading a model takes time, so it comes after everything that can be refused at once.
        if model.engine == "local":
            ask = clients.local(_local_model(config, name))
        else:

            def notice(text: str) -> None:
                print(text, flush=True)
                journal.append({"kind": "notice", "text": text})

            ask = clients.endpoint(_endpoint(config, role), stop, meter.retried, notice)
        yield Session(name, journal, fields, ask, meter, stop, spent_before)


def model_settings(config: ConfigDict, role: str, limits: dict[str, int]) -> dict[str, Any]:
    """Returns everything that shapes a model's replies; the URL of an endpoint may change between two runs."""
    fields, engine = config.extract, config.extract[role].engine
    sampling = {"temperature": fields.temperature, "top_p": fields.top_p}
    local = {"seed": config.seed, "max_prompt_tokens": fields.max_prompt_tokens} if engine == "local" else {}
    identity = {"version": prompts.PROMPT_VERSION, "engine": engine, "model": model_name(config, role)}
    return {**identity, **sampling, **limits, **local}


def model_name(config: ConfigDict, role: str) -> str:
    """Returns the name of a role's model.

    Raises:
      ValueError: neither the config nor, for an endpoint, OPENAI_MODEL names one.
    """
    model = config.extract[role]
    name = model.name or (os.environ.get("OPENAI_MODEL", "") if model.engine == "endpoint" else "")
    if not name:
        raise ValueError(f"config.extract.{role}.name='': must name a model, or OPENAI_MODEL be set for an endpoint")
    return name


def _endpoint(config: ConfigDict, role: str) -> clients.Endpoint:
    fields, model = config.extract, config.extract[role]
    base_url = model.base_url or os.environ.get("OPENAI_BASE_URL", "")
    if not base_url:
        raise ValueError(f"config.extract.{role}.base_url='': must be a URL, or OPENAI_BASE_URL be set")
    key = os.environ.get(model.key_variable, "") if model.key_variable else ""
    if model.key_variable and not key:
        raise ValueError(
            f"the environment variable {model.key_variable} (config.extract.{role}.key_variable) is not set"
        )
    if not re.fullmatch("[!-~]*", key):  # no header can have it; the error would show it
        raise ValueError(
            f"the environment variable {model.key_variable} (config.extract.{role}.key_variable): has a space, a line "
            "break or a character beyond ASCII in it; allowed: the key alone"
        )
    return clients.Endpoint(
        model_name(config, role), base_url, key, fields.temperature, fields.top_p, limit_field=model.limit_field,
        timeout=fields.timeout, retries=fields.retries, backoff=fields.backoff,
    )  # fmt: skip


def _local_model(config: ConfigDict, name: str) -> clients.LocalModel:
    fields, mesh = config.extract, sharding.make_mesh(**config.mesh)
    policy, initial = policies.load(
        name, "", layers=0, hidden=0, heads=0, mlp=0, dtype=jnp.dtype(config.model.dtype), instruction=""
    )
    params = initial(jax.random.key(config.seed), mesh)
    ways = sharding.row_ways(mesh)
    batch = int(np.ceil(fields.concurrency / ways)) * ways
    return clients.LocalModel(
        policy, params, mesh, config.seed, fields.temperature, fields.top_p, fields.max_prompt_tokens, batch
    )


def _spent(meter: budget.Meter) -> tuple[float, ...]:
    return meter.calls, meter.tokens_in, meter.tokens_out, meter.spent
