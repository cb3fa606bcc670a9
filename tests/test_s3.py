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
from botocore.exceptions import ClientError

import gp2vec.data.archive as archive_module
from gp2vec.data.archive import (
    LAYOUTS,
    Archive,
    Cache,
    Place,
    Retry,
    Store,
    build_manifest,
    extend_manifest,
    read_manifest,
    read_records,
    record_index,
    refine_manifest,
    write_archive,
    write_manifest,
)
from gp2vec.data.metadata import StationMetadataManager, station_places

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


@pytest.fixture
def asked(monkeypatch):
    "Every question to S3: prefix and delimiter of a listing."
    seen, pages = [], archive_module._pages

    def counted(store, prefix, delimiter=""):
        for page in pages(store, prefix, delimiter):
            seen.append(prefix + delimiter * (not prefix.endswith(delimiter)) if delimiter else prefix)
            yield page

    monkeypatch.setattr(archive_module, "_pages", counted)
    return seen


def test_listing_is_bounded(s3_server, folders, asked):
    "Only prefixes of the days, networks, stations and channels that are wanted are asked for."
    day = "continuous_waveforms/2009/2009_236/"

    def listed(name, *codes, **days):
        asked.clear()
        return len(on_s3(s3_server, name, layout=name).list(*codes, **days)), set(asked)

    assert listed("scedc", "BW", **DAYS) == (6, {f"{day}BW"})
    assert listed("scedc", "BW", "RJOB", "EHZ", **DAYS) == (1, {f"{day}BWRJOB_EHZ"})
    assert listed("scedc", "BW", "RJOB", "E*", **DAYS) == (3, {f"{day}BWRJOB_E"})
    assert listed("scedc", **DAYS) == (9, {day})
    near, of = "continuous_waveforms/", "2009/2009.236/"
    assert listed("ncedc", ["GR", "CI"], **DAYS) == (3, {f"{near}CI/{of}", f"{near}GR/{of}"})
    assert listed("earthscope", "B?", "RJOB", **DAYS) == (1, {"miniseed/", "miniseed/BW/2009/236/RJOB.BW.2009.236"})
    assert listed("geonet", "BW", "RJOB", **DAYS) == (3, {"waveforms/miniseed/2009/2009.236/RJOB.BW/2009.236.RJOB."})
    assert listed("sds", "BW", ["RJOB"], "EHZ", **DAYS) == (1, {"2009/BW/RJOB/EHZ."})
    asked.clear()
    with_prefix = Archive("s3://public/scedc/continuous_waveforms/2009/", "scedc", endpoint_url=s3_server.endpoint_url)
    assert len(with_prefix.list()) == 9 and near not in asked[1:]


def test_listing_without_days(s3_server, folders, asked):
    "Which years and days there are, the folders tell; what cannot match is not listed."
    near = "continuous_waveforms/"
    assert len(on_s3(s3_server, "scedc", layout="scedc").list(["GR", "CI"])) == 3
    assert asked[:2] == [near, f"{near}2009/"]
    assert set(asked[2:]) == {f"{near}2009/2009_236/CI", f"{near}2009/2009_236/GR"}
    asked.clear()
    assert len(on_s3(s3_server, "ncedc", layout="ncedc").list(["GR", "CI"])) == 3
    assert set(asked) == {f"{near}GR/", f"{near}CI/", f"{near}GR/2009/"}
    asked.clear()
    assert len(on_s3(s3_server, "scedc", layout="scedc").list("BW", start="2009-08-25")) == 0
    assert asked == [near, f"{near}2009/"]
    with pytest.raises(ValueError, match="expected networks, stations, a start or an end"):
        Archive("s3://scedc-pds").list()


