"""What a user installs: the sdist, the wheel built from it, the command, the configurations, versions that agree."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import requires

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from project import LIB, ROOT, SETTINGS, copy_project, floors, requirements

CONFIGS = sorted((LIB / "configs").rglob("*.yaml"))
DATA = [
    *CONFIGS,
    LIB / "py.typed",
    *(p for p in (LIB / "zoo").rglob("*") if p.is_file() and "__pycache__" not in p.parts),
]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "The folder that holds the sdist and the wheel, which is built from the sdist."
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy_project(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    "The names in the wheel, and a function that reads one."
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive.namelist(), lambda n: archive.read(n).decode()


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    "An environment with the wheel in it and our libraries in reach, but not our source tree; and a way to run things."
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = dist.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(pip, check=True)
    (site,) = (folder / "venv").rglob("site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "120"}

    def run(program, *args):
        done = subprocess.run([scripts / program, *args], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{program} {args}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def test_configs_exist():
    assert LIB / "configs" / "config.yaml" in CONFIGS, "gp2vec/configs/config.yaml is what Hydra starts from"
    assert LIB / "configs" / "experiment" / "debug.yaml" in CONFIGS


def test_wheel_contents(wheel):
    names, read = wheel
    missing = {p.relative_to(ROOT).as_posix() for p in [*LIB.rglob("*.py"), *DATA]} - set(names)
    assert not missing, f"not in the wheel: {missing}"
    strays = [n for n in names if not n.startswith(("gp2vec/", "gp2vec-")) or "__pycache__" in n]
    assert not strays, f"should not be in the wheel: {strays}"
    (info,) = {n.partition("/")[0] for n in names if ".dist-info/" in n}
    assert f"{info}/licenses/LICENSE" in names
    points = read(f"{info}/entry_points.txt")
    assert "gp2vec = gp2vec.cli:main" in points and "gp2vec = gp2vec._modidx:d" in points


def test_wheel_metadata(wheel):
    names, read = wheel
    meta = message_from_string(read(next(n for n in names if n.endswith("/METADATA"))))
    assert (meta["Name"], meta["Version"], meta["License-Expression"]) == ("gp2vec", SETTINGS["version"], "MIT")
    assert meta["Requires-Python"] == ">=3.11"
    assert set(meta.get_all("Provides-Extra")) == requirements().keys() - {""}
    assert meta["Description-Content-Type"] == "text/markdown" and "# gp2vec" in meta.get_payload()


def test_sdist_contents(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "constraints.txt"}
    wanted |= {p.relative_to(ROOT).as_posix() for p in DATA}
    assert not wanted - names, f"not in the sdist: {wanted - names}"


def test_installed_command(installed):
    assert "demo" in installed("gp2vec", "--help")


def test_installed_package(installed):
    "The wheel's own files are what runs, every module imports, and the configurations can be read."
    code = f"""import gp2vec, {", ".join(floors())}
from importlib.resources import files
print(gp2vec.__file__, *(p.name for p in files("gp2vec.configs").iterdir()))"""
    where, *names = installed("python", "-c", code).split()
    assert "site-packages" in where and str(LIB) not in where
    assert "config.yaml" in names


def test_installed_training_composes(installed):
    "Hydra finds its configurations inside the installed package; `--cfg job` prints one and trains nothing."
    names = ["config", *(f"experiment/{p.stem}" for p in CONFIGS if p.parent.name == "experiment")]
    code = f"""from gp2vec.train.train import main
for name in {names}:
    assert main([f"--config-name={{name}}", "--cfg", "job"]) == 0
    print("---")"""
    *printed, _ = yaml.safe_load_all(installed("python", "-c", code))
    assert len(printed) == len(names) and all("model" in settings for settings in printed)


def test_installed_weights_load(installed):
    "What ships with gp2vec is small, has a card, and loads without a network."
    code = "from gp2vec.models.gp2vec import *; print(*(name for name in shipped() if GP2Vec.from_pretrained(name)))"
    names = installed("python", "-c", code).split()
    assert "gp2vec-tiny" in names and set(names) == {p.parent.name for p in DATA if p.name == "model.safetensors"}
    assert all((LIB / "zoo" / name / "README.md").read_text(encoding="utf-8").count("\n## ") > 3 for name in names)
    assert sum(p.stat().st_size for p in DATA if LIB / "zoo" in p.parents) < 8e6


def test_versions_agree():
    import gp2vec

    version = SETTINGS["version"]
    assert gp2vec.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    changes = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version in changes


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(n): Version(v) for n, v in pins}


def test_constraints_hold_what_is_required():
    "Every requirement has a pin that satisfies it, and so has every requirement of a pinned library that applies here."
    pins, left = constraints(), [Requirement(r) for extra in ("", "dev") for r in requirements()[extra]]
    assert pins["torch"] == Version("2.13.0")
    assert not [n for n, v in pins.items() if v.local], "a local version such as +cpu exists on one machine only"
    seen = set()
    while left:
        req = left.pop()
        key = canonicalize_name(req.name)
        assert key in pins, f"{req} is not in constraints.txt"
        assert req.specifier.contains(pins[key], prereleases=True), f"{req}, but constraints.txt has {pins[key]}"
        if (key, *sorted(req.extras)) in seen:
            continue
        seen.add((key, *sorted(req.extras)))
        deps = [Requirement(r) for r in requires(key) or []]
        left += [d for d in deps if not d.marker or any(d.marker.evaluate({"extra": e}) for e in ("", *req.extras))]


def test_requirements_are_bounded():
    "Libraries with version numbers that promise something get an upper bound; s3fs and fsspec count by calendar."
    loose = [
        r for r in requirements()[""] if not any(s.operator in ("<", "==", "~=") for s in Requirement(r).specifier)
    ]
    assert {Requirement(r).name for r in loose} <= {"s3fs", "fsspec"}, loose
