"""What the tests know about the project: its notebooks, the modules they export, its settings."""

import ast
import json
import re
import shlex
import shutil
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "gp2vec"
EXPORTS = {"export", "exports", "exporti"}
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
# What lies about in a working tree and is no part of the project.
LITTER = ".git .venv venv __pycache__ .ipynb_checkpoints .*_cache build dist *.egg-info _proc _docs runs cache outputs"


def notebooks() -> list[Path]:
    "Every notebook in reading order: by number, `index` last, then the tutorials."
    paths = [p for p in NBS.rglob("*.ipynb") if not any(x.startswith((".", "_")) for x in p.relative_to(NBS).parts)]
    return sorted(paths, key=lambda p: (len(p.parts), p))


def name(path: Path) -> str:
    return path.relative_to(ROOT if path.suffix == ".py" else NBS).with_suffix("").as_posix()


@cache
def code_cells(path: Path) -> list[dict]:
    "The code cells of a notebook; `source` is one string."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"])} for c in cells if c["cell_type"] == "code"]


def directives(source: str) -> set[str]:
    "`export`, `hide`, `slow` … of a cell."
    return set(re.findall(r"^#\|\s*(\w+)", source, re.MULTILINE))


def tree_of(source: str) -> ast.Module:
    "The syntax tree of a cell, without IPython's magics."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))


def module_of(path: Path) -> str | None:
    "The module that a notebook exports, such as `gp2vec.data.archive`."
    found = [
        m[1] for c in code_cells(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c["source"], re.MULTILINE))
    ]
    return f"gp2vec.{found[0]}" if found else None


def floors() -> dict[str, int]:
    "The floor of every exported module: the number of its notebook."
    return {m: int(re.match(r"\d+", p.name)[0]) for p in notebooks() if (m := module_of(p))}


def module_file(module: str) -> Path:
    "`gp2vec.data.archive` → gp2vec/data/archive.py"
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def imports(path: Path) -> set[str]:
    "The absolute names of all modules that a source file imports, at the top or anywhere below."
    package, known, found = path.relative_to(ROOT).with_suffix("").parts[:-1], floors(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *(node.module or "").split(".")]).strip(".")
            found |= {base} | {n for a in node.names if (n := f"{base}.{a.name}") in known}
    return found


def requirements() -> dict[str, list[str]]:
    "The requirements of the package (under '') and of each extra."
    found = {"": shlex.split(SETTINGS["requirements"])}
    return found | {
        k.removesuffix("_requirements"): shlex.split(v) for k, v in SETTINGS.items() if k.endswith("_requirements")
    }


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    "The `count` of a test that is as strong as its number: few of them by default, many among the slow tests."
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def copy_project(folder: Path) -> Path:
    "A copy of the project's own files."
    return shutil.copytree(ROOT, folder / "gp2vec", symlinks=True, ignore=shutil.ignore_patterns(*LITTER.split()))
