"""Shards: the same bytes whoever makes them, nothing damaged is read, one order for any number of ranks and workers."""

import dataclasses
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from obspy import Stream, Trace, UTCDateTime
from torch.utils.data import DataLoader, DistributedSampler

from gp2vec.data.archive import (
    DAY,
    Cache,
    Retry,
    Store,
    as_manifest,
    build_manifest,
    write_archive,
    write_manifest,
)
from gp2vec.data.datapipes import (
    EpochOrder,
    OpenShard,
    SeismicDataPipeline,
    Shard,
    ShardDataset,
    _meta,
    _ShardWriter,
    encode,
    hold_out,
    open_executor,
    read_index,
    sample_key,
    verify_shards,
)
from gp2vec.data.preprocessing import PreprocessingConfig, Segment

CONFIG = PreprocessingConfig(window_length=5.0)


def noise(stations=3, days=2, seconds=300, rate=100) -> Stream:
    "Noise of three components, as counts, that begins with each day."
    random, stream = np.random.default_rng(0), Stream()
    for day in range(days):
        for station in range(stations):
            for channel in ("HHZ", "HHN", "HHE"):
                data = random.normal(0, 1000, seconds * rate).round().astype(np.int32)
                start = UTCDateTime(2020, 1, 1 + day)
                header = {"network": "XX", "station": f"T{station}", "channel": channel, "sampling_rate": rate}
                stream += Trace(data, header | {"starttime": start})
    return stream


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    "An archive, and beside it a manifest and finished shards of six batches."
    folder = tmp_path_factory.mktemp("archive")
    manifest = build_manifest(write_archive(folder / "archive", noise()))
    write_manifest(manifest, folder / "m.parquet")
    pipeline = SeismicDataPipeline(folder / "m.parquet", config=CONFIG)
    pipeline.create_webdataset(1, folder / "shards")
    return folder


def pipeline_of(folder, **changes) -> SeismicDataPipeline:
    return SeismicDataPipeline(folder / "m.parquet", config=dataclasses.replace(CONFIG, **changes))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def keys(batch) -> list[tuple[str, int]]:
    return list(zip(batch["id"], batch["starttime"].tolist(), strict=True))


# Building


@pytest.mark.parametrize("kind", ["threads", "spawn", "processes"])
def test_the_same_bytes_from_any_executor(archive, tmp_path, kind):
    pipeline, wanted = pipeline_of(archive), contents(archive / "shards")
    if kind == "processes":
        pipeline.create_webdataset(1, tmp_path / "out", workers=2)
    else:
        pools = {
            "threads": lambda: ThreadPoolExecutor(3),
            "spawn": lambda: ProcessPoolExecutor(2, get_context("spawn")),
        }
        with pools[kind]() as pool:
            pipeline.create_webdataset(1, tmp_path / "out", executor=pool)
    assert contents(tmp_path / "out") == wanted
    assert pipeline.report["windows"] == 360 and len(wanted) == 2 + 6 * 2


def test_dask_cluster(archive, tmp_path):
    "Two workers of dask.distributed, named as on the command line."
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed: pip install gp2vec[dask]"
    )
    with distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None, processes=True) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        pipeline_of(archive).create_webdataset(1, tmp_path / "api", executor=f"dask://{address}")
        command = ["shards", archive / "m.parquet", "--output", tmp_path / "cli", "--held-out", 0, "--window-length", 5]
        command += ["--shard-size", 1, "--executor", f"dask://{address}"]
        subprocess.run([sys.executable, "-m", "gp2vec.cli", *map(str, command)], check=True, timeout=120)
    assert contents(tmp_path / "api") == contents(tmp_path / "cli") == contents(archive / "shards")


def test_refused_executors():
    with pytest.raises(ValueError, match="processes or dask://host:port, got 'threads'"), open_executor("threads"):
        pass