def test_extension_lists_only_what_is_new(s3_server, folders, asked, monkeypatch):
    "A second run asks for no day again that ended more than a week ago, whatever the networks; a new day is found."
    s3_server.env(monkeypatch)
    archive = write_archive("s3://private/growing", example(), layout="scedc")
    for path in ("s3://private/grown/m.parquet", "s3://private/grown/m/"):
        assert len(extend_manifest(path, archive, ["BW"])) == 6
        asked.clear()
        first = extend_manifest(path, archive, ["BW"])
        assert asked == ["continuous_waveforms/"] + ["network="] * path.endswith("/")
        asked.clear()
        assert len(extend_manifest(path, archive, ["BW", "GR"])) == 9
        assert [p for p in asked if "236" in p] == ["continuous_waveforms/2009/2009_236/GR"]
        pd.testing.assert_frame_equal(read_manifest(path).query("network == 'BW'"), first)
    late = obspy.UTCDateTime() - 3 * 86400
    new = example().select(station="WET")
    for trace in new:
        trace.stats.starttime = late
    write_archive("s3://private/growing", new, layout="scedc")
    day = f"continuous_waveforms/{late.year}/{late.year}_{late.julday:03d}/"
    for _ in range(2):  # young days are asked for again
        asked.clear()
        assert len(extend_manifest(path, archive, ["BW", "GR"])) == 12
        assert sorted(p for p in asked if p.count("/") > 2) == [f"{day}BW", f"{day}GR"]
    assert len(extend_manifest(path, Archive(folders / "earthscope"))) == 15
    refined = extend_manifest(path, archive, ["BW", "GR"], refine=True)
    assert refined["sampling_rate"].notna().sum() == 12 and len(refined) == 15


def test_refining_by_ranges(s3_server, folders, tmp_path, monkeypatch):
    "Bounds and rates by a few headers are those of all records; where they are irregular, the whole object is read."
    s3_server.env(monkeypatch)
    rng, start = np.random.default_rng(0), obspy.UTCDateTime("2020-01-01T03:00:00.5")
    traces = [
        obspy.Trace(
            rng.integers(-9000, 9000, 60_000).astype(np.int32),
            {"network": "XX", "station": "A", "channel": channel, "sampling_rate": rate, "starttime": start + shift},
        )
        for channel, rate, shift in (("HHE", 100, 0), ("HHN", 100, 7), ("LHZ", 1, 0), ("HHZ", 100, 3))
    ]
    traces[2].data = traces[2].data[:700]
    pieces = [archive_module._pack(trace) for trace in traces]
    records = [piece[at : at + 512] for piece in pieces for at in range(0, len(piece), 512)]
    late = [*records[40:60], *records[:40], *records[60:]]
    bodies = {
        "REG": (b"".join(pieces), False),
        "MIXED": (b"".join(records[:: len(records) // 2] + records), True),
        "LATE": (b"".join(late), True),
        "TAIL": (b"".join(pieces) + bytes(300), True),
        "GAP": (pieces[0][: 40 * 512] + pieces[0][90 * 512 :], False),
        "RATES": (pieces[0] + archive_module._pack(traces[0].copy().resample(50)), True),
        "SHORT": (pieces[2], True),
        "EMPTY": (b"", True),
    }
    archive, whole = Archive("s3://private/refine", "earthscope", credentials="environment"), []
    for station, (body, _) in bodies.items():
        archive.write(f"miniseed/XX/2020/001/{station}.XX.2020.001", body)
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *a: whole.append(key) or read(self, key, *a))
    listed = archive.list("XX")
    for row in listed.to_dict("records"):
        whole.clear()
        found = archive_module._refined(archive, row)
        body, must = bodies[row["station"]]
        assert bool(whole) is must, row["station"]
        expected = archive_module._bounds(archive_module.record_index(body))
        assert found == ([row | told for told in expected] or [row])
    assert len(refine_manifest(archive, listed, "HH?", workers=3)) >= 8


def test_records_by_ranges(s3_server, folders, spoil):
    "A stretch of time is read in pieces, each verified by the checksum of its record."
    archive = on_s3(s3_server, "earthscope")
    row = archive.list("GR", **DAYS).iloc[0]
    index = record_index(archive, row.key, row.byte_size, row.etag)
    whole = archive.read(row.key)
    assert index["length"].sum() == len(whole) and set(index["channel"]) == {"EHE", "EHN", "EHZ"}
    start = int(index["starttime"].min())
    span = (start + 5 * 10**9, start + 10 * 10**9)
    piece = read_records(archive, row.key, index, *span, "EHZ")
    chosen = index.query("channel == 'EHZ' and endtime > @span[0] and starttime < @span[1]")
    assert piece == b"".join(whole[a : a + n] for a, n in zip(chosen["offset"], chosen["length"], strict=True))
    assert 0 < len(piece) < len(whole) / 4
    spoil[:] = [lambda b: b[:70] + bytes([b[70] ^ 4]) + b[71:]] * 2  # the second reading of a plain connection too
    assert read_records(archive, row.key, index, *span, "EHZ") == piece and not spoil


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
        lambda: Store("s3://private", credentials="environment").read("ready"),
        lambda: Store("s3://private", credentials="environment").find(),
    ):
        with pytest.raises(PermissionError) as error:
            forbidden()
        assert "wrong" not in str(error.value)
    s3_server.env(monkeypatch)
    assert Store("s3://private", credentials="environment").read("ready") == b"yes"


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
    assert list(stations.missing) == [] and len(station_places(stations.table)) == 3
    for station in ("RJOB", "FURT"):
        assert stations.lookup("BW", station, "", "EHZ", "2009-08-24")["response_flag"] == "ok"


DAMAGE = {"short": lambda b: b[:-512], "flipped": lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:]}
QUICK = Retry(budget=5.0, first=0.01, longest=0.05, timeout=5.0)


