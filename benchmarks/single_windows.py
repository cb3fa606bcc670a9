"""Prepare windows of 30 s one by one: detrend, taper, band-pass, normalise; ObsPy and gp2vec."""

import numpy as np
import obspy
from measure import compare, parser

from gp2vec.data.preprocessing import PreprocessingConfig, Segment, normalise_windows, prepare

RATE, LENGTH, COUNT = 100.0, 3000, 50
CONFIG = PreprocessingConfig(detrend="linear", taper=1.5, highpass=1.0, lowpass=45.0)
START, ALIVE = np.zeros(1, np.int64), np.ones((1, 3), bool)


def waveforms() -> np.ndarray:
    "Swell and noise, (windows, 3, samples) int32."
    random, t = np.random.default_rng(0), np.arange(LENGTH) / RATE
    phase = random.uniform(0, 6, (COUNT, 3, 1))
    x = 5000 * np.sin(2 * np.pi * 0.15 * t + phase) + random.normal(0, 50, (COUNT, 3, LENGTH)) + 1000
    return x.round().astype(np.int32)


def ours(parts: list[Segment]) -> np.ndarray:
    ready = (prepare(part, CONFIG) for part in parts)
    return np.concatenate([normalise_windows(part.data, START, LENGTH, ALIVE)[0] for part in ready])


def theirs(streams: list[obspy.Stream]) -> np.ndarray:
    out = np.empty((COUNT, 3, LENGTH), np.float32)
    for i, stream in enumerate(streams):
        work = stream.copy()
        work.detrend("linear")
        work.taper(None, "hann", CONFIG.taper)
        work.filter("highpass", freq=CONFIG.highpass, corners=4)
        work.filter("lowpass", freq=CONFIG.lowpass, corners=4)
        x = np.stack([trace.data for trace in work])
        x -= x.mean(axis=1, keepdims=True)
        out[i] = x / np.sqrt((x**2).mean())
    return out


def gate(results: dict) -> str:
    a, b = results["gp2vec"], results["ObsPy"]
    error = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
    assert error < 2e-3, error
    return f"{COUNT} windows, rel. rms {error:.1e} from ObsPy"


if __name__ == "__main__":
    options, data = parser(__doc__).parse_args(), waveforms()
    names = ("HHZ", "HHN", "HHE")
    parts = [Segment("XX", "S", "", "HH", 0, RATE, x, np.ones(3, bool), names, native_rate=RATE) for x in data]
    header = {"network": "XX", "station": "S", "sampling_rate": RATE}
    streams = [
        obspy.Stream([obspy.Trace(row, header | {"channel": c}) for row, c in zip(x, names, strict=True)]) for x in data
    ]
    sides = {"gp2vec": lambda: ours(parts), "ObsPy": lambda: theirs(streams)}
    compare(f"{COUNT} single windows", sides, options.rounds, gate, options.json)
