"""Quarto's hooks (`_quarto-repo.yml`): nbdev turns `nbs/` into `_proc/`, where the same `_quarto.yml` renders it."""

import os
import shutil
import subprocess
import sys


def pre_render():
    "Process the notebooks and render the pages, before Quarto (which finds no notebook of its own at the top) goes on."
    from nbdev.serve import proc_nbs

    env = {k: v for k, v in os.environ.items() if not k.startswith("QUARTO_PROJECT")}
    subprocess.run(["quarto", "render", str(proc_nbs(n_workers=0, force=True))], check=True, env=env)


def post_render():
    "Put the rendered site where the configuration says."
    shutil.copytree("_proc/_docs", "_docs", dirs_exist_ok=True)


if __name__ == "__main__":
    {"pre": pre_render, "post": post_render}[sys.argv[1]]()