@pytest.fixture
def spoil(monkeypatch):
    "Let the next answers of S3 pass through these functions, which may change the body or raise."
    waiting, get = [], archive_module._get_object

    async def spoilt(fs, path, asked):
        data, reply = await get(fs, path, asked)
        return (waiting.pop(0)(data) if waiting else data), reply

    monkeypatch.setattr(archive_module, "_get_object", spoilt)
    return waiting


def failing(code: str, status: int):
    "An answer of S3 that is an error."

    def answer(data):
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

    return answer


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_body(s3_server, folders, spoil, damage):
    "A body that differs from what was promised is asked for again, and after five times it is an error, never data."
    archive = on_s3(s3_server, "ncedc")
    archive.retry = QUICK
    row = archive.list("GR", channels="EHZ", **DAYS).iloc[0]
    whole = archive.read(row.key)
    for promised in ((row.byte_size, row.etag), ()):
        spoil[:] = [DAMAGE[damage]] * 2
        assert archive.read(row.key, *promised) == whole and not spoil
        spoil[:] = [DAMAGE[damage]] * 5
        with pytest.raises(OSError, match="5 times"):
            archive.read(row.key, *promised)
    spoil[:] = [lambda b: b[:-1]]
    assert archive.read_range(row.key, 512, 1024) == whole[512:1024] and not spoil


def test_failures_that_pass(s3_server, folders, spoil, caplog):
    "Busy, broken and silent servers are asked again, and told of once; a budget ends it."
    archive = on_s3(s3_server, "ncedc")
    archive.retry = QUICK
    row = archive.list("GR", channels="EHZ", **DAYS).iloc[0]

    def cut(data):
        raise ConnectionResetError

    passing = [failing("SlowDown", 503), failing("InternalError", 500), failing("", 502), cut]
    spoil[:] = passing
    assert len(archive.read(row.key)) == row.byte_size and not spoil
    assert caplog.text.count("asking again") == 1
    archive.retry = Retry(budget=0.3, first=0.01, longest=0.05)
    spoil[:] = [cut] * 1000
    with pytest.raises(OSError, match="no answer in 0.3 s"):
        archive.read(row.key)
    assert 6 < 1000 - len(spoil) < 80


def test_failures_that_stay(s3_server, folders, spoil):
    "A missing object, another object than was listed and a part beyond the end are errors at once."
    archive, fs = on_s3(s3_server, "ncedc"), s3_server.fs()
    spoil[:] = [bytes] * 3
    with pytest.raises(FileNotFoundError, match="s3://public/ncedc/nothing"):
        archive.read("nothing")
    fs.pipe_file("public/ncedc/replaced", b"first")
    etag = archive.find("replaced")["replaced"]["etag"]
    fs.pipe_file("public/ncedc/replaced", b"again")
    for read in (
        lambda: archive.read("replaced", 5, etag),
        lambda: archive.read_ranges("replaced", [(1, 3)], 5, etag),
    ):
        with pytest.raises(OSError, match="list it anew"):
            read()
    assert archive.read("replaced", 5) == b"again"
    with pytest.raises(OSError, match="ends at byte 5|has 5"):
        archive.read_range("replaced", 3, 9)
    fs.rm_file("public/ncedc/replaced")


