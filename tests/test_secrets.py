"""Keys, secrets and tokens stay in the environment: nothing that is written, logged, shown or pickled holds one."""

import base64
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import obspy
import pyarrow.parquet
import pytest
from conftest import KEY, NEW_KEY, NEW_SECRET, SECRET

from gp2vec.data.archive import Archive, Cache, Store, build_manifest, write_archive, write_manifest
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset
from gp2vec.data.metadata import StationMetadataManager

ROOT = Path(__file__).resolve().parents[1]
# Those that open the server, and those that other libraries look for.
CANARIES = {
    "AWS_ACCESS_KEY_ID": NEW_KEY,
    "AWS_SECRET_ACCESS_KEY": NEW_SECRET,
    "ES_OAUTH2__REFRESH_TOKEN": "canary-refresh-token",
    "HF_TOKEN": "hf_canarycanarycanary",
    "WANDB_API_KEY": "canarycanarywandb",
}
DAY = {"start": "2019-07-04", "end": "2019-07-05"}


def spelt(secret: str) -> list[bytes]:
    "A secret as it may be written."
    raw = secret.encode()
    return [raw, base64.b64encode(raw), urllib.parse.quote(secret).encode(), secret.encode("utf-16-le")]


def texts(name: str, data: bytes) -> list[bytes]:
    "A file as bytes, and what is packed in it."
    found = [data]
    if data[:4] == b"PAR1":
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        found += [repr(table.schema.metadata).encode(), table.to_pandas().to_csv().encode()]
    elif data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            found += [file.read(member) for member in file.namelist()]
    return found


