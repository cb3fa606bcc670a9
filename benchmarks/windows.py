"""A day of three components at 100 Hz becomes 5,759 normalised windows: ObsPy on the whole day, SciPy, gp2vec.

Each side begins with the same decoded Stream of int32 traces and ends with float32 windows of 30 s that overlap by
half, each component without its mean, one scale for the three. gp2vec also looks for gaps and flaws; its peers do not.
"""

import numpy as np
import obspy
from measure import compare, parser
from scipy import signal

from gp2vec.data.preprocessing import PreprocessingConfig, normalise_windows, prepare, segments, window_grid

RATE, LENGTH, HOP = 100.0, 3000, 1500
CONFIG = PreprocessingConfig(overlap=0.5, detrend="linear", taper=10.0, highpass=1.0, lowpass=45.0)


def day() -> obspy.Stream:
    "Three components of swell, noise and an earthquake every hour."
    random, t = np.random.default_rng(0), np.arange(8_640_000) / RATE
    stream = obspy.Stream()
    for channel in ("HHZ", "HHN", "HHE"):
        x = 5000 * np.sin(2 * np.pi * 0.15 * t + random.uniform(0, 6)) + random.normal(0, 50, t.size)
        for onset in range(1000, 86400, 3600):
            i = np.arange(6000)
            x[onset * 100 : onset * 100 + 6000] += 2e4 * np.exp(-i / 1000) * random.normal(size=6000)
        header = {"network": "XX", "station": "S", "channel": channel, "sampling_rate": RATE}
        stream += obspy.Trace(x.round().astype(np.int32), header)
    return stream


def ours(stream: obspy.Stream) -> np.ndarray:
    (segment,), _ = segments(stream, CONFIG)
    ready = prepare(segment, CONFIG)
    grid = window_grid(ready.data.shape[1], ready.component_mask, ready.flaws, CONFIG)
    return normalise_windows(ready.data, grid.starts, LENGTH, grid.alive)[0]


def cut(data: np.ndarray) -> np.ndarray:
    "Normalised windows of a filtered day, some hundred at a time."
    views = np.lib.stride_tricks.sliding_window_view(data, LENGTH, axis=1)[:, ::HOP].transpose(1, 0, 2)
    out = np.empty(views.shape, np.float32)
    for i in range(0, len(views), 128):
        x = views[i : i + 128] - views[i : i + 128].mean(axis=2, keepdims=True)
        out[i : i + 128] = x / np.sqrt((x**2).mean(axis=(1, 2), keepdims=True))
    return out


def with_obspy(stream: obspy.Stream) -> np.ndarray:
    stream = stream.copy()
    stream.detrend("linear")
    stream.taper(None, "hann", CONFIG.taper)
    stream.filter("highpass", freq=CONFIG.highpass, corners=4)
    stream.filter("lowpass", freq=CONFIG.lowpass, corners=4)
    return cut(np.stack([trace.data for trace in stream]))


def with_scipy(stream: obspy.Stream) -> np.ndarray:
    x = signal.detrend(np.stack([trace.data for trace in stream]).astype(float), type="linear")
    ramp = round(CONFIG.taper * RATE)
    weights = 0.5 - 0.5 * np.cos(np.pi * np.arange(ramp) / ramp)
    x[:, :ramp] *= weights
    x[:, -ramp:] *= weights[::-1]
    high = signal.butter(4, CONFIG.highpass, "highpass", fs=RATE, output="sos")
    sections = high, signal.butter(4, CONFIG.lowpass, "lowpass", fs=RATE, output="sos")
    return cut(signal.sosfilt(np.concatenate(sections), x))


def gate(results: dict) -> str:
    a, errors = results["gp2vec"], []
    assert a.shape == (5759, 3, LENGTH) and a.dtype == np.float32
    for name in ("ObsPy", "SciPy"):
        errors.append(float(np.sqrt(np.mean((a - results[name]) ** 2) / np.mean(results[name] ** 2))))
        assert errors[-1] < 1e-3, (name, errors)
    return f"5759 windows; rel. rms {errors[0]:.1e} from ObsPy, {errors[1]:.1e} from SciPy"


if __name__ == "__main__":
    options, stream = parser(__doc__).parse_args(), day()
    sides = {
        "gp2vec": lambda: ours(stream),
        "ObsPy": lambda: with_obspy(stream),
        "SciPy": lambda: with_scipy(stream),
    }
    compare("day of three components -> 5,759 windows", sides, options.rounds, gate, options.json)
