"""The README keeps its word: its Python runs, its commands exist, its links lead somewhere.

A snippet is a fenced block of `python` or `bash`. `<!-- network -->` on the line before one says that it needs the
network: its Python is only compiled. Commands are not run but asked for `--help`, and every option must be there.
"""

import ast
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import matplotlib
import pandas as pd
import pytest
from project import ROOT
from scipy.stats import t

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "python -m pip install -U pip && pip install -c constraints.txt -e . && gp2vec demo"
DEVELOP = 'pip install -c constraints.txt -e ".[dev]" && pytest'


class Snippet(NamedTuple):
    "A fenced block."

    language: str
    line: int  # of its first line in the README
    text: str
    network: bool


def snippets(*languages: str) -> list[Snippet]:
    "The blocks in these languages, in order."
    fence = re.compile(r"^(<!-- network -->\n+)?```[ ]?(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [Snippet(m[2], README.count("\n", 0, m.start(3)) + 1, m[3], bool(m[1])) for m in fence.finditer(README)]
    return [s for s in found if s.language in languages]


def commands() -> list[str]:
    "Every command line in a `bash` block, one by one, without comments."
    text = "\n".join(s.text for s in snippets("bash", "sh", "console")).replace("\\\n", " ")
    lines = (re.sub(r"^\$ |(^|\s)#.*$", "", line) for line in text.splitlines())
    return [c.strip() for line in lines for c in re.split(r"&&|\|\||;|\s\|\s", line) if c.strip()]


def test_every_block_has_a_language():
    assert not re.search(r"(?:\A|\n\n)```\n", README), (
        "a fenced block without a language is neither run nor shown in colour"
    )


def test_the_two_commands():
    lines = [line for s in snippets("bash") for line in s.text.splitlines()]
    assert INSTALL in lines and DEVELOP in lines


def test_python_snippets(monkeypatch, tmp_path):
    "In order, in one namespace, in an empty folder; line numbers in a traceback are the README's."
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {"__name__": "__readme__"}
    for s in snippets("python"):
        code = compile("\n" * (s.line - 1) + s.text, ROOT / "README.md", "exec")
        if not s.network:
            exec(code, names)


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("gp2vec ")])
def test_gp2vec_commands(command, monkeypatch, capsys):
    from gp2vec.cli import main

    _, verb, *rest = shlex.split(command)
    monkeypatch.setattr(sys, "argv", ["gp2vec", verb, "--help"] if not verb.startswith("-") else ["gp2vec", verb])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        code = main()
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert not code and f"gp2vec {verb}".removesuffix(" --help") in shown.out, shown.err or shown.out
    options = {re.match(r"--?[\w-]+", a)[0] for a in rest if re.match(r"--?[a-z]", a)}
    unknown = {o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", shown.out)}
    assert not unknown or verb == "pretrain", f"gp2vec {verb} --help does not tell of {unknown}"


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m gp2vec")])
def test_python_commands(command):
    "`--cfg job` composes the configuration with the overrides of the command and prints it."
    _, *args = shlex.split(command)
    extra = ["--cfg", "job"] if args[1].endswith("train.train") else ["--help"]
    done = subprocess.run([sys.executable, *args, *extra], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_are_known():
    "A command line that no test looks at could rot unseen."
    known = (
        "gp2vec ",
        "python -m gp2vec",
        "python -m pip",
        "pip install",
        "pytest",
        "git ",
        "cd ",
        "jupyter ",
        "quarto ",
        "nbdev_",
        "python tools/",
        "bash .ci/run",
    )
    unknown = [c for c in commands() if not c.startswith(known)]
    assert not unknown, unknown


def test_links():
    "Files that the README links to or shows are there, and so are its own headings."
    plain = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", plain) + re.findall(r"(?:src|href)=\"([^\"]+)\"", plain)
    heads = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    }
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), f"{target} leads nowhere"
        assert path or anchor in heads, f"{target}: no such heading"


def test_python_snippets_import_public_names_only():
    for s in snippets("python"):
        for node in ast.walk(ast.parse(s.text)):
            if isinstance(node, ast.ImportFrom):
                assert not [a.name for a in node.names if a.name.startswith("_")]


QUESTIONS = {  # as the tables of README and card call them -> task, protocol and metric of the published tables
    "event or noise, AUC": ("event", "linear", "AUC"),
    "P or S, AUC": ("phase", "linear", "AUC"),
    "P picks right to 0.1 s, F1": ("picking", "picker", "P F1 0.1 s"),
    "S picks right to 0.1 s, F1": ("picking", "picker", "S F1 0.1 s"),
    "picks, detection AUC": ("picking", "picker", "detection AUC"),
    "P onset, MAE (s)": ("picking", "picker", "P MAE"),
    "magnitude, MAE": ("magnitude", "linear", "MAE"),
}


@pytest.mark.parametrize("page", ("README.md", "gp2vec/zoo/gp2vec-tiny/README.md"))
def test_results_are_those_of_the_published_tables(page):
    "Each number that the page tells of an arm stands in the CSV file of its task."
    told = re.findall(r"^\| ([^|]+) \| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / page).read_text(), re.M)
    told = [row for row in told if row[0] in QUESTIONS]
    assert {row[0] for row in told} == set(QUESTIONS)
    for question, labels, *values in told:
        task, protocol, metric = QUESTIONS[question]
        table = pd.read_csv(ROOT / "benchmarks" / "published" / f"{task}.csv")
        table = table[(table.task == task) & (table.protocol == protocol) & (table.metric == metric)]
        rows = table[table.labels.round() == int(labels)].set_index("arm")
        for arm, value in zip(("gp2vec", "random initialisation", "handcrafted"), values, strict=True):
            row = rows.loc[arm]
            assert value == f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})", (question, labels, arm)


@pytest.mark.parametrize("page", ("README.md", "gp2vec/zoo/gp2vec-tiny/README.md"))
def test_gains_over_draws_are_those_of_the_file(page):
    "Mean and 95 % interval over ten draws of labels and untrained twins."
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    told = dict(re.findall(r"(\+0\.\d{3} ± 0\.\d{3}) with (four|five|nine)", text))
    draws = pd.read_csv(ROOT / "benchmarks" / "published" / "draws.csv").groupby("share")
    found = {}
    for word, (_, group) in zip(("four", "five", "nine"), draws, strict=True):
        gain = group.gp2vec - group.untrained
        assert len(gain) == 10
        found[word] = f"{gain.mean():+.3f} ± {t.ppf(0.975, 9) * gain.std() / 10**0.5:.3f}"
    assert len(told) >= 2 and all(found[word] == gain for gain, word in told.items())