def leaks(things: dict[str, bytes]) -> list[str]:
    "Which secret is where."
    return [
        f"{variable} in {name}"
        for name, data in things.items()
        for text in texts(name, data)
        for variable, secret in [*CANARIES.items(), ("key", KEY), ("secret", SECRET)]
        if any(form in text for form in spelt(secret))
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def canaries(s3_server, monkeypatch, tmp_path):
    "A user whose environment is full of secrets."
    s3_server.env(monkeypatch)
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def stations(s3_server):
    "A private archive of five stations with ten minutes each."
    stream, draw = obspy.Stream(), np.random.default_rng(0)
    for number in range(5):
        for channel in ("HHZ", "HHN", "HHE"):
            header = {"network": "XX", "station": f"S{number}", "channel": channel, "sampling_rate": 100.0}
            header["starttime"] = obspy.UTCDateTime("2019-07-04T01:00:00")
            stream += obspy.Trace((draw.normal(size=60_000) * 1e4).astype(np.int32), header)
    with pytest.MonkeyPatch.context() as patch:
        s3_server.env(patch)
        write_archive("s3://private/canary", stream, obspy.read_inventory())
    return "s3://private/canary"


def test_the_search_finds(tmp_path):
    "A secret is found in plain, in base64, in a checkpoint and in a table."
    import pandas as pd
    import torch

    pd.DataFrame({"url": [f"s3://{NEW_SECRET}@bucket"]}).to_parquet(tmp_path / "table.parquet")
    torch.save({"hyper_parameters": {"storage": NEW_SECRET}}, tmp_path / "model.ckpt")
    (tmp_path / "log").write_bytes(base64.b64encode(NEW_SECRET.encode()))
    assert len({leak.rpartition(" ")[2] for leak in leaks(files(tmp_path))}) == 3


def test_objects_and_files(canaries, stations, tmp_path, caplog):
    "Representations, pickles, attributes, manifests, station tables, shards, and all that is logged at DEBUG."
    caplog.set_level(logging.DEBUG, "gp2vec")
    store = Store("s3://private", credentials="environment")
    archive = Archive(stations, credentials="environment")
    manifest = build_manifest(archive, **DAY, refine=True)
    manager = StationMetadataManager.from_archive(archive, manifest)
    pipeline = SeismicDataPipeline(manifest, manager, credentials="environment")
    dataset = pipeline.create_webdataset(url=tmp_path / "shards", progress=False)
    cache = Cache(tmp_path / "cache", 10**8)
    assert len(dataset) > 80
    cache.path(archive, manifest["key"][0])
    write_manifest(manifest, tmp_path / "manifest.parquet")
    write_manifest(manifest, f"{tmp_path}/manifest/")
    manager.write(tmp_path / "stations.parquet")
    things = files(tmp_path) | {"log": caplog.text.encode()}
    for thing in (store, archive, cache, pipeline, dataset, manager, ShardDataset(tmp_path / "shards")):
        name = type(thing).__name__
        things |= {f"repr of {name}": repr(thing).encode(), f"str of {name}": str(thing).encode()}
        things[f"state of {name}"] = repr(vars(thing)).encode()
        things[f"pickle of {name}"] = pickle.dumps(thing)
        assert pickle.loads(things[f"pickle of {name}"]) is not None
    for question in (
        lambda: store.read("nothing"),
        lambda: store.read("ready", 99),
        lambda: Store("s3://absent").find(),
    ):
        with pytest.raises(OSError) as error:
            question()
        things[f"error {len(things)}"] = repr(error.getrepr(style="long", showlocals=True)).encode()
        things[f"error {len(things)}"] = str(error.value).encode()
    assert len(things) > 30 and not leaks(things)


def test_training(canaries, stations, tmp_path):
    "A training run on a private archive: shards, tables, checkpoints, metrics, and what it prints at DEBUG."
    settings = [
        f"data.archive={stations}",
        "data.credentials=environment",
        f"data.start={DAY['start']}",
        f"data.end={DAY['end']}",
        f"data.directory={tmp_path / 'data'}",
        f"output={tmp_path / 'run'}",
        "train.max_steps=3",
        "train.checkpoint_every=3",
        "--config-name=experiment/debug",
    ]
    program = "import logging, sys; logging.getLogger('gp2vec').setLevel('DEBUG'); from gp2vec.train.train import main;"
    command = [sys.executable, "-c", f"{program} sys.exit(main({settings!r}))"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    things = files(tmp_path) | {"stdout": done.stdout, "stderr": done.stderr}
    names = " ".join(things)
    assert "manifest.parquet" in names and ".ckpt" in names and ".tar" in names and "metrics.csv" in names, names
    assert not leaks(things)


def test_executed_notebook(canaries, stations, tmp_path):
    "What a notebook shows of our objects, and of their errors."
    cells = [
        "from gp2vec.data.archive import Archive, Store",
        f"archive = Archive({stations!r}, credentials='environment')\narchive",
        "vars(archive)",
        "archive.list(start='2019-07-04', end='2019-07-05')",
        "archive.__dict__, archive.layout, archive.path('x')",
        "try:\n    archive.read('nothing')\nexcept OSError as error:\n    print(error)",
    ]
    code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [code | {"id": f"cell-{number}", "source": cell} for number, cell in enumerate(cells)]
    path = tmp_path / "shown.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    command = [sys.executable, "tools/execute.py", os.fspath(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    shown = path.read_text()
    assert shown.count('"output_type"') >= 5, done.stderr[-2000:]
    assert not leaks({"notebook": shown.encode(), "stdout": done.stdout.encode(), "stderr": done.stderr.encode()})


def test_committed_files():
    "No file of the project holds what looks like a key, and no executed notebook a secret of this machine."
    keys = re.compile(
        r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|hf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY|gh[po]_[A-Za-z0-9]{36}"
    )
    mine = [v for k, v in os.environ.items() if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY", k) and len(v) >= 12]
    found, looked = [], 0
    for folder in ("nbs", "gp2vec", "tests", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".ipynb", ".py", ".yaml", ".yml", ".md", ".json", ".ini"):
                text, looked = path.read_text(errors="replace"), looked + 1
                found += [str(path)] if keys.search(text) or any(secret in text for secret in mine) else []
    assert looked > 50 and not found
