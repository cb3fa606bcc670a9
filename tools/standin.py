"""Build the site into `_proc/_docs` with smalldocs, a stand-in for Quarto on a machine that lacks it.

It reads the same `_quarto.yml`. Pages get the names that nbdev gives them (`output-file` in the front matter), which
the stand-in does not know of: run `python tools/check_docs.py _proc/_docs` on the result. `quarto render` builds the
real site.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.serve import proc_nbs


def main():
    cache = Path(proc_nbs(n_workers=0, force=True))
    subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(cache)], check=True)
    for nb in cache.rglob("*.ipynb"):
        name = re.search(r"output-file: (\S+?\.html)", nb.read_text(encoding="utf-8"))
        page = cache / "_docs" / nb.relative_to(cache).with_name(f"{nb.stem}.html")
        if name and page.name != name[1]:
            shutil.copy(page, page.with_name(name[1]))


if __name__ == "__main__":
    main()  # nbdev spawns processes: without the guard each would start over