def test_expired_keys_are_renewed_once(s3_server, folders, spoil, monkeypatch):
    "Keys that ran out are replaced by those that the environment has now; twice in a row is an error."
    s3_server.env(monkeypatch)
    store, renewed = Store("s3://private", credentials="environment"), []
    monkeypatch.setattr(Store, "_renew", lambda self, *a: renewed.append(a) or Place._renew(self, *a))
    spoil[:] = [failing("ExpiredToken", 400)]
    assert store.read("ready") == b"yes" and len(renewed) == 1
    spoil[:] = [failing("ExpiredToken", 403)] * 2
    with pytest.raises(PermissionError, match="log in again"):
        store.read("ready")


def test_large_objects_are_verified(s3_server, folders, monkeypatch):
    "An object that was sent in parts has an ETag of parts, by which it is verified."
    s3_server.env(monkeypatch)
    body = np.random.default_rng(0).bytes(70 << 20)
    store = Store("s3://private", credentials="environment")
    store.write("large", body)
    (info,) = store.find("large").values()
    assert "-" in info["etag"] and archive_module._matches(body, info["etag"])
    assert store.read("large", **info) == body
    spans = [(0, 10), (69 << 20, (69 << 20) + 4096), (11, 40)]
    assert store.read_ranges("large", spans, **info) == [body[a:b] for a, b in spans]
    store.remove("large")
    assert not store.find("large")


def _cached(folder, store: Store, key: str, info: dict) -> bytes:
    return Cache(folder, 10**7).path(store, key, **info).read_bytes()


def test_cache(s3_server, folders, spoil, tmp_path, monkeypatch):
    "A copy is verified, downloaded once by whoever comes first, and the least recently used go."
    s3_server.env(monkeypatch)
    store, bodies = Store("s3://private/shards", credentials="environment"), {}
    for number in range(4):
        bodies[f"s{number}.tar"] = body = np.random.default_rng(number).bytes(10_000)
        store.write(f"s{number}.tar", body)
    infos = {k: i | {"sha256": hashlib.sha256(bodies[k]).hexdigest()} for k, i in store.find().items()}
    cache = Cache(tmp_path / "cache", 25_000)
    paths = {key: cache.path(store, key, **infos[key]) for key in ("s0.tar", "s1.tar")}
    spoil[:] = [bytes] * 100
    for key, path in paths.items():
        assert cache.path(store, key, **infos[key]) == path and path.read_bytes() == bodies[key]
        assert path.suffix == ".tar"
    assert len(spoil) == 100, "a copy that is there was asked for again"
    spoil.clear()
    assert cache.path(store, "s0.tar", **infos["s0.tar"]).exists()
    cache.path(store, "s2.tar", **infos["s2.tar"])
    assert [p.exists() for p in paths.values()] == [True, False], "not the least recently used went"
    paths["s0.tar"].write_bytes(bodies["s1.tar"])  # a copy that went bad
    assert Cache(tmp_path / "cache", 25_000).path(store, "s0.tar", **infos["s0.tar"]).read_bytes() == bodies["s0.tar"]
    spoil[:] = [DAMAGE["flipped"]]
    assert cache.path(store, "s3.tar", **infos["s3.tar"]).read_bytes() == bodies["s3.tar"]
    store.retry = QUICK
    with pytest.raises(OSError, match="another SHA-256, 5 times"):
        cache.path(store, "s3.tar", sha256="0" * 64)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_cached, tmp_path / "shared", store, "s1.tar", infos["s1.tar"]) for _ in range(8)]
        assert {job.result(timeout=60) for job in jobs} == {bodies["s1.tar"]}
    assert len([p for p in (tmp_path / "shared").iterdir() if not p.name.startswith(".")]) == 1


def test_cache_of_a_large_object(s3_server, spoil, tmp_path, monkeypatch):
    "A shard of many megabytes comes in parts, is verified as a whole, and comes again where a part was damaged."
    s3_server.env(monkeypatch)
    monkeypatch.setattr(archive_module, "_PART", 1 << 20)
    body = np.random.default_rng(0).bytes((9 << 20) + 777)
    store = Store("s3://private", credentials="environment")
    store.retry = QUICK
    store.write("large.tar", body)
    spoil[:] = [DAMAGE["flipped"]] * 20  # all ten parts, and the second readings of a plain connection
    cache = Cache(tmp_path, 10**8)
    path = cache.path(store, "large.tar", len(body), sha256=hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body and not spoil
    store.remove("large.tar")


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
