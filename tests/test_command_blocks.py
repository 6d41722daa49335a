"""Every line of every bash block of the README, CONTRIBUTING.md and docs/ is parsed, run dry elsewhere, or excused."""

import re
import shlex

import pytest
from helpers.paths import ROOT

from sgpo_jax.cli import COMMANDS, parsing

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```bash\n(.*?)^ *```", re.M | re.S)
# Programs whose lines are not tried, and why. Nothing else may stand in a block.
EXCUSED = {
    "gcloud": "needs an account; its flags were checked by hand against its release 528",
    "kubectl": "needs a cluster",
    "xpk": "needs a cluster; the run inside is parsed by tests/launch/test_pods_page.py",
    "ssh-keygen": "would write a key",
    "ssh-add": "would add a key",
    "hf": "needs a network",
    "nvidia-smi": "needs a GPU",
    "tensorboard": "serves until it is stopped",
    "sky": "needs an account; tests/launch/test_skypilot.py reads the task",
    "mkdocs": "serves until it is stopped; tests/test_site.py builds the site",
    "ruff": "CI runs it",
    "mypy": "CI runs it",
    ".": "enters an environment",
    "export": "sets variables",
}
# Pages whose lines with launch/ are run dry by tests/launch/test_pods_page.py.
LAUNCHED = {"pods.md", "gpus.md", "README.md"}


def lines(text):
    """Yields the commands of the blocks of a page as words, with the variables of a block filled in."""
    for _, block in BLOCK.findall(text):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[assigned[1]] = assigned[2]
                continue
            command = []
            for word in [*words, "&&"]:
                if word in ("&&", "&"):
                    if command:
                        yield command
                    command = []
                else:
                    command.append(word)


def problem(words, page):
    """Returns what is wrong with a command of a page, or ""."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program == "sgpo":
        return parsed(*arguments)
    if program == "python" and arguments[:1] == ["-m"] and arguments[1].startswith("sgpo_jax."):
        return parsed(arguments[1].removeprefix("sgpo_jax.").replace("main", "train"), *arguments[2:])
    if program == "python" and arguments[0].endswith(".py"):
        return of_file(*arguments)
    if program == "python" and (arguments[:2] == ["-m", "venv"] or arguments[0] == "-c"):
        return "" if arguments[0] == "-m" else compiled(arguments[1])
    if program == "pip" and arguments[0] == "install":
        return installed(arguments)
    if program == "pytest":
        missing = [word for word in arguments if "/" in word and not (ROOT / word).exists()]
        return f"{missing} are not there" if missing else ""
    if program.startswith("launch/"):
        return "" if page in LAUNCHED else "is not run dry by tests/launch/test_pods_page.py"
    return "" if program in EXCUSED else f"{program} is neither tried nor excused"


def parsed(name, *arguments):
    """Parses a command of ours as it would be, with a config that is there where a reader would have one."""
    if name not in COMMANDS:
        return f"there is no command {name}"
    command, given = COMMANDS[name], [word.strip("[]") for word in arguments if word != "..."]
    given = [word for word in given if not word.startswith("--config=") or (ROOT / path_of(word)).is_file()]
    if command.config and not any(word.startswith("--config=") for word in given):
        given.append(f"--config={ROOT / 'configs/quickstart.py'}")
    given = [f"--config={ROOT / word[9:]}" if word.startswith("--config=configs/") else word for word in given]
    try:
        parsing.parse(command, given)
    except ValueError as error:
        return str(error)
    return ""


def path_of(word):
    return word.removeprefix("--config=").partition(":")[0]


def of_file(path, *arguments):
    if not (ROOT / path).is_file():
        return f"there is no {path}"
    text = (ROOT / path).read_text()
    names = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    return "".join(f"{path} has no flag {name}" for name in names if name not in text)


def compiled(code):
    compile(code, "block", "exec")
    return ""


def installed(arguments):
    extras = re.findall(r"^    \"([\w-]+)\":", (ROOT / "setup.py").read_text(), re.M)
    asked = [extra for word in arguments for extra in re.findall(r"^\.\[([\w,-]+)\]$", word)]
    unknown = {name for names in asked for name in names.split(",")} - set(extras)
    return f"there are no extras {sorted(unknown)}" if unknown else ""


COMMANDS_OF = [(page.name, words) for page in PAGES for words in lines(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "words"), COMMANDS_OF, ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60])
def test_a_line_of_a_block_can_be_tried(page, words):
    assert problem(words, page) == ""


def test_no_excuse_is_left_over():
    used = {next(word for word in words if "=" not in word or "/" in word) for _, words in COMMANDS_OF}
    assert set(EXCUSED) - used <= {"mkdocs", "sky"}


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ("sgpo trian --config=configs/quickstart.py", "there is no command trian"),
        ("sgpo train --config=configs/quickstart.py --workdir=/tmp/x --config.rl.stepz=3", "stepz"),
        ("A=1 python -m sgpo_jax.export --workdir=DIR --too=x", "too"),
        ("pip install -e '.[buckts]' && pytest", "there are no extras ['buckts']"),
        ("pytest tests/no_such_file.py", "are not there"),
        ("python benchmarks/none.py", "there is no benchmarks/none.py"),
        ("launch/tpu_vm.sh stop --name x --zone us-east5-b", "is not run dry"),
        ("curl https://example.com", "curl is neither tried nor excused"),
        ('run="sgpo train"\n$run --nonsense=1', "nonsense"),
    ],
)
def test_the_search_finds_what_is_wrong(block, found):
    commands = list(lines(f"```bash\n{block}\n```\n"))
    assert any(found in problem(words, "a page") for words in commands)
