"""Small miniSEED objects and what rot and bad wishes make of them; run as a program it decodes them.

python tests/mutants.py SEED FIRST LAST PLACE    # the file PLACE tells which one was worked on, if it ends badly
python tests/mutants.py                          # objects that ask for absurd memory or time
"""

import io
import json
import random
import resource
import signal
import struct
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import obspy

LIMIT, MEMORY = 5.0, 1 << 30  # seconds per object; bytes beyond what the imports take


def megabytes() -> float:
    "The most memory since the last call."
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def records(encoding: str, reclen: int = 512, byteorder: str = ">", samples: int = 220, channels: str = "Z") -> bytes:
    "A few records of ObsPy's example."
    stream = obspy.Stream()
    for trace in obspy.read():
        if trace.stats.channel[-1] in channels:
            kind = {"FLOAT32": np.float32, "FLOAT64": np.float64, "INT16": np.int16}.get(encoding, np.int32)
            header = {
                name: trace.stats[name] for name in ("network", "station", "channel", "starttime", "sampling_rate")
            }
            stream += obspy.Trace((trace.data[:samples] * 10).astype(kind), header)
    buffer = io.BytesIO()
    stream.write(buffer, format="MSEED", encoding=encoding, reclen=reclen, byteorder=byteorder)
    return buffer.getvalue()


def version_3() -> bytes:
    "One record of miniSEED 3."
    from pymseed import MS3TraceList

    traces = MS3TraceList()
    samples = (np.random.default_rng(0).normal(size=200) * 1000).astype(np.int32)
    traces.add_data("FDSN:XX_TEST__H_H_Z", samples, "i", 100.0, starttime_str="2019-07-04T00:00:00Z")
    return b"".join(bytes(record) for record in traces.generate(format_version=3))


def originals() -> list[bytes]:
    "Every common encoding, both byte orders, several record lengths, several channels, both versions."
    kinds = [(e, n, b) for e in ("STEIM1", "STEIM2", "INT32", "FLOAT32") for n, b in ((512, ">"), (256, "<"))]
    found = [records(*kind) for kind in kinds]
    found += [records("INT16"), records("FLOAT64", 1024), records("STEIM2", 4096), records("STEIM2", channels="ZNE")]
    return [*found, version_3()]


# Fields of a record's fixed header and first blockette that decide how the rest is read: offset and length.
FIELDS = [(6, 1), (8, 12), (20, 2), (22, 2), (24, 6), (28, 2), (30, 2), (32, 2), (34, 2), (36, 1), (39, 1)]
FIELDS += [(40, 4), (44, 2), (46, 2), (48, 2), (50, 2), (52, 1), (53, 1), (54, 1), (64, 16), (10, 1), (12, 4), (33, 8)]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1]


