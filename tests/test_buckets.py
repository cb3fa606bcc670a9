"""Recordings of all four archives together: one manifest, one station table, one set of shards; from S3 and folders.

They are not part of the project: `GP2VEC_DATA=/data pytest tests/test_buckets.py` where `/data/buckets/scedc-pds/…` and
the others hold objects under their archives' own keys, and `/data/stationxml/*.xml` station metadata.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gp2vec.data.archive import (
    LAYOUTS,
    Archive,
    as_manifest,
    build_manifest,
    read_manifest,
    refine_manifest,
    write_manifest,
)
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset, verify_shards
from gp2vec.data.metadata import StationMetadataManager

DATA = Path(os.environ.get("GP2VEC_DATA") or "no data")
FOLDERS = {"scedc": "scedc-pds", "ncedc": "ncedc-pds", "earthscope": "earthscope", "geonet": "geonet-open-data"}
BUCKETS = FOLDERS | {"earthscope": "earthscope-geophysical-data"}
pytestmark = pytest.mark.skipif(
    not all((DATA / "buckets" / name).is_dir() for name in FOLDERS.values()),
    reason="no recordings of the archives: GP2VEC_DATA names a folder with buckets/scedc-pds and three more",
)


@pytest.fixture(scope="module")
def buckets(s3_server):
    "All objects on the S3 server, each archive in a bucket of its real name; how many of waveforms each has."
    fs, counts = s3_server.fs(), Counter()
    for name, folder in FOLDERS.items():
        bucket, root = BUCKETS[name], DATA / "buckets" / folder
        fs.mkdir(f"s3://{bucket}")
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            key = path.relative_to(root).as_posix()
            fs.pipe_file(f"{bucket}/{key}", path.read_bytes())
            counts[name] += key.startswith(LAYOUTS[name].folder)
    return counts


@pytest.fixture(scope="module")
def archives(s3_server, buckets):
    "By where they lie: S3 and folders; no layout is named, so it is found out."
    return {
        "s3": {n: Archive(f"s3://{BUCKETS[n]}", endpoint_url=s3_server.endpoint_url) for n in FOLDERS},
        "file": {n: Archive(f"file://{DATA / 'buckets' / folder}") for n, folder in FOLDERS.items()},
    }


@pytest.fixture(scope="module")
def manifests(archives):
    "Of each place, everything that it has: first by networks alone, as a bucket may be asked for."
    found = {}
    for place, by_name in archives.items():
        parts = []
        for name, archive in by_name.items():
            networks = sorted({row["network"] for row in map(archive.layout.parse, keys_of(archive)) if row})
            parts.append(build_manifest(archive, networks))
            assert archive.layout is LAYOUTS[name]
        found[place] = as_manifest(pd.concat(parts))
    return found


def keys_of(archive: Archive) -> list[str]:
    return list(archive.find(archive.layout.folder))


def test_one_manifest(manifests, buckets, archives, tmp_path):
    "Every object of the four archives is a row, with the same size and name from S3 and from the folder."
    remote, local = manifests["s3"], manifests["file"]
    assert Counter(remote["layout"]) == Counter(local["layout"]) == buckets
    same = [
        "key",
        "layout",
        "network",
        "station",
        "location",
        "channel",
        "starttime",
        "endtime",
        "byte_size",
        "version",
    ]
    pd.testing.assert_frame_equal(remote[same], local[same])
    assert remote["etag"].str.fullmatch("[0-9a-f]{32}").all()
    for path in (tmp_path / "manifest.parquet", f"{tmp_path}/manifest/"):
        write_manifest(remote, path)
        pd.testing.assert_frame_equal(read_manifest(path), remote)
    print(f"{len(remote)} objects, {remote['byte_size'].sum() / 1e6:.1f} MB: {dict(buckets)}")


def test_refined(manifests, archives):
    "From the headers, by ranges, the same from S3 and from the folder; every object of several channels is spread out."
    told = {}
    for place, by_name in archives.items():
        rows = manifests[place]
        parts = [refine_manifest(archive, rows[rows["layout"] == name]) for name, archive in by_name.items()]
        told[place] = as_manifest(pd.concat(parts)).drop(columns=["url", "etag"])
    pd.testing.assert_frame_equal(told["s3"], told["file"])
    rates = told["s3"]["sampling_rate"]
    assert told["s3"]["channel"].notna().all() and rates.notna().all()
    print(f"{len(rates)} channels of {told['s3']['key'].nunique()} objects at {sorted(set(map(float, rates)))} Hz")


@pytest.fixture(scope="module")
def stations(archives, manifests):
    "Station tables of both places: beside the waveforms where the archive keeps some, else from files."
    files, tables = StationMetadataManager.from_files(DATA / "stationxml" / "*.xml").table, {}
    for place, by_name in archives.items():
        rows = manifests[place]
        beside = [StationMetadataManager.from_archive(a, rows[rows["layout"] == n]).table for n, a in by_name.items()]
        table = pd.concat([*beside, files], ignore_index=True)
        keys = ["network", "station", "location", "channel", "starttime"]
        tables[place] = StationMetadataManager(table.drop_duplicates(keys, ignore_index=True))
    return tables


def test_one_station_table(stations, manifests):
    "The same table from both places; most stations of the manifest are in it."
    remote, local = stations["s3"].table, stations["file"].table
    assert len(remote) == len(local) > 100
    listed = set(zip(manifests["s3"]["network"], manifests["s3"]["station"], strict=True))
    known = set(zip(remote["network"], remote["station"], strict=True)) & listed
    print(
        f"{len(remote)} channel epochs of {remote['station'].nunique()} stations; {len(known)} of {len(listed)} listed"
    )
    assert len(known) > len(listed) / 2


@pytest.mark.timeout(900)
def test_one_set_of_shards(stations, manifests, s3_server, buckets, tmp_path, monkeypatch):
    "Every object is used, skipped or quarantined; the shards of both places are the same, bit for bit."
    s3_server.env(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))  # where copies of shards go
    urls = {"s3": "s3://private/shards", "file": f"file://{tmp_path}/shards"}
    told = {}
    for place, manifest in manifests.items():
        pipeline = SeismicDataPipeline(manifest, stations[place])
        dataset = pipeline.create_webdataset(url=urls[place], shard_size=500, progress=False)
        report = pipeline.report
        counts = report["objects"]
        print(place, report, pipeline.quarantine.to_dict("records"))
        assert counts["listed"] == sum(buckets.values()) == counts["used"] + counts["skipped"] + counts["quarantined"]
        assert counts["quarantined"] == len(pipeline.quarantine) and report["windows"] == len(dataset) > 1000
        told[place] = report, {shard.sha256 for shard in verify_shards(urls[place]).shards}
    assert told["s3"] == told["file"]
    dataset = ShardDataset(urls["s3"], shuffle=False)
    samples = dataset.__getitems__(np.linspace(0, len(dataset) - 1, 300).astype(int).tolist())
    assert all(np.isfinite(sample["waveform"]).all() and sample["component_mask"].any() for sample in samples)
    assert len({sample["id"].split(".")[0] for sample in samples}) >= 4