def test_array_jobs_in_one_folder(archive, tmp_path):
    for i in range(4):
        with pytest.raises(FileNotFoundError, match="expected finished shards"):
            ShardDataset(tmp_path / "out")
        part = pipeline_of(archive).create_webdataset(1, tmp_path / "out", part=(i, 4))
        assert len(part) == (120 if i < 2 else 60)
    made, wanted = contents(tmp_path / "out"), contents(archive / "shards")
    assert {k: v for k, v in made.items() if "quarantine" not in k} == {
        k: v for k, v in wanted.items() if "quarantine" not in k
    }


def _build(folder, out, ready):
    ready.set()
    pipeline_of(folder).create_webdataset(1, out)


def test_killed_and_run_again(archive, tmp_path):
    "kill -9 at twelve moments; the same call goes on, and what is finished is not touched."
    random, out, finished = np.random.default_rng(1), tmp_path / "out", {}
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    for i in range(12):
        ready = context.Event()
        run = context.Process(target=_build, args=(archive, out, ready))
        run.start()
        ready.wait()
        while run.is_alive() and len(list(out.glob("index-*.json"))) < i // 2:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        run.kill()
        run.join()
        now = {path: path.stat().st_mtime_ns for path in out.glob("index-*.json")}
        assert all(now[path] == at for path, at in finished.items())
        finished = now
    # What a kill in the middle of a file leaves behind.
    for name in ("shard-20200102-0002-000.tar", "index-20200102-0002.json", "plan.json", "quarantine.parquet"):
        (out / f".{name}.half").write_bytes(b"half")
    (out / "index-20200102-0002.json").unlink(missing_ok=True)
    pipeline_of(archive).create_webdataset(1, out)
    assert contents(out) == contents(archive / "shards") and finished
    finished.pop(out / "index-20200102-0002.json", None)
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())