def mutant(draw: random.Random, seeds: list[bytes]) -> bytes:
    "One object with one to four kinds of damage."
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        if len(data) < 64:
            break
        at = draw.randrange(len(data))
        match draw.randrange(10):
            case 0 | 1:
                for _ in range(draw.choice([1, 1, 2, 8])):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 2 | 3:  # a number where it hurts
                start, size = draw.choice(FIELDS)
                start += draw.randrange(0, len(data), 256) if draw.random() < 0.5 else 0
                value = draw.choice([*NUMBERS, draw.getrandbits(64)]) % 256**size
                data[start : start + size] = value.to_bytes(size, draw.choice(["big", "little"]))
            case 4:
                del data[at:]
            case 5:
                del data[at : at + draw.choice([1, 7, 64, 256])]
            case 6:
                data[at:at] = draw.randbytes(draw.choice([1, 9, 64, 512]))
            case 7:
                data[at:at] = data[: draw.choice([48, 256, 512])]
            case 8:
                data[at : at + 128] = bytes(128)
            case 9:
                other = draw.choice(seeds)
                data = data[: at // 256 * 256] + other[draw.randrange(0, len(other), 256) :]
    return bytes(data)


def numbered(seed: int, number: int, seeds: list[bytes]) -> bytes:
    "The mutant of a number, always the same."
    return mutant(random.Random(f"{seed}/{number}"), seeds)


def record(year: int = 2019, day: int = 1, rate: float = 100.0, samples: int = 100, factor=None, count=None) -> bytes:
    "One record with a header at will: `factor` and multiplier of the rate, and how many samples it claims."
    buffer = io.BytesIO()
    trace = obspy.Trace(
        np.arange(samples, dtype=np.int32), {"station": "BOMB", "channel": "HHZ", "sampling_rate": rate}
    )
    trace.write(buffer, format="MSEED", encoding="INT32", reclen=512)
    data = bytearray(buffer.getvalue())
    data[20:24] = struct.pack(">HH", year, day)
    data[30:32] = data[30:32] if count is None else struct.pack(">H", count)
    data[32:36] = data[32:36] if factor is None else struct.pack(">hh", *factor)
    return bytes(data)


BOMBS = {
    "a record of another century": record() * 3 + record(year=2519),
    "every record in another year": b"".join(record(year=year) for year in range(1950, 2050)),
    "ten thousand days": b"".join(record(2000 + n // 366, n % 366 + 1) for n in range(0, 10_000, 50)),
    "a rate of 1e9 Hz": record(factor=(32767, 32767)),
    "a rate of 1e-9 Hz": record(factor=(-32767, -32767)) * 2,
    "no rate": record(factor=(0, 0)) * 2,
    "an awkward rate": record(factor=(-7919, 32749), samples=100) * 50,
    "two rates": record(factor=(5000, 1)) + record(day=3, factor=(5000, 1)),
    "65,535 samples in 400 bytes": record(count=65535) * 20,
    "a sample a year": record(samples=1, factor=(-32767, -960)) * 3,
    "4 GiB of one byte": bytes([0xFF]) * 65536,
    "year 65,535": record(year=65535, day=65535),
    "miniSEED 3 that claims 4 GiB": b"MS\x03\x04"
    + struct.pack("<IHHBBBBdIIBBHI", 0, 2019, 1, 0, 0, 0, 3, 100.0, 2**32 - 1, 0, 0, 19, 0, 2**32 - 1)
    + b"FDSN:XX_BOMB__H_H_Z",
}


def work(data: bytes, index: bool = True) -> str:
    "What becomes of one object, from bytes to windows: `used`, `no window` or `ValueError`; all else is a defect."
    from gp2vec.data.archive import record_index
    from gp2vec.data.preprocessing import PreprocessingConfig, Window, read_miniseed, segments, windows

    config = PreprocessingConfig(window_length=1.0, min_native_rate=10.0)
    try:
        if index:
            record_index(data)
        stream = read_miniseed(data)
    except ValueError:
        return "ValueError"
    found = [item for segment in segments(stream, config)[0] for item in windows(segment, config)]
    good = [item for item in found if isinstance(item, Window)]
    if not all(np.isfinite(window.waveform).all() and np.isfinite(window.log_scale) for window in good):
        raise AssertionError("a window that is not finite")
    return "used" if good else "no window"


def limited(memory: int) -> None:
    "From here on: so much memory beyond what is in use, and no object longer than its time."
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def judge(data: bytes, index: bool = True) -> tuple[str, float]:
    "The outcome of one object and its time; a hang ends the process with SIGALRM."
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        outcome = work(data, index)
    except Exception as error:
        outcome = f"DEFECT {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, time.monotonic() - began


def main(seed: int, first: int, last: int, place: str) -> None:
    warnings.simplefilter("ignore")
    seeds = originals()
    for data in seeds:
        assert work(data) == "used"  # and everything is imported and compiled
    limited(MEMORY)
    megabytes()
    before = megabytes()
    outcomes: Counter[str] = Counter()
    slowest, defects = 0.0, []
    with open(place, "w") as where:
        for number in range(first, last):
            where.seek(0)
            where.write(f"{number:09d}")
            where.flush()
            outcome, seconds = judge(numbered(seed, number, seeds), index=number % 10 == 0)
            outcomes[outcome.partition(" ")[0]] += 1
            slowest = max(slowest, seconds)
            if outcome.startswith("DEFECT"):
                defects.append((number, outcome))
    grown = megabytes() - before
    print(json.dumps({"outcomes": outcomes, "slowest": slowest, "megabytes": grown, "defects": defects[:20]}))


def bombs() -> None:
    "All of `BOMBS`, each with what it costs, one to a line."
    warnings.simplefilter("ignore")
    assert work(records("STEIM2", channels="ZNE")) == "used"
    limited(200 << 20)
    megabytes()
    for name, data in BOMBS.items():
        before = megabytes()
        outcome, seconds = judge(data)
        grown = megabytes() - before
        print(json.dumps({"name": name, "outcome": outcome, "seconds": seconds, "megabytes": grown}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        bombs()
    else:
        main(*map(int, sys.argv[1:4]), sys.argv[4])
