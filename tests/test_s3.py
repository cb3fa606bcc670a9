"""Archives on a real S3 server: the same answers as from a folder, and refusals that are refusals."""

import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import obspy
import pandas as pd
import pytest

from gp2vec.data.archive import LAYOUTS, Archive, Store, build_manifest, read_manifest, write_archive, write_manifest
from gp2vec.data.metadata import StationMetadataManager

DAYS = {"start": "2009-08-24", "end": "2009-08-25"}


def example() -> obspy.Stream:
    "The three components that ObsPy ships, as counts, at three stations of two networks."
    stream = obspy.Stream()
    for network, station in (("BW", "RJOB"), ("BW", "FURT"), ("GR", "WET")):
        for trace in obspy.read():
            trace.stats.network, trace.stats.station = network, station
            trace.data = np.round(trace.data).astype(np.int32)
            stream += trace
    return stream


@pytest.fixture(scope="module")
def folders(tmp_path_factory, s3_server):
    "An archive of each layout in a folder and, object for object, in the public bucket."
    root, fs = tmp_path_factory.mktemp("archives"), s3_server.fs()
    for name, layout in LAYOUTS.items():
        archive = write_archive(root / name, example(), obspy.read_inventory(), layout)
        for key in archive.find():
            fs.pipe_file(f"public/{name}/{key}", archive.read(key))
    return root