def test_killed_worker_is_one_sentence(archive, tmp_path):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        with pytest.raises(OSError, match="run the same command again"):
            pipeline_of(archive).create_webdataset(1, tmp_path / "out", executor=pool)
    pipeline_of(archive).create_webdataset(1, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(archive / "shards")


def test_an_outage_is_tried_again(archive, tmp_path, monkeypatch):
    "Objects that could not be reached are in quarantine until the next run; what was read is left alone."
    read = Store.read

    def fails(store, key, *promised, **named):
        if "T1" in key:
            raise ConnectionError("no route")
        return read(store, key, *promised, **named)

    pipeline = pipeline_of(archive)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", fails)
        pipeline.create_webdataset(1, tmp_path / "out")
    assert pipeline.report["objects"] == {"listed": 18, "used": 12, "skipped": 0, "quarantined": 6}
    assert pipeline.quarantine["reason"].str.contains("no route").all()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    pipeline.create_webdataset(1, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(archive / "shards")
    kept = [name for name, at in before.items() if (tmp_path / "out" / name).stat().st_mtime_ns == at]
    assert len([name for name in kept if name.startswith("index")]) == 4


def test_a_lost_shard_is_made_again(archive, tmp_path):
    pipeline = pipeline_of(archive)
    dataset = pipeline.create_webdataset(1, tmp_path / "out")
    (tmp_path / "out" / dataset.index.shards[2].name).unlink()
    with pytest.raises(FileNotFoundError, match="run create_webdataset again"):
        list(ShardDataset(tmp_path / "out"))
    pipeline.create_webdataset(1, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(archive / "shards")


def test_no_overlapping_copies(archive, tmp_path):
    "Windows that overlap take no more space, and shards of one length give windows of any."
    twice = pipeline_of(archive, overlap=0.5).create_webdataset(1, tmp_path / "out")
    once = ShardDataset(archive / "shards", shuffle=False, overlap=0.5)
    assert twice.index.bytes == once.index.bytes and len(once) == len(twice) == 6 * 119
    assert len(ShardDataset(archive / "shards", window_length=20.0)) == 6 * 15
    with pytest.raises(ValueError, match="window_length"):
        ShardDataset(archive / "shards", window_length=0.0)


def test_a_thousand_dotted_ids(tmp_path):
    "1,000 in, 1,000 out, for webdataset too."
    os.environ.setdefault("WDS_SECURE", "1")
    import webdataset

    writer = _ShardWriter(Store(tmp_path), "20200101-0000", 10**6)
    for i in range(1000):
        codes = ("CI", f"P{i // 10}", "" if i % 10 == 0 else f"0{i % 10}", "HH")
        data = np.full((3, 8), i, np.float32)
        segment = Segment(*codes, 0, 100.0, data, np.ones(3, bool), ("HHZ", "HHN", "HHE"), native_rate=100.0)
        stored, scale = encode(segment.data)
        assert "." in segment.id and "." not in sample_key(segment)
        writer.add(segment, stored, _meta(segment, scale, {"latitude": 1.0}), 1)
    writer.finish()
    opened = OpenShard(tmp_path / writer.shards[0].name, writer.shards[0])
    peer = list(webdataset.WebDataset(str(tmp_path / writer.shards[0].name), shardshuffle=False))
    assert len(set(opened.keys)) == len(peer) == len({meta["id"] for meta in opened.meta}) == 1000
    assert [json.loads(p["meta.json"])["id"] for p in peer] == [meta["id"] for meta in opened.meta]


@given(st.floats(1e-20, 1e20), st.integers(0, 2**32 - 1))
def test_what_float16_loses(peak, seed):
    data = (np.random.default_rng(seed).normal(size=(3, 50)) * 10.0 ** np.arange(-4, 1).repeat(10) * peak).astype(
        np.float32
    )
    stored, scale = encode(data)
    error, size = np.abs(stored.astype(float) * scale - data), np.abs(data.astype(float))
    assert (error <= size * 2.0**-11 + size.max() * 2.0**-39).all()
    assert stored.dtype == np.float16 and np.isfinite(stored).all() and np.log2(scale).is_integer()


# Reading


@pytest.fixture()
def shard(archive, tmp_path):
    "A small shard: its path, its entry in the index and its bytes."
    index = read_index(archive / "shards")
    path = tmp_path / index.shards[0].name
    path.write_bytes((archive / "shards" / path.name).read_bytes())
    return path, index.shards[0], path.read_bytes()


def test_every_cut_and_500_flips(shard):
    path, entry, good = shard
    random = np.random.default_rng(0)
    OpenShard(path, entry)
    for at in range(0, len(good), 512):
        path.write_bytes(good[:at])
        with pytest.raises(ValueError, match="SHA-256"):
            OpenShard(path, entry)
    for _ in range(500):
        bad = bytearray(good)
        bad[random.integers(len(good))] ^= 1 << int(random.integers(8))
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="SHA-256"):
            OpenShard(path, entry)


class Bomb:
    "Runs code when it is unpickled."

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def tar(*members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def npy(array, **options) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3, %d), }"
META = {"id": "XX.A..HH", "starttime": 0, "scale": 1.0, "sampling_rate": 100.0, "units": "m/s", "metadata": {}}
GOOD = npy(np.zeros((3, 9), np.float32))
HOSTILE = {
    "pickled array": [("waveform.npy", lambda s: npy(np.array([Bomb(s)], object), allow_pickle=True))],
    "pickle": [("waveform.npy", lambda s: pickle.dumps(Bomb(s)))],
    "pickle as json": [("meta.json", lambda s: pickle.dumps(Bomb(s)))],
    "pickle member": [("waveform.pkl", lambda s: pickle.dumps(Bomb(s)))],
    "pytorch member": [("waveform.pth", lambda s: pickle.dumps(Bomb(s)))],
    "8 TiB": [("waveform.npy", lambda s: (HEADER % (2**41 // 3)).ljust(127) + b"\n")],
    "negative": [("waveform.npy", lambda s: (HEADER % -9).ljust(127) + b"\n" + b"\0" * 108)],
    "integers": [("waveform.npy", lambda s: npy(np.zeros((3, 9), np.int32)))],
    "one row": [("waveform.npy", lambda s: npy(np.zeros(9, np.float32)))],
    "not json": [("meta.json", lambda s: b"{")],
    "deep json": [("meta.json", lambda s: b"[" * 200_000)],
    "json list": [("meta.json", lambda s: b"[1]")],
    "NaN": [("meta.json", lambda s: json.dumps(META | {"scale": float("nan")}).encode())],
    "no scale": [("meta.json", lambda s: json.dumps(META | {"scale": 0}).encode())],
    "infinite rate": [("meta.json", lambda s: json.dumps(META | {"sampling_rate": "x"}).encode())],
    "17 MB of json": [("meta.json", lambda s: json.dumps(META | {"x": "y" * (17 << 20)}).encode())],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members(tmp_path, case):
    "One sentence, nothing run, no memory asked for."
    members = {"waveform.npy": lambda s: GOOD, "meta.json": lambda s: json.dumps(META).encode()}
    for name, make in HOSTILE[case]:
        replaced = {"waveform.pkl": "waveform.npy", "waveform.pth": "waveform.npy"}.get(name, name)
        members = {name if old == replaced else old: make if old == replaced else f for old, f in members.items()}
    sentinel, path = tmp_path / "executed", tmp_path / "bad.tar"
    path.write_bytes(tar(*((f"aaaa.{name}", make(sentinel)) for name, make in members.items())))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=r"^expected [^\n]+$"):
        OpenShard(path, Shard("bad.tar", "", path.stat().st_size, 1), verify=False)
    assert time.monotonic() - start < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    assert not sentinel.exists()


ADDRESSES = """pipe:ls|pipe:cat /etc/passwd|http://h/x|https://h/x|ftp://h/x|gs://b/x|az://b/x|hf://x/y|file://host/x|s3:x|
S3://b/x|s3://b/{a,b}|shards-{0..9}.tar|a::s3://b|$(id)|`id`|x>y|a|b|data:text/plain,x|rclone:x"""


@pytest.mark.parametrize("url", [u.strip() for u in ADDRESSES.split("|") if len(u.strip()) > 1] + ["", "a|b", "a\nb"])
def test_refused_addresses(url, monkeypatch):
    monkeypatch.setattr("gp2vec.data.datapipes.Store", pytest.fail)
    with pytest.raises(ValueError, match="name one place"):
        ShardDataset(url)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r | {"version": 1},
        lambda r: r | {"shards": [r["shards"][0] | {"name": "../../etc/passwd"}]},
        lambda r: r | {"shards": [r["shards"][0] | {"count": 7}]},
        lambda r: r | {"segments": r["segments"] | {"samples": []}},
        lambda r: {k: v for k, v in r.items() if k != "segments"},
        lambda r: [r],
    ],
)
def test_hostile_index(archive, tmp_path, change):
    for path in (archive / "shards").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "index-20200101-0000.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match="write the shards anew"):
        ShardDataset(tmp_path)


# Order


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.integers(0, 50),
    st.booleans(),
)
def test_each_window_once(counts, mix, seed, epoch, shuffle):
    order = EpochOrder(counts, shuffle, seed, epoch, mix)
    found = list(zip(*(a.tolist() for a in order[np.arange(len(order))]), strict=True))
    assert sorted(found) == [(s, w) for s, n in enumerate(counts) for w in range(n)]
    some = np.random.default_rng(0).permutation(len(order))[:20]  # in any order, in parts
    again = EpochOrder(counts, shuffle, seed, epoch, mix)
    assert list(zip(*(a.tolist() for a in again[some]), strict=True)) == [found[i] for i in some]
    assert shuffle or found == sorted(found)


def test_the_order_of_a_seed_is_for_ever():
    "Numbers that no version of NumPy, of PyTorch or of this package may change: checkpoints refer to them."
    order = EpochOrder([5, 4, 3], seed=7, epoch=2, mix=6)
    assert [a.tolist() for a in order[np.arange(12)]] == FROZEN


FROZEN = [[2, 1, 2, 1, 1, 1, 2, 0, 0, 0, 0, 0], [2, 1, 1, 2, 3, 0, 0, 4, 3, 0, 1, 2]]


def test_a_long_day_is_not_learned_in_one_go():
    "A shard of 1500 windows among sixty small ones: any hundred windows in a row have their share of it, no more."
    order = EpochOrder([1500, *[75] * 60])
    share = (order[np.arange(len(order))][0] == 0).reshape(-1, 100).mean(1)
    assert 0.05 < share.min() and share.max() < 0.5, share
    assert max(map(len, EpochOrder([1] * 1000).groups)) == 64


def run(dataset, world, batch_size, workers, drop_last=True):
    "The windows of every step on all ranks."
    loaders = [
        DataLoader(
            dataset, batch_size, sampler=DistributedSampler(dataset, world, rank, shuffle=False), num_workers=workers,
            drop_last=drop_last,
        )
        for rank in range(world)
    ]  # fmt: skip
    return [sorted(key for batch in step for key in keys(batch)) for step in zip(*loaders, strict=True)]


WORLDS = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2)]


