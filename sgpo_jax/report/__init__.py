"""The HTML page of a run or a lab, with its figures, example responses and reasoning steps."""

from sgpo_jax.report.page import attempt, live, read_config, write_lab, write_run

__all__ = ["attempt", "live", "read_config", "write_lab", "write_run"]
