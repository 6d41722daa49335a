"""The HTML page of a run or a lab, and the figures, examples and reasoning steps that it shows."""

from sgpo_jax.report.page import attempt, live, read_config, write_lab, write_run

__all__ = ["attempt", "live", "read_config", "write_lab", "write_run"]
