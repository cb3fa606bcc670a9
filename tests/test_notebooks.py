"""Run every notebook's cells against the *exported* package, one item per notebook.

`nbdev_test` runs the notebook's own copies of the exported cells. Here those cells are skipped and the module is used
instead, so that a cell that was not exported, or an export that is stale, fails, and coverage sees the package.
"""

import importlib
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.process import NBProcessor
from project import EXPORTS, ROOT, code_cells, module_of, name, notebooks

SKIPPED = set(get_config(path=ROOT).tst_flags.split())


def test_there_are_notebooks():
    assert {"index", "00_data.embedded", "22_cli"} <= {name(p) for p in notebooks()}


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_notebook(path, monkeypatch):
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    assert outputs, f"{path.name} has no outputs: python tools/execute.py {path.relative_to(ROOT)}"
    errors = [o["ename"] for o in outputs if o["output_type"] == "error"]
    assert not errors, f"{path.name} was saved with an error: {errors}"

    monkeypatch.chdir(path.parent)
    monkeypatch.setattr("sys.path", [*sys.path])  # the shell puts the notebook's folder on it
    nb, shell = NBProcessor(path).nb, CaptureShell(path)
    matplotlib.use("Agg")
    if module := module_of(path):
        shell.user_ns.update(vars(importlib.import_module(module)))
    for cell in nb.cells:
        flags = getattr(cell, "directives_", None) or {}
        if cell.cell_type != "code" or flags.keys() & (SKIPPED | EXPORTS):
            continue
        if flags.get("eval:") == ["false"] or "nbdev_export()" in cell.source:
            continue
        shell.cell(cell)
        if shell.exc:
            raise shell.exc
    plt.close("all")