def on_s3(server, name: str, **settings) -> Archive:
    return Archive(f"s3://public/{name}", endpoint_url=server.endpoint_url, **settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bucket_is_like_folder(s3_server, folders, name):
    "Anonymous: the layout is recognised, the manifest, refined or not, and every byte are the same."
    local, remote = Archive(folders / name), on_s3(s3_server, name)
    assert remote.layout is local.layout is LAYOUTS[name]
    assert list(remote.find()) == list(local.find())
    for refine in (False, True):
        ours, theirs = (build_manifest(a, channels="EH?", **DAYS, refine=refine) for a in (remote, local))
        assert len(theirs) == (3 if name == "earthscope" and not refine else 9)
        pd.testing.assert_frame_equal(ours.drop(columns=["url", "etag"]), theirs.drop(columns=["url", "etag"]))
        assert all(url == f"s3://public/{name}/{key}" for url, key in zip(ours["url"], ours["key"], strict=True))
    for row in ours.itertuples():
        data = remote.read(row.key, row.byte_size, row.etag)
        assert data == local.read(row.key)
        assert row.etag == hashlib.md5(data).hexdigest()
        assert remote.read_range(row.key, 512, 1024) == data[512:1024]


def test_listing_is_bounded(s3_server, folders, monkeypatch):
    "Only prefixes of the days and networks that are wanted are asked for."
    asked, find = [], Archive.find
    monkeypatch.setattr(Archive, "find", lambda self, prefix="": asked.append(prefix) or find(self, prefix))
    day = "continuous_waveforms/2009/2009_236/"
    assert len(on_s3(s3_server, "scedc", layout="scedc").list("BW", **DAYS)) == 6
    assert len(on_s3(s3_server, "scedc", layout="scedc").list("BW", "RJOB", "EHZ", **DAYS)) == 1
    assert len(on_s3(s3_server, "scedc", layout="scedc").list(**DAYS)) == 9
    assert len(on_s3(s3_server, "ncedc", layout="ncedc").list(["GR", "CI"], **DAYS)) == 3
    assert asked[:3] == [f"{day}BW", f"{day}BWRJOB_", day]
    assert asked[3:] == ["continuous_waveforms/CI/2009/2009.236/", "continuous_waveforms/GR/2009/2009.236/"]
    with pytest.raises(ValueError, match="expected start and end"):
        on_s3(s3_server, "scedc", layout="scedc").list("BW")
    with_prefix = Archive("s3://public/scedc/continuous_waveforms/2009/", endpoint_url=s3_server.endpoint_url)
    assert len(with_prefix.list()) == 9


def test_more_than_one_page(s3_server):
    "S3 hands out a thousand keys at a time."
    fs = s3_server.fs()
    keys = [f"miniseed/XX/2020/001/S{number:04d}.XX.2020.001" for number in range(1003)]
    fs.pipe({f"public/pages/{key}": b"" for key in keys}, batch_size=64)
    table = on_s3(s3_server, "pages", layout="earthscope").list("XX", start="2020-01-01", end="2020-01-02")
    assert list(table["key"]) == keys


def test_versions_in_keys(s3_server, folders):
    "`#2` is part of the key: the highest is listed, and its own bytes are read."
    fs, key = s3_server.fs(), "miniseed/BW/2009/236/RJOB.BW.2009.236"
    bodies = {f"#{version}": f"version {version}".encode() for version in (1, 2, 10)}
    for suffix, body in bodies.items():
        fs.pipe_file(f"public/versions/{key}{suffix}", body)
    archive = on_s3(s3_server, "versions", layout="earthscope")
    (row,) = archive.list("BW", **DAYS).itertuples()
    assert (row.key, row.version) == (f"{key}#10", 10)
    assert {suffix: archive.read(key + suffix) for suffix in bodies} == bodies


def test_refusals(s3_server, folders, monkeypatch):
    "Anonymous users read what is public, write nothing, and a wrong secret opens nothing."
    url = s3_server.endpoint_url
    for forbidden in (
        lambda: Store("s3://private", endpoint_url=url).read("ready"),
        lambda: Store("s3://private", endpoint_url=url).find(),
        lambda: Store("s3://public", endpoint_url=url).write("ready", b"mine"),
    ):
        with pytest.raises(PermissionError):
            forbidden()
    s3_server.env(monkeypatch, secret="wrong")
    for forbidden in (
        lambda: Store("s3://private", anon=False).read("ready"),
        lambda: Store("s3://private", anon=False).find(),
    ):
        with pytest.raises(PermissionError) as error:
            forbidden()
        assert "wrong" not in str(error.value)
    s3_server.env(monkeypatch)
    assert Store("s3://private", anon=False).read("ready") == b"yes"


def test_keyed_write(s3_server, folders, monkeypatch, caplog):
    "With credentials from the environment an archive and its manifest are written and read; no secret is told."
    s3_server.env(monkeypatch)
    caplog.set_level(logging.DEBUG, "gp2vec")
    archive = write_archive("s3://private/ours", example(), obspy.read_inventory())
    local = Archive(folders / "scedc")
    assert {key: archive.read(key) for key in archive.find()} == {key: local.read(key) for key in local.find()}
    manifest = build_manifest(archive, **DAYS, refine=True)
    for path in ("s3://private/tables/manifest.parquet", "s3://private/tables/manifest/"):
        write_manifest(manifest, path)
        pd.testing.assert_frame_equal(read_manifest(path), manifest)
    write_manifest(manifest[manifest["network"] == "GR"], path)
    assert set(read_manifest(path)["network"]) == {"GR"}
    told = caplog.text.encode() + pickle.dumps(archive) + repr(archive).encode() + repr(vars(archive)).encode()
    assert s3_server.secret.encode() not in told and s3_server.key.encode() not in told


def test_station_xml(s3_server, folders):
    "Metadata beside the waveforms; the unauthoritative store is read where the first has nothing."
    fs = s3_server.fs()
    xml = Archive(folders / "scedc").station_xml("BW", "RJOB")[0]
    fs.pipe_file("public/scedc/FDSNstationXML/unauthoritative-XML/BW.FURT.xml", xml.replace(b'"RJOB"', b'"FURT"'))
    archive = on_s3(s3_server, "scedc")
    assert archive.station_xml("BW", "RJOB") == [xml]
    stations = StationMetadataManager.from_archive(archive, archive.list(**DAYS))
    assert list(stations.missing) == [] and len(stations.coordinates()) == 3
    for station in ("RJOB", "FURT"):
        assert stations.lookup("BW", station, "", "EHZ", "2009-08-24")["response_flag"] == "ok"


@pytest.mark.parametrize("damage", ["short", "flipped"])
def test_damaged_body(s3_server, folders, monkeypatch, damage):
    "A body that differs from the listing is asked for again; a second failure is an error, never data."
    archive = on_s3(s3_server, "ncedc")
    row = archive.list("GR", channels="EHZ", **DAYS).iloc[0]
    whole, bad = (
        archive.read(row.key),
        {"short": lambda b: b[:-512], "flipped": lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]},
    )
    answers, fetch = [], type(archive.fs).cat_file
    monkeypatch.setattr(archive.fs, "cat_file", lambda path: answers.pop(0)(fetch(archive.fs, path)))
    answers[:] = [bad[damage], bytes]
    assert archive.read(row.key, row.byte_size, row.etag) == whole
    answers[:] = [bad[damage], bad[damage]]
    with pytest.raises(OSError, match="twice"):
        archive.read(row.key, row.byte_size, row.etag)


def _size(archive: Archive, key: str) -> int:
    return len(archive.read(key))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(s3_server, folders, method):
    "An archive that is in use travels to workers, forked or spawned."
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is safe to test on Linux only")
    archive = on_s3(s3_server, "scedc")
    key = archive.list("BW", **DAYS)["key"][0]
    expected = _size(archive, key)
    if method == "spawn":
        code = "import pickle, sys; a, key = pickle.load(sys.stdin.buffer); print(len(a.read(key)))"
        told = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps((archive, key)), capture_output=True, check=True
        )
        assert int(told.stdout) == expected
        return
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(_size, archive, key).result(timeout=20) == expected
    assert archive._pid == os.getpid() and obspy.read(io.BytesIO(archive.read(key)), format="MSEED")
