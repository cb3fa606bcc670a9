"""Odd, broken and modern miniSEED of many origins, and objects that ask for absurd memory."""

import csv
import os
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import obspy
import pytest

from gp2vec.data.preprocessing import REASONS, decode, read_miniseed

DATA = Path(os.environ.get("GP2VEC_DATA") or "no data")


def expectations():
    "Name of each file, and the samples and ids of the better of two other readers; None where both refuse it."
    table = DATA / "odd_mseed" / "EXPECT.csv"
    if not table.exists():
        return [pytest.param("", None, id="absent")]
    out = []
    for row in csv.DictReader(table.open()):
        said = [re.match(r"ok \d+ (\d+)(.*)", row[name]) for name in ("obspy_1.5.1", "pymseed")]
        found = [(int(m[1]), m[2]) for m in said if m]
        out.append(pytest.param(row["file"], max(found, default=None), id=row["file"]))
    return out


@pytest.mark.parametrize(("name", "expected"), expectations())
def test_agrees_with_other_readers(name, expected):
    if not name:
        pytest.skip("no odd miniSEED: GP2VEC_DATA names a folder with odd_mseed/EXPECT.csv")
    decoded = decode((DATA / "odd_mseed" / name).read_bytes())
    count = sum(len(t) for t in decoded.stream)
    assert all(lost.reason in REASONS and lost.length > 0 for lost in decoded.lost)
    if expected is None:  # refused by both: nothing of it, or something and the rest told
        assert decoded.lost or not count
        return
    samples, ids = expected
    if any(lost.reason in ("time", "integrity") for lost in decoded.lost):  # others take these records
        assert 0 < count < samples
        return
    assert count == samples
    if "gecko" in name:  # its location code is no ASCII
        return
    for trace in re.findall(r"'([^']*)'", ids if samples else ""):
        assert decoded.stream.select(id=trace), trace
    if not samples:
        with pytest.raises(ValueError, match="samples"):
            read_miniseed((DATA / "odd_mseed" / name).read_bytes())


@pytest.mark.parametrize("encoding", ["STEIM1", "STEIM2", "INT32", "FLOAT32", "FLOAT64"])
@pytest.mark.parametrize("length", [512, 4096])
def test_bit_equal_to_obspy(encoding, length, tmp_path):
    data = np.cumsum(np.random.default_rng(0).integers(-300, 300, 20000)).astype(np.int32)
    kind = {"FLOAT32": np.float32, "FLOAT64": np.float64}.get(encoding, np.int32)
    trace = obspy.Trace(data.astype(kind), {"station": "S", "channel": "HHZ", "sampling_rate": 99.98})
    trace.write(str(tmp_path / "x"), format="MSEED", encoding=encoding, reclen=length)
    (theirs,), (ours,) = obspy.read(str(tmp_path / "x"), format="MSEED"), read_miniseed((tmp_path / "x").read_bytes())
    assert ours.data.dtype == theirs.data.dtype and np.array_equal(ours.data, theirs.data)
    assert ours.id == theirs.id and ours.stats.starttime == theirs.stats.starttime
    assert np.isclose(ours.stats.sampling_rate, theirs.stats.sampling_rate, rtol=1e-6)


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def bomb():
    "A whole record of miniSEED 3 with a true checksum that claims four billion samples."
    source = b"FDSN:XX_S_00_H_H_Z"
    head = b"MS\x03\x00" + struct.pack("<IHHBBBBdI", 0, 2020, 1, 0, 0, 0, 11, 100.0, 2**32 - 1)
    tail = b"\x01" + struct.pack("<BHI", len(source), 0, 64) + source + bytes(64)
    return head + struct.pack("<I", crc32c(head + bytes(4) + tail)) + tail


def year_bomb():
    "Two records of one channel, three centuries apart."
    stream = obspy.Stream()
    for year in (1970, 2250):
        header = {"station": "S", "channel": "HHZ", "sampling_rate": 100.0, "starttime": obspy.UTCDateTime(year, 1, 1)}
        stream += obspy.Trace(np.arange(400, dtype=np.int32), header)
    import io

    buffer = io.BytesIO()
    stream.write(buffer, format="MSEED", reclen=512)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [bomb, year_bomb])
def test_bombs_are_refused_fast_and_small(make, tmp_path):
    (tmp_path / "bomb").write_bytes(make())
    code = """
        import resource, sys, time
        from gp2vec.data.preprocessing import PreprocessingConfig, decode, segments
        decode(b"warm")
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        decoded = decode(open(sys.argv[1], "rb").read())
        parts, _ = segments(decoded.stream)
        spent, grown = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert decoded.lost and sum(p.data.shape[1] for p in parts) <= 400, decoded
        assert spent < 1 and grown < 200 * 1024, (spent, grown)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "bomb")], check=True, timeout=120)