@pytest.mark.parametrize("world,workers", WORLDS)
def test_the_same_steps_for_any_world(archive, world, workers):
    "360 windows in steps of 24, and the same after a restart on another number of ranks."
    dataset = ShardDataset(archive / "shards", seed=3, mix=100)
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        reference = [sorted(keys(batch)) for batch in DataLoader(dataset, 24)]
        steps = run(dataset, world, 24 // world, workers)
        assert steps == reference and len(set(sum(steps, []))) == 360
    state = dataset.state_dict(used=7 * 24)
    resumed = ShardDataset(archive / "shards", seed=3, mix=100)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    other = {1: 4, 2: 1, 4: 2}[world]
    assert run(resumed, other, 24 // other, workers) == reference[7:] and len(resumed) == 360 - 7 * 24
    assert resumed.state_dict(len(resumed)) == state | {"epoch": 6, "position": 0}


def test_the_remainder(archive):
    "Where ranks do not divide the windows, R - 1 at most come twice in an epoch, and none is left out."
    dataset = ShardDataset(archive / "shards", window_length=7.0)  # 42 windows of each of six segments
    for world in (2, 4, 5):
        seen = sum(run(dataset, world, 5, 0, drop_last=False), [])
        assert len(set(seen)) == 252 and len(seen) - 252 <= world - 1


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_lasting_workers_follow_the_epoch(archive, context):
    if context == "fork" and sys.platform != "linux":
        pytest.skip("fork is safe to test on Linux only")
    dataset = ShardDataset(archive / "shards")
    dataset[0]  # opens shards here; what a thread of this process is to bring never comes to the workers
    dataset._in_use, dataset._coming = {}, {shard: Future() for shard in range(6)}
    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context, "timeout": 60}
    loader = DataLoader(dataset, 36, **options)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([key for batch in loader for key in keys(batch)])
    dataset.load_state_dict(dataset.state_dict(used=72))
    assert epochs[0] == epochs[2] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert [key for batch in loader for key in keys(batch)] == epochs[0][72:]


def test_a_state_of_other_windows_is_refused(archive):
    dataset = ShardDataset(archive / "shards")
    for other in (ShardDataset(archive / "shards", seed=1), ShardDataset(archive / "shards", overlap=0.5)):
        with pytest.raises(ValueError, match="open the shards as they were"):
            dataset.load_state_dict(other.state_dict(used=10))
    with pytest.raises(IndexError, match="from 0 to 359, got 360"):
        dataset[360]


# S3


def test_shards_on_s3(s3_server, archive, tmp_path, monkeypatch):
    "Written to, verified on and streamed from a real server, with the bytes that a folder would hold."
    s3_server.env(monkeypatch)
    url, fs = "s3://private/built", s3_server.fs()
    pipeline = pipeline_of(archive)
    pipeline.create_webdataset(1, url)
    assert {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(url)} == contents(archive / "shards")
    cache = Cache(tmp_path / "cache", 10**9)
    streamed, local = ShardDataset(url, cache=cache), ShardDataset(archive / "shards")
    for workers in (0, 2):
        for batch, twin in zip(DataLoader(streamed, 40, num_workers=workers), DataLoader(local, 40), strict=True):
            assert keys(batch) == keys(twin) and torch.equal(batch["waveform"], twin["waveform"])
    before = {path: fs.info(path)["LastModified"] for path in fs.find(url)}
    pipeline.create_webdataset(1, url, workers=2)
    assert {path: fs.info(path)["LastModified"] for path in fs.find(url)} == before
    # A shard that rots on the server is found, on every way to it.
    name = local.index.shards[0].name
    bad = bytearray(fs.cat_file(f"{url}/{name}"))
    bad[9000] ^= 1
    fs.pipe_file(f"{url}/{name}", bytes(bad))
    monkeypatch.setattr(Retry, "pause", lambda self, tries: 0.01)
    fresh = ShardDataset(url, cache=Cache(tmp_path / "other", 10**9))
    with pytest.raises(OSError, match=name):
        list(fresh)


# Memory

MEASURE = """
import re, sys
from pathlib import Path
from gp2vec.data.archive import build_manifest
from gp2vec.data.datapipes import SeismicDataPipeline
SeismicDataPipeline(build_manifest(sys.argv[1])).create_webdataset(10**6, sys.argv[2], progress=False)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory without that of the parent is Linux's to tell")
def test_memory_does_not_grow_with_stations(tmp_path):
    "A quarter of a day of 8 stations in one batch takes no more than that of 2 stations."
    peaks = {}
    for stations in (2, 8):
        write_archive(tmp_path / str(stations), noise(stations, 1, 21600))
        command = [sys.executable, "-c", MEASURE, str(tmp_path / str(stations)), str(tmp_path / f"out{stations}")]
        peaks[stations] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert verify_shards(tmp_path / f"out{stations}").count == stations * 720
    assert peaks[8] < peaks[2] + 60, peaks


def test_held_out_are_other_stations_on_later_days():
    "What is learned from shares neither station nor day with what is validated on, where there are days enough."
    rng = np.random.default_rng(0)
    for _ in range(60):
        days, stations = rng.integers(1, 30), rng.integers(2, 12)
        rows = [(day, station) for day in range(days) for station in range(stations) if rng.random() < 0.7]
        rows += [(0, 0), (0, 1)]
        early = rng.integers(0, 2, stations) * 20 * 10**6  # ns; files as their headers have it
        known = {"layout": "scedc", "network": "XX", "location": "", "channel": "HHZ", "sampling_rate": 100.0}
        known |= {"etag": None, "version": None}
        table = as_manifest(
            known
            | {"url": f"/{day}/{station}", "key": f"{day}/{station}", "station": f"S{station}"}
            | {"starttime": day * DAY - early[station], "endtime": (day + 1) * DAY - early[station]}
            | {"byte_size": int(rng.integers(500, 1000)) if station else 1}
            for day, station in rows
        )
        learn, check = hold_out(table, 0.3, 1, days=0.1)
        assert len(learn) and len(check) and not set(learn.station) & set(check.station)
        if len(learn) + len(check) == len(table):
            assert days < 8, "with as many days as these one is near a tenth"
        else:
            assert learn.endtime.max() <= check.starttime.min() + 20 * 10**6
            late = table.byte_size[table.starttime >= check.starttime.min()].sum()
            assert late < 0.2 * table.byte_size.sum(), "as near to a tenth as days allow"
        learn, check = hold_out(table, 0.3, 1)
        assert len(learn) + len(check) == len(table), "without days nothing is left out"
        drawn = np.random.default_rng(1).permutation(np.array(sorted(set("XX." + table.station)), dtype=object))
        assert set("XX." + check.station) == set(drawn[: check.station.nunique()]), "whatever they have recorded"
    with pytest.raises(ValueError, match="share of the data"):
        hold_out(table, days=1.0)
