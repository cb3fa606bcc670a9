"""The site builds from `_quarto.yml`, every notebook is a page with its figures, and links, anchors and images hold.

Quarto itself is not needed: a stand-in renders the same configuration (`tools/standin.py`).
"""

import os
import re
import subprocess
import sys

import pytest
import yaml
from project import NBS, ROOT, code_cells, copy_project, directives, name, notebooks


def sidebar() -> list[str]:
    "The notebooks that the sidebar names, in order."
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))

    def walk(items):
        for item in items:
            if isinstance(item, str):
                yield item
            elif "contents" in item:
                yield from walk(item["contents"])
            else:
                yield item["href"]

    return list(walk(config["website"]["sidebar"]["contents"]))


def test_sidebar_names_every_notebook():
    "Home first, then by number, then the tutorials in an order of their own."
    names = sorted((name(p) for p in notebooks()), key=lambda n: (n != "index", n.count("/"), n))
    listed = [path.removesuffix(".ipynb") for path in sidebar()]
    assert [n for n in listed if "/" not in n] == [n for n in names if "/" not in n]
    assert sorted(listed[-sum("/" in n for n in names) :]) == [n for n in names if "/" in n]


def test_one_configuration():
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A copy of the project with its site in `_proc/_docs`."
    root = copy_project(tmp_path_factory.mktemp("site"))
    env = os.environ | {"PYTHONPATH": str(root), "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "tools/standin.py"], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def test_links_anchors_images_and_pages(built):
    done = subprocess.run(
        [sys.executable, "tools/check_docs.py", "_proc/_docs", "nbs"], cwd=built, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


def test_an_empty_site_fails(built, tmp_path):
    done = subprocess.run([sys.executable, "tools/check_docs.py", tmp_path], cwd=built, capture_output=True, text=True)
    assert done.returncode == 1 and "no page" in done.stdout


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_page(built, path):
    "A page with a title, and as many figures as the notebook shows."
    page = (path.relative_to(NBS).parent / re.sub(r"^\d+[a-z0-9]*_", "", path.stem)).as_posix() + ".html"
    html = (built / "_proc/_docs" / page).read_text(encoding="utf-8")
    assert re.search(r"<h1[^>]*>", html), "no title"
    shown = [c for c in code_cells(path) if not directives(c["source"]) & {"hide", "exporti"}]
    figures = sum(any(k.startswith("image/") for k in o.get("data", {})) for c in shown for o in c["outputs"])
    assert len(re.findall(r"<(?:img|svg)\b", html)) >= figures, f"{figures} figures in the notebook, fewer on its page"
