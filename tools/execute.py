"""Run notebooks from top to bottom, each in a process of its own, and save their outputs, cleaned.

usage: python tools/execute.py [NOTEBOOK ...]      without arguments: every notebook, in order

A cell flagged `slow`, `gpu`, `network` (`tst_flags` in settings.ini) or `eval: false` is not run and keeps the outputs
it has; `nbdev_export()` is not called from here. A notebook whose cell fails is left as it was. Export first: a
notebook runs its own cells, but imports its neighbours from the package.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "|".join(get_config(path=ROOT).tst_flags.split())
SKIPPED = re.compile(rf"^#\|\s*({FLAGS}|eval:\s*false)\s*$|nbdev_export\(\)", re.MULTILINE)


def notebooks() -> list[Path]:
    "Every notebook of the project in reading order, those in subfolders last."
    paths = (ROOT / "nbs").rglob("*.ipynb")
    paths = [p for p in paths if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts)]
    return sorted(paths, key=lambda p: (len(p.parts), p))


def execute(path: Path):
    "Run one notebook in its folder and write it back with its outputs."
    path = path.resolve()
    nb, start = read_nb(path), time.perf_counter()
    shell = CaptureShell(path, mpl_format="png")  # the default, retina, makes notebooks several times as large
    os.chdir(path.parent)

    def skip(cell) -> bool:
        skipped = cell.cell_type != "code" or bool(SKIPPED.search(cell.source))
        if not skipped:
            cell.outputs = []  # execnb leaves the old outputs of a cell that no longer prints anything
        return skipped

    try:
        shell.run_all(nb, exc_stop=True, preproc=skip)
    except SystemExit as e:  # would end this process without a word
        raise RuntimeError(f"{path.name}: a cell called sys.exit({e.code})") from e
    clean_nb(nb)
    write_nb(nb, path)
    print(f"{path.relative_to(ROOT / 'nbs')}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]] or notebooks()
    if len(paths) == 1:
        execute(paths[0])
    else:
        sys.exit(max(subprocess.run([sys.executable, __file__, str(p)]).returncode for p in paths))
