"""Objects and addresses made by an enemy: nothing is executed, nothing else is opened, and the report says so."""

import ast
import base64
import bz2
import gzip
import io
import lzma
import os
import pickle
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import obspy
import pytest
import torch

import gp2vec
from gp2vec.data.archive import Archive, Store, build_manifest, read_manifest, record_index, write_archive
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset, read_index, verify_shards
from gp2vec.data.metadata import StationMetadataManager
from gp2vec.data.preprocessing import read_miniseed

TRIGGER = b"obspy.core.stream"  # what makes ObsPy take a file for its own pickles


class Bomb:
    "Makes a folder when it is unpickled."

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.makedirs, (os.fspath(self.place), 0o777, True)


def archived(kind: str, name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def forms(place: Path) -> dict[str, bytes]:
    "The same pickle in thirty disguises."
    bomb, buffer, trigger = Bomb(place), io.BytesIO(), b"X\x11\x00\x00\x00" + TRIGGER + b"0"  # pushed and popped
    out = {f"protocol {n}": pickle.dumps(bomb, protocol=n) for n in range(6)}
    plain, low = out["protocol 4"], out["protocol 2"]
    marked = low[:2] + trigger + low[2:]
    out |= {"marked": marked, "marked, protocol 0": b"V" + TRIGGER + b"\n0" + out["protocol 0"]}
    for name, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        out |= {f"{name}": pack(plain), f"{name}, marked": pack(marked), f"{name} twice": pack(pack(marked))}
    out |= {kind: archived(kind, "object.pkl", marked) for kind in ("zip", "w", "w:gz", "w:bz2", "w:xz")}
    numpy_object = np.array([bomb], dtype=object)
    np.save(buffer, numpy_object, allow_pickle=True)
    out["npy"], buffer = buffer.getvalue(), io.BytesIO()
    np.savez(buffer, x=numpy_object)
    out["npz"], buffer = buffer.getvalue(), io.BytesIO()
    torch.save({"x": bomb}, buffer)
    out["torch"], buffer = buffer.getvalue(), io.BytesIO()
    torch.save({"x": bomb}, buffer, _use_new_zipfile_serialization=False)
    out |= {"torch, old": buffer.getvalue(), "base64": base64.b64encode(marked)}
    head = b"000001D ABCDE  EHZBW" + bytes(28)
    out |= {"behind a header": head + marked, "gz behind a header": head + gzip.compress(marked)}
    return out | {"before a header": marked + head}


def test_the_bombs_explode(tmp_path):
    "Each disguise that Python's own tools open does harm there: the test below tests something."
    made = forms(tmp_path / "harm")
    assert len(made) >= 30
    for name in ("protocol 0", "protocol 5", "marked", "marked, protocol 0"):
        pickle.loads(made[name])
        (tmp_path / "harm").rmdir()
    with pytest.raises(Exception):  # noqa: B017  it complains after the harm is done
        obspy.read(io.BytesIO(made["marked"]))
    assert (tmp_path / "harm").exists(), "ObsPy no longer executes pickles; our rule may go"


def test_hostile_objects(tmp_path):
    "Under the names of a good archive: every one ends in quarantine, by name, and the good objects are used."
    place, folder = tmp_path / "harm", tmp_path / "archive"
    archive = write_archive(folder, obspy.read(), obspy.read_inventory())
    good = archive.find("continuous_waveforms")
    made = forms(place)
    for number, (name, data) in enumerate(made.items()):
        with pytest.raises(ValueError):
            read_miniseed(data)
        assert record_index(data).empty or "header" in name, name
        archive.write(archive.layout.key("XX", f"H{number:02d}", "", "EHZ", archive.list()["starttime"][0]), data)
    for refine in (False, True):
        manifest = build_manifest(archive, refine=refine)
        assert len(manifest) == len(good) + len(made)
    pipeline = SeismicDataPipeline(manifest, StationMetadataManager.from_archive(archive, manifest), window_length=5.0)
    dataset = pipeline.create_webdataset(url=tmp_path / "shards", progress=False)
    counts = pipeline.report["objects"]
    assert counts == {"listed": len(manifest), "used": len(good), "skipped": 0, "quarantined": len(made)}
    assert set(pipeline.quarantine["key"]) == set(manifest["key"]) - set(good) and len(dataset)
    for name, data in made.items():  # and where tables, station metadata and manifests are expected
        path = tmp_path / "hostile.parquet"
        path.write_bytes(data)
        with pytest.raises(Exception):  # noqa: B017  any refusal will do
            read_manifest(path)
        assert StationMetadataManager.from_files(path).table.empty
        assert not place.exists(), name
    assert not place.exists()


URLS = [
    *("pipe:touch {harm}", "pipe:cat {harm}", "exec:touch {harm}", "$(touch {harm})", "`touch {harm}`", "a>{harm}"),
    *("http://127.0.0.1:9/shards", "https://127.0.0.1:9/shards", "ftp://127.0.0.1/shards", "ssh://host/shards"),
    *("file://host/shards", "file://localhost{harm}", "s3://key:secret@bucket/shards", "s3://", "memory://shards"),
    *("gs://bucket/shards", "hdfs://127.0.0.1/shards", "git://host/repository", "github://me:you@main/", "data:,x"),
    *("simplecache::s3://bucket/shards", "zip://x.zip::file:///tmp/a", "shards-{{000000..000009}}.tar"),
    *("s3://bucket/shards-{{0..9}}.tar", "shards|touch {harm}", "shards\n{harm}", "shards\0", "", " "),
]


def test_addresses_are_refused(tmp_path, monkeypatch):
    "Only folders and S3: nothing else is opened, connected to or started, whatever an index or a setting says."
    started = []

    def refuse(*arguments, **settings):
        started.append(arguments)
        raise AssertionError("opened")

    for target, name in ((subprocess, "Popen"), (os, "system"), (os, "popen"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, refuse)
    harm = tmp_path / "harm"
    urls = [url.format(harm=harm) for url in URLS]
    manifest = build_manifest(write_archive(tmp_path / "archive", obspy.read()))
    before, refused = set(tmp_path.rglob("*")), 0
    monkeypatch.chdir(tmp_path)
    for url in urls:
        for ask in (
            lambda url=url: read_index(url),
            lambda url=url: verify_shards(url),
            lambda url=url: ShardDataset(url),
            lambda url=url: SeismicDataPipeline(manifest, window_length=5.0).create_webdataset(url=url, progress=False),
        ):
            with pytest.raises((ValueError, FileNotFoundError)):
                ask()
            refused += 1
    for url in (
        "pipe:x",
        "http://h/x",
        "file://host/x",
        "s3://k:s@b/x",
        "memory://x",
        "s3://b::x",
        "a::b",
        "",
        "s3://",
    ):
        for kind in (Store, Archive):
            if "://" in url or "::" in url or not url:
                with pytest.raises(ValueError):
                    kind(url)
    assert refused >= 80 and not started and not harm.exists()
    assert set(tmp_path.rglob("*")) == before


LOADERS = ("pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal")
EXECUTING = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "torch.hub.load",
    "hydra.utils.get_method",
    "hydra.utils.get_class",
}
GUESSING = {
    f"obspy.{name}" for name in ("read", "core.read", "core.stream.read", "read_events", "core.event.read_events")
}


def local_names(tree: ast.AST) -> dict[str, str]:
    "What the imported names of a module mean, such as `obspy.read`."
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                names[a.asname or a.name.partition(".")[0]] = a.name if a.asname else a.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def call_fault(name: str, bare: bool, settings: dict) -> str:
    "What is wrong with a call; empty where nothing is."
    module, _, verb = name.rpartition(".")
    if name in GUESSING and not bare and settings.get("format", "PICKLE") in ("PICKLE", None):
        return "without format="
    if (name == "torch.load" or verb == "load_from_checkpoint") and settings.get("weights_only") is not True:
        return "without weights_only=True"
    if name.startswith("numpy.") and settings.get("allow_pickle", False) is not False:
        return "with allow_pickle"
    if module == "yaml" and verb not in ("safe_load", "safe_load_all", "safe_dump", "dump"):
        return "where safe_load would do"
    if module.partition(".")[0] in LOADERS and verb in ("load", "loads", "open", "Unpickler"):
        return "that runs what it reads"
    if verb in ("read_pickle", "extractall", "gopen", "instantiate") or name in EXECUTING or settings.get("shell"):
        return "that runs what it is given"
    return ""


def module_faults(source: str) -> list[str]:
    "Where a module executes what it reads, or may."
    tree, faults = ast.parse(source), []
    names = local_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            dotted, function = [], node.func
            while isinstance(function, ast.Attribute):
                dotted.append(function.attr)
                function = function.value
            root = names.get(function.id, function.id) if isinstance(function, ast.Name) else "?"
            name = ".".join([root, *reversed(dotted)])
            settings = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
            if fault := call_fault(name, not (node.args or node.keywords), settings):
                faults.append(f"line {node.lineno}: {name} {fault}")
    return faults


BAD = [
    *("import obspy; obspy.read(path)", "from obspy import read; read(file)", "import obspy as o; o.read(path)"),
    *("from obspy import read as r; r(f, headonly=True)", 'import obspy; obspy.read(f, format="PICKLE")'),
    *("import obspy; obspy.read(f, format=None)", "import obspy.core.stream as s; s.read(f)"),
    *(
        "import torch; torch.load(p)",
        "import torch; torch.load(p, weights_only=False)",
        "from torch import load; load(p)",
    ),
    *("import numpy as np; np.load(p, allow_pickle=True)", "from numpy import load; load(p, allow_pickle=flag)"),
    *("import pickle; pickle.loads(b)", "from pickle import load; load(f)", "import joblib; joblib.load(p)"),
    *("import dill; dill.load(f)", "import marshal; marshal.loads(b)", "import pandas as pd; pd.read_pickle(p)"),
    *("import yaml; yaml.load(f)", "import yaml; yaml.unsafe_load(f)", "import tarfile; tarfile.open(p).extractall()"),
    *("eval(text)", "exec(text)", "import os; os.system(c)", "import subprocess; subprocess.run(c, shell=True)"),
    *("import torch; torch.hub.load(a, b)", "from hydra.utils import instantiate; instantiate(config)"),
    *("Task.load_from_checkpoint(p)", "import webdataset; webdataset.gopen(u)"),
]
GOOD = [
    *("import obspy; obspy.read()", 'import obspy; obspy.read(f, format="MSEED")', "import json; json.loads(t)"),
    *("import obspy; obspy.read(str(path), format=format)", "import torch; torch.load(p, weights_only=True)"),
    *("import numpy as np; np.load(p)", "import numpy as np; np.load(p, allow_pickle=False)", "model.eval()"),
    *("import yaml; yaml.safe_load(f)", "import pickle; pickle.UnpicklingError"),
]


@pytest.mark.parametrize("source", BAD)
def test_the_lint_finds(source):
    assert module_faults(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_lint_spares(source):
    assert not module_faults(source)


def test_modules_execute_nothing_they_read():
    "No module of the package opens a file in a way that may run what is in it."
    folder = Path(gp2vec.__file__).parent
    found = {path.name: module_faults(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    assert len(found) > 15 and not any(found.values()), {name: faults for name, faults in found.items() if faults}
