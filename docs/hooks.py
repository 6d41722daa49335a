"""Pages of the documentation site that nobody writes, made when mkdocs builds it.

The start is README.md. The reference is made from docstrings, the comments of `config.base()` and the table of the
commands. A file of the repository that a page links to is shown on a page of its own.
"""

import html
import json
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

from sgpo_jax import config as configs
from sgpo_jax.cli import COMMANDS
from sgpo_jax.cli.fields import comments
from sgpo_jax.cli.help import help_text

ROOT = Path(__file__).resolve().parent.parent
# file of the repository -> page
PAGES = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}  # fmt: skip
# page of the reference -> modules whose docstrings it shows
REFERENCE = {
    "losses": ("losses", "divergences"), "logprobs": ("logprobs", "output_head"), "rewards": ("rewards",),
    "data": ("data",), "models": ("models",), "rollout": ("rollout",), "policy": ("policy",),
    "evaluation": ("evaluation",), "strategies": ("strategies.runs", "strategies.ratings"), "training": ("training",),
}  # fmt: skip
LANGUAGES = {".py": "python", ".sh": "bash", ".cff": "yaml", ".toml": "toml", ".jsonl": "json"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
LONGEST = 200_000  # characters of a file that a page shows


def on_files(files, config):
    """Adds the pages that are made."""
    made = {page: (ROOT / source).read_text("utf-8") for source, page in PAGES.items()}
    made |= {"reference/config.md": config_page(), "reference/commands.md": commands_page()}
    made |= {f"reference/{name}.md": reference_page(name, modules) for name, modules in REFERENCE.items()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for source in sorted(linked_sources(files)):
        files.append(File.generated(config, source_page(source), content=shown(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes the links of a page lead to pages of the site."""
    here = repository_path(page.file.src_uri)
    return LINK.sub(lambda link: link[1] + leading(link[2], here, page.file.src_uri) + link[3], markdown)


def repository_path(page: str) -> str:
    """Returns the file of the repository that a page of the site is from."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def leading(link: str, here: str, page: str) -> str:
    """Returns a link of a file of the repository as the site has it."""
    target, hash_mark, anchor = link.partition("#")
    if not target or re.match(r"[a-z]+:", link):
        return link
    path = os.path.normpath(PurePosixPath(here).parent / target)
    place = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else source_page(path))
    return os.path.relpath(place, PurePosixPath(page).parent) + hash_mark + anchor


def linked_sources(files) -> set[str]:
    """Returns the files of the repository, outside docs, that pages link to."""
    found = set()
    for file in files.documentation_pages():
        here = repository_path(file.src_uri)
        for _, link, _ in LINK.findall(file.content_string):
            path = os.path.normpath(PurePosixPath(here).parent / link.partition("#")[0])
            outside = path not in PAGES and not path.startswith("docs/") and not path.startswith("..")
            if outside and not re.match(r"[a-z]+:", link) and (ROOT / path).is_file():
                found.add(path)
    return found


def source_page(path: str) -> str:
    """Returns the page that shows a file."""
    return f"source/{path}.md"


def shown(path: str) -> str:
    """Returns the page of a file: a notebook's cells, or at most `LONGEST` characters."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".ipynb"):
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(code if kind == "markdown" else f"```python\n{code}\n```" for kind, code in cells)
    fence = f"`````{LANGUAGES.get(Path(path).suffix, '')}\n{text[:LONGEST]}\n`````\n"
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}"


def reference_page(name: str, modules: tuple[str, ...]) -> str:
    """Returns a page of docstrings."""
    return f"# {name.capitalize()}\n\n" + "".join(f"::: sgpo_jax.{module}\n\n" for module in modules)


def config_page() -> str:
    """Returns the page of all fields of the config, with their values in the paper's recipe."""
    said, lines = comments(), [
        "# Config", "",
        "A file in `configs/` starts from `config.base()`, the paper's recipe, and changes what it needs. The command "
        "line changes single fields: `--config.rl.batch=64`. The values here are those of the recipe. Sections, "
        "equations and tables are those of [arXiv 2606.24064](https://arxiv.org/abs/2606.24064).",
    ]  # fmt: skip
    shown_section = None
    values, places = configs.flat(configs.base().to_dict()), {field: i for i, field in enumerate(said)}

    def place(field):  # sections as in config.py, and their fields too
        section = field.rpartition(".")[0]
        return places.get(section, -1), section, places.get(field, len(places))

    for field in sorted(values, key=place):
        section, value = field.rpartition(".")[0], values[field]
        if section != shown_section:
            about = said.get(section, "")
            lines += ["", f"## {section or 'The run'}", "", *([about, ""] if about else [])]
            lines += ["| field | value | |", "|---|---|---|"]
            shown_section = section
        text = html.escape(said.get(field, ""), quote=False).replace("|", "\\|")
        lines.append(f"| `{field}` | `{value!r}` | {text} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Returns the page of the commands, as their `--help` says it."""
    text = "# Commands\n\n" + "".join(f"* [{name}](#{name}): {c.summary}\n" for name, c in COMMANDS.items())
    for name, command in COMMANDS.items():
        lines = help_text(name, command, None).strip()
        text += f"\n## {name}\n\n```text\n{lines}\n```\n"
    return text
