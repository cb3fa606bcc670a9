"""Packaging for gp2vec. Every value lives in settings.ini; edit it there, not here."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

STATUS = ["0 - Pre-Planning", "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable"]
LICENSES = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
PYTHONS = ["3.11", "3.12", "3.13"]
EXTRA = "_requirements"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"] or None,
    license_expression=LICENSES[cfg["license"]],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        f"Development Status :: {STATUS[int(cfg['status'])]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Topic :: Scientific/Engineering :: Physics",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {v}" for v in PYTHONS[PYTHONS.index(cfg["min_python"]) :]),
    ],
    # Folders of data inside the package (configs, weights) hold no __init__.py of their own: hence the namespaces.
    packages=find_namespace_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"], exclude=["*.__pycache__"]),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={k.removesuffix(EXTRA): shlex.split(v) for k, v in cfg.items() if k.endswith(EXTRA)},
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
