"""Shards that rot, are cut, or are made by an enemy: nothing of them is used, and nothing in them is executed."""

import gzip
import hashlib
import io
import json
import pickle
import random
import resource
import shutil
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import obspy
import pytest
from torch.utils.data import DataLoader

from gp2vec.data.archive import Retry, build_manifest, write_archive
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset, verify_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Three small shards in a folder, and the index files that name them."
    stream, draw, folder = obspy.Stream(), np.random.default_rng(0), tmp_path_factory.mktemp("rot")
    for number in range(3):
        for channel in ("HHZ", "HHN", "HHE"):
            header = {"network": "XX", "station": f"S{number}", "channel": channel, "sampling_rate": 100.0}
            header["starttime"] = obspy.UTCDateTime(2019, 7, 4 + number, 1)
            stream += obspy.Trace((draw.normal(size=6_000) * 1e4).astype(np.int32), header)
    manifest = build_manifest(write_archive(folder / "archive", stream))
    SeismicDataPipeline(manifest, window_length=10.0).create_webdataset(url=folder / "shards", progress=False)
    return folder / "shards"


@pytest.fixture
def shards(made, tmp_path):
    "A copy to spoil; its first shard."
    shutil.copytree(made, tmp_path / "shards")
    return sorted((tmp_path / "shards").glob("shard-*.tar"))[0]


def told(folder: Path) -> dict:
    "Everything that the shards hold, by id and time."
    return {
        (s["id"], int(s["starttime"])): s["waveform"].numpy().tobytes() for s in ShardDataset(folder, shuffle=False)
    }


def test_counts(made):
    dataset = verify_shards(made)
    assert len(dataset.shards) == 3 and len(told(made)) == len(ShardDataset(made)) == 18


