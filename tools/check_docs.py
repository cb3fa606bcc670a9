"""Check a built site: links, anchors and images resolve, and every notebook has its page.

usage: python tools/check_docs.py SITE [NOTEBOOKS]      exit 1 when something is broken or there is no page

Links to the address where the site will be published are checked against the pages of SITE; other hosts are not asked.
"""

import re
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    "The links, anchors and images of one page."

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.images = [], set(), 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.images += tag in ("img", "svg")
        self.links += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def published() -> str:
    "The address of the published site."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"].rstrip("/") + "/"


def page_of(notebook: Path, folder: Path) -> Path:
    "The page that nbdev names for a notebook: without the number that orders it."
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.stem.lower())
    return notebook.relative_to(folder).with_name(f"{name}.html")


def check(site: Path, notebooks: Path | None = None) -> tuple[list[str], dict[Path, Page]]:
    "What is broken, in words, and the pages that were read."
    base, bad = published(), []
    pages = {p: Page(p) for p in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        where = path.relative_to(site)
        for link in page.links:
            ours = link.startswith(base)
            url = urlsplit(link.removeprefix(base) if ours else link)
            if url.scheme or url.netloc:
                continue
            folder = site if ours or url.path.startswith("/") else path.parent
            target = (folder / unquote(url.path).lstrip("/")).resolve() if url.path or ours else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                bad.append(f"{where}: {link} leads nowhere")
            elif target in pages and url.fragment and unquote(url.fragment) not in pages[target].ids:
                bad.append(f"{where}: {link} has no such anchor")
    if not pages:
        bad.append(f"{site}: no page")
    if notebooks:
        sources = [
            p for p in notebooks.rglob("*.ipynb") if not any(x[0] in "._" for x in p.relative_to(notebooks).parts)
        ]
        if not sources:
            bad.append(f"{notebooks}: no notebook")
        bad += [
            f"{p.name}: no page {page_of(p, notebooks)}" for p in sources if site / page_of(p, notebooks) not in pages
        ]
    return bad, pages


def main(site, notebooks=None) -> int:
    bad, pages = check(Path(site).resolve(), notebooks and Path(notebooks).resolve())
    links, images = sum(len(p.links) for p in pages.values()), sum(p.images for p in pages.values())
    print(*bad, f"{len(pages)} pages, {links} links, {images} images, {len(bad)} broken", sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
