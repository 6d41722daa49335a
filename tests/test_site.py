"""The documentation site: built strictly, with every field, command and loss in its reference."""

import html
import importlib.util
import os
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from sgpo_jax import config as configs
from sgpo_jax import losses
from sgpo_jax.cli import COMMANDS
from sgpo_jax.cli.fields import comments


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if any(importlib.util.find_spec(package) is None for package in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("needs the extra 'docs'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr  # --quiet would not count the warnings

    def text(page):
        return html.unescape(re.sub("<[^>]+>", "", (tmp_path / page / "index.html").read_text("utf-8")))

    fields = configs.flat(configs.base().to_dict())
    config, said = text("reference/config"), comments()
    assert [name for name in fields if f"\n{name}\n" not in config] == []
    assert said["rl.delta"] in config and said["rl"] in config and "any other word being <unk>" in config
    sections = re.findall(r'<h2 id="[\w.-]+">([\w. ]+)<', (tmp_path / "reference/config/index.html").read_text("utf-8"))
    assert sections[:2] == ["The run", "model"] and len(set(sections)) == len(sections) > 12
    commands = text("reference/commands")
    assert [name for name in COMMANDS if f"usage: sgpo {name}" not in commands] == []
    page = (tmp_path / "reference/losses/index.html").read_text("utf-8")
    public = [name for name in vars(losses) if name in ("select_target", "adaptive_weight", "distillation_loss")]
    assert all(f'id="sgpo_jax.losses.{name}"' in page for name in public) and len(public) == 3
    assert "Quickstart: about three minutes" in text("."), "the README is the start"
    assert "def clipped_surrogate" not in text("own_loop") and "select_target" in text("own_loop")
    assert "def problem_loss" in text("source/examples/own_loop.py")
    assert "losses.select_target" in text("source/notebooks/own_loop.ipynb")
    outside = re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
    assert outside == [], "a page loads nothing from elsewhere"
