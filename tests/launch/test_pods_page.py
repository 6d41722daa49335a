"""Keeps docs/pods.md and docs/gpus.md true, and the README: commands run dry, figures agree, no file has a secret."""

import math
import re
import runpy
import shlex
import shutil
from importlib.util import find_spec

import pytest
from helpers.launching import ROOT, bench

from sgpo_jax import config as configs
from sgpo_jax.cli import COMMANDS

PAGE = (ROOT / "docs/pods.md").read_text()
GPUS = (ROOT / "docs/gpus.md").read_text()
README = (ROOT / "README.md").read_text()


def commands(text):
    """Returns the lines of the shell blocks of a page, each as its words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


LAUNCHES = [words for words in commands(PAGE + GPUS + README) if words[0].startswith("launch/")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("page"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("words", LAUNCHES, ids=lambda words: " ".join(words[:2]))
def test_the_commands_of_the_page_run_dry(words, here):
    script, *arguments = words
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry = [] if "--dry-run" in arguments else ["--dry-run"]
    result = here.run(script.removeprefix("launch/"), *arguments[:split], *dry, *arguments[split:])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout
    assert here.recorded() == []


def test_the_page_shows_every_subcommand_and_the_readme_leads_to_it():
    shown = {tuple(words[:2]) for words in LAUNCHES}
    for script in ("tpu_vm.sh", "kubernetes.sh"):
        known = re.search(r'^known="(.*)"$', (ROOT / "launch" / script).read_text(), re.M)[1]
        for subcommand in re.findall(r"\w+", known.replace(" or ", " ")):
            assert (f"launch/{script}", subcommand) in shown
    assert any(words[0] == "launch/slurm.sh" for words in LAUNCHES)
    assert "docs/pods.md" in README


def modules():
    """Returns every `python -m sgpo_jax.MODULE ...` on the page, also as part of another command."""
    invocations = []
    for words in commands(PAGE + GPUS):
        for text in (words, *(shlex.split(word) for word in words if "python -m" in word)):
            if "python" in text and "-m" in text and text.index("-m") == text.index("python") + 1:
                invocations.append(text[text.index("-m") + 1 :])
    return invocations


def load(config):
    """Returns the config of a file, as in "configs/qwen7b.py:grpo"."""
    path, _, choice = config.partition(":")
    return runpy.run_path(str(ROOT / path))["get_config"](*[choice] * bool(choice))


@pytest.mark.parametrize("words", modules(), ids=lambda words: words[0])
def test_the_python_commands_have_flags_and_fields_that_exist(words):
    module, *arguments = words
    assert find_spec(module), f"there is no command {module}"
    command = COMMANDS[{"sgpo_jax.main": "train"}.get(module, module.rpartition(".")[2])]
    names = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    assert {name for name in names if not name.startswith("config")} <= {flag.name for flag in command.all_flags}
    (config,) = (argument.partition("=")[2] for argument in arguments if argument.startswith("--config="))
    assert configs.unknown_field(load(config), arguments) is None


@pytest.mark.parametrize("words", [words for words in LAUNCHES if "--config" in words], ids=lambda words: words[1])
def test_the_launched_runs_change_fields_that_exist(words):
    config = load(words[words.index("--config") + 1])
    overrides = words[words.index("--") + 1 :] if "--" in words else []
    assert configs.unknown_field(config, overrides) is None


def table(heading):
    """Returns the rows of the page's table whose first line has this text."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def test_what_an_hour_costs_follows_from_the_prices():
    prices = {row[0]: [float(price) for price in row[1:]] for row in table("on demand, us-east5")}
    slices = table("an hour on demand")
    assert [row[0].split(":")[0] for row in slices] == list(prices)
    for name, type, workers, on_demand, spot, *_ in slices:
        chip, shape = name.split(":")
        chips = math.prod(map(int, shape.split("x")))
        assert int(workers) == chips // 4
        assert int(type.split("-")[1]) == chips * (2 if chip == "v5p" else 1)
        assert float(on_demand) == pytest.approx(chips * prices[chip][0])
        assert float(spot) == pytest.approx(chips * prices[chip][1])


def test_links_of_the_page_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in PAGE.splitlines()
                if line.startswith("#")}  # fmt: skip
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    local = [link for link in links if not link.startswith("http")]
    assert local
    for link in local:
        assert link[1:] in headings if link.startswith("#") else (ROOT / "docs" / link).is_file()


SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20}|hf_[0-9A-Za-z]{20}"
    r"|sk-[0-9A-Za-z]{20}|gh[opsu]_[0-9A-Za-z]{20}|\"private_key\""
    r"|(?i:password|passwd|secret|api_key|auth_token)\s*[:=]\s*[\"']?[0-9A-Za-z+/_-]{8}"
)


def test_no_file_of_the_launchers_holds_a_secret():
    files = [file for place in ("launch/*", "docs/**/*.md", "configs/*.py", "README.md") for file in ROOT.glob(place)]
    assert len(files) > 20
    assert {str(file): secret[0] for file in files if (secret := SECRET.search(file.read_text()))} == {}


@pytest.mark.parametrize(
    "text",
    ["-----BEGIN RSA PRIVATE", "AKIA" + 16 * "A", "AIza" + 35 * "b", "hf_" + 20 * "c", "sk-" + 20 * "d",
     "ghp_" + 20 * "e", 'password="abcdefgh"', "API_KEY: 0123456789"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(text):
    assert SECRET.search(f"x {text} y")