def test_every_cut_is_found(shards):
    "Cut at every 512 bytes, also where a tar reader sees an intact, shorter tar; and made longer."
    whole = shards.read_bytes()
    cuts = list(range(0, len(whole), 512))
    for cut in cuts:
        shards.write_bytes(whole[:cut])
        with pytest.raises((ValueError, OSError)):
            verify_shards(shards.parent)
    shards.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError):
        verify_shards(shards.parent)
    shards.write_bytes(whole[: cuts[len(cuts) // 2]])
    with pytest.raises((ValueError, OSError), match=shards.name):
        told(shards.parent)  # and where nobody verified before
    assert len(cuts) > 60
    shards.unlink()
    with pytest.raises((ValueError, OSError), match=shards.name):
        told(shards.parent)


def test_every_flipped_bit_is_found(shards):
    "Five hundred of them, in headers, samples, JSON and padding alike."
    whole, draw, found = shards.read_bytes(), random.Random(0), 0
    for turn in range(500):
        at = draw.randrange(8 * len(whole))
        shards.write_bytes(whole[: at // 8] + bytes([whole[at // 8] ^ 1 << at % 8]) + whole[at // 8 + 1 :])
        try:
            verify_shards(shards.parent) if turn % 10 else told(shards.parent)
        except ValueError as error:
            found += shards.name in str(error)
    assert found == 500
    shards.write_bytes(whole)
    assert len(told(shards.parent)) == 18


def test_rotten_indices(shards):
    "An index or plan that is cut or altered is a clear error, never fewer windows."
    truth, folder = told(shards.parent), shards.parent
    indices, draw, refused, wrong = sorted(folder.glob("*.json")), random.Random(1), 0, []
    assert len(indices) == 4
    for turn in range(240):
        path = draw.choice(indices)
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        cut = whole[:at] if turn % 2 else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(7)]) + whole[at + 1 :]
        path.write_bytes(cut)
        try:
            found = told(folder)
        except (ValueError, OSError):
            refused += 1
        except Exception as error:
            wrong.append(f"{type(error).__name__} {error}: {path.name} byte {at}")
        else:  # a bit of a report, of white space, or of a number that no sample depends on
            wrong += [f"{path.name} byte {at}: {whole[max(0, at - 40) : at + 9]!r}"] if found != truth else []
        path.write_bytes(whole)
    assert told(folder) == truth
    assert refused > 60 and not wrong, "\n".join(wrong)


class Bomb:
    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        import os

        return os.makedirs, (self.place, 0o777, True)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def tar(*members: tuple[str, bytes], **header) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in header.items():
                setattr(info, field, value)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def claiming(data: bytes, size: bytes) -> bytes:
    "A tar whose first member claims another size."
    head = bytearray(data)
    head[124 : 124 + len(size)] = size
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head[:512])
    return bytes(head)


def hostile(good: bytes, place: Path) -> dict[str, bytes]:
    "What an enemy would put under the name of a shard."
    with tarfile.open(fileobj=io.BytesIO(good)) as file:
        (first, array), (second, meta) = ((m.name, file.extractfile(m).read()) for m in file.getmembers()[:2])
    bomb = Bomb(place)
    header = npy(np.zeros((3, 8), "<f4")).replace(b"(3, 8)", b"(3, 1099511627776)", 1)
    deep = b"[" * 200_000
    return {
        "8 TiB claimed": claiming(good, b"%012o" % 0o77777777777 + b"0"[:0]),
        "8 TiB in binary": claiming(good, b"\x80" + (8 << 40).to_bytes(11, "big")),
        "a negative size": claiming(good, b"-0000000001\0"),
        "a size that is no number": claiming(good, b"0x1000\0\0\0\0\0\0"),
        "a gz bomb": gzip.compress(bytes(200 << 20), 9),
        "a packed tar": gzip.compress(good),
        "pickle instead of a tar": pickle.dumps(bomb),
        "pickle members": tar((first.replace("npy", "pkl"), pickle.dumps(bomb)), (second, meta)),
        "pickle under npy": tar((first, pickle.dumps(bomb)), (second, meta)),
        "npy of objects": tar((first, npy(np.array([[bomb]] * 3, dtype=object), True)), (second, meta)),
        "npy that claims terabytes": tar((first, header), (second, meta)),
        "npy of text": tar((first, npy(np.full((3, 9), "x"))), (second, meta)),
        "npy of NaN": tar((first, npy(np.full((3, 9), np.nan, "<f4"))), (second, meta.replace(b'"scale"', b'"s"'))),
        "pickle under json": tar((first, array), (second, pickle.dumps(bomb))),
        "deep json": tar((first, array), (second, deep)),
        "json of gigabytes": tar((first, array), (second, b'{"id": "' + b"x" * (8 << 20) + b'"}')),
        "json with NaN": tar((first, array), (second, b'{"scale": NaN, "metadata": {}}')),
        "a path out": tar((f"../../{first}", array), (f"../../{second}", meta)),
        "a link": tar((first, b""), (second, meta), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "a pair without its array": tar((second, meta)),
        "an empty file": b"",
        "zeros": bytes(10240),
    }


def test_hostile_shards(shards, tmp_path):
    "Even where the index has been made to fit: refused in a second, with little memory, and nothing is executed."
    place, good = tmp_path / "harm", shards.read_bytes()
    (index,) = (p for p in shards.parent.glob("index-*.json") if shards.name in p.read_text())
    record = json.loads(index.read_text())
    for name, data in hostile(good, place).items():
        shards.write_bytes(data)
        (entry,) = (entry for entry in record["shards"] if entry["name"] == shards.name)
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        index.write_text(json.dumps(record))
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=shards.name):
            verify_shards(shards.parent)
        with pytest.raises(ValueError, match=shards.name):
            told(shards.parent)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert time.monotonic() - began < 2 and grown < 256, (name, grown)
        assert not place.exists(), name


def test_reading_through_faults(made, s3_server, fault_proxy, tmp_path, monkeypatch):
    "Shards on S3 through bad answers and an outage: every window once, the same bytes; what stays wrong is an error."
    s3_server.env(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    fs, truth = s3_server.fs(), told(made)
    for path in made.iterdir():
        if path.is_file():
            fs.pipe_file(f"private/rot/{path.name}", path.read_bytes())

    def read() -> dict:
        dataset = ShardDataset("s3://private/rot", endpoint_url=fault_proxy.endpoint_url, mix=1)
        dataset.store.retry = Retry(budget=20.0, first=0.01, longest=0.1, timeout=0.5)
        shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
        samples = [sample for batch in DataLoader(dataset, batch_size=None) for sample in [batch]]
        assert len(samples) == len(truth)
        return {(s["id"], int(s["starttime"])): s["waveform"].numpy().tobytes() for s in samples}

    assert read() == truth
    for mode in ("bitflip", "short", "fin", "reset", "reset_mid", "500", "503", "expired400"):
        before = fault_proxy.faults[mode]
        fault_proxy.inject(mode, 1 if mode.startswith("expired") else 2, "/private/rot/shard-")
        assert read() == truth, mode
        assert fault_proxy.faults[mode] > before
    fault_proxy.inject("reset", -1, "/private/rot/shard-")
    timer = threading.Timer(1.5, fault_proxy.clear)
    timer.start()
    assert read() == truth
    fault_proxy.inject("bitflip", -1, "/private/rot/shard-")
    with pytest.raises(OSError, match="shard-"):
        read()
