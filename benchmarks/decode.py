"""Decode a Steim-2 day of 100 Hz, and a real object where GP2VEC_DATA names some: ObsPy and pymseed beside `decode`."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import obspy
from measure import compare, parser
from pymseed import MS3TraceList

from gp2vec.data.preprocessing import decode


def synthetic_day(length: int) -> bytes:  # of a record, bytes
    "A day of one component at 100 Hz: slow swell, noise of some ten counts."
    random, t = np.random.default_rng(0), np.arange(8_640_000) / 100
    data = 5000 * np.sin(2 * np.pi * 0.15 * t) + random.normal(0, 20, t.size)
    trace = obspy.Trace(data.round().astype(np.int32), {"network": "XX", "station": "S", "channel": "HHZ"})
    trace.stats.sampling_rate = 100.0
    buffer = io.BytesIO()
    trace.write(buffer, format="MSEED", encoding="STEIM2", reclen=length)
    return buffer.getvalue()


def real_object() -> bytes | None:
    "The largest object of the buckets."
    folder = os.environ.get("GP2VEC_DATA")
    files = [p for p in Path(folder, "buckets").rglob("*") if p.is_file() and "xml" not in p.name] if folder else []
    return max(files, key=lambda p: p.stat().st_size).read_bytes() if files else None


def record_list(data: bytes) -> list[np.ndarray]:
    "The best that pymseed does on a buffer."
    traces = MS3TraceList.from_buffer(data, record_list=True)
    return [part.create_numpy_array_from_recordlist() for source in traces for part in source]


def unpacked(data: bytes) -> list[np.ndarray]:
    "pymseed, decoding while it reads."
    traces = MS3TraceList.from_buffer(data, unpack_data=True)
    return [part.take_np_datasamples() for source in traces for part in source]


def gate(results: dict) -> str:
    ours, theirs = results["gp2vec"].stream, results["obspy.read(path)"]
    assert not results["gp2vec"].lost
    key = lambda trace: (trace.id, trace.stats.starttime.ns)  # noqa: E731
    for a, b in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
        assert a.id == b.id and np.array_equal(a.data, b.data)
    assert sum(map(len, results["pymseed record list"])) == sum(map(len, ours))
    return f"{sum(map(len, ours))} samples, bit-equal"


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    objects = {f"synthetic day, {n} B records": synthetic_day(n) for n in (512, 4096)}
    real = real_object()
    if real:
        objects["real object"] = real
    for name, data in objects.items():
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            path = file.name
            compare(
                f"decode: {name}, {len(data) / 1e6:.1f} MB",
                {
                    "gp2vec": lambda data=data: decode(data),
                    "obspy.read(path)": lambda path=path: obspy.read(path, format="MSEED"),
                    "pymseed record list": lambda data=data: record_list(data),
                    "pymseed unpack_data": lambda data=data: unpacked(data),
                },
                options.rounds,
                gate,
                options.json,
            )
