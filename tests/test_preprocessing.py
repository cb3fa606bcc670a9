"""What preprocessing promises across its parts: chunking, causality, blocks, response, memory."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import obspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp2vec.data.preprocessing import (
    PreprocessingConfig,
    Reject,
    Segment,
    Window,
    bandpass,
    prepare,
    resample,
    segments,
    window_grid,
    windows,
)

START = obspy.UTCDateTime(2020, 1, 1)


def trace(data, channel="HHZ", start=0, rate=100.0):
    "A trace that begins `start` samples after the first."
    header = {"network": "XX", "station": "S", "channel": channel, "sampling_rate": rate}
    return obspy.Trace(data, header | {"starttime": START + start / rate})


def made(stream, config=None):
    "All windows and rejects of a stream, as comparable tuples."
    config = config or PreprocessingConfig(window_length=5.0, overlap=0.5)
    parts, rejects = segments(stream, config)
    items = [item for part in parts for item in windows(part, config)]
    out = [(w.starttime, w.waveform.tobytes(), w.log_scale, w.channels) for w in items if isinstance(w, Window)]
    return out, [r for r in items if isinstance(r, Reject)], rejects


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_windows_do_not_depend_on_how_the_stream_was_chunked(data):
    "Pieces, their order, and repeated samples change nothing; every sample is used or told."
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    rate = data.draw(st.sampled_from([40.0, 62.5, 100.0]))
    rows = np.cumsum(random.integers(-90, 90, (3, 4000)), axis=1).astype(np.int32)
    whole = obspy.Stream([trace(x, "HH" + c, 0, rate) for x, c in zip(rows, "ZNE", strict=True)])
    pieces = []
    for x, c in zip(rows, "ZNE", strict=True):
        cuts = sorted(data.draw(st.lists(st.integers(1, 3999), max_size=6, unique=True)))
        for a, b in zip([0, *cuts], [*cuts, 4000], strict=True):
            early = data.draw(st.integers(0, min(a, 50)))  # samples repeated from the piece before
            pieces.append(trace(x[a - early : b].copy(), "HH" + c, a - early, rate))
    chunked = obspy.Stream(data.draw(st.permutations(pieces)))
    assert made(chunked) == made(whole)


@pytest.mark.parametrize("rate", [31.25, 50.0, 100.0, 250.0])
@pytest.mark.parametrize("lowpass", [0.0, 8.0])
def test_nothing_before_a_step(rate, lowpass):
    "Causal: before the onset at most 1e-9 of the step, offset and all; zero phase: a hundredth and more."
    n, onset = int(40 * rate), int(20 * rate)
    x = np.where(np.arange(n) < onset, 12345, 1012345).astype(np.int32)
    (part,), _ = segments(obspy.Stream([trace(x, rate=rate)]))
    for phase, least, most in (("causal", 0.0, 1e-3), ("zero", 1e4, np.inf)):
        ready = prepare(part, PreprocessingConfig(lowpass=lowpass, phase=phase)).data[0]
        first = int(np.ceil(onset * 100 / rate))
        assert least <= np.abs(ready[:first]).max() <= most, phase
        assert np.abs(ready[first:]).max() > 1e5


@pytest.mark.parametrize("rate", [40.0, 75.19, 100.0, 200.0])
def test_blocks_are_seamless(rate):
    "A long segment, prepared block by block, is what filters of the whole give."
    x = np.random.default_rng(0).normal(0, 1000, (3, 50_001))
    part = Segment("XX", "S", "", "HH", 0, rate, x, np.ones(3, bool), ("HHZ", "HHN", "HHE"))
    config = PreprocessingConfig(lowpass=9.0)
    ready = prepare(part, config).data
    whole = resample(bandpass(x - x.mean(axis=1, keepdims=True), rate, 1.0, 9.0), rate, 100.0)
    assert ready.dtype == np.float32 and np.allclose(ready, whole, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(1.0, 40.0), st.floats(0.0, 0.9))
def test_good_windows_can_be_normalised(seed, length, overlap):
    "Whatever is cut from a messy segment, a window that the grid calls good is finite, with a scale."
    random = np.random.default_rng(seed)
    x = random.normal(0, 10 ** random.uniform(-1, 5), (3, 6000)).round()
    for _ in range(random.integers(0, 6)):
        a = random.integers(0, 6000)
        x[random.integers(0, 3), a : a + random.integers(1, 4000)] = random.integers(-5, 5)
    part = Segment("XX", "S", "", "HH", 0, 100.0, x, np.ones(3, bool))
    config = PreprocessingConfig(window_length=length, overlap=overlap)
    for item in windows(part, config):
        if isinstance(item, Window):
            assert np.isfinite(item.waveform).all() and np.isfinite(item.log_scale)
            assert np.isclose(np.mean(item.waveform[item.component_mask].astype(float) ** 2), 1, atol=1e-3)


def test_flaws_do_not_depend_on_the_window():
    x = np.random.default_rng(0).normal(0, 1000, 60_000).round()
    x[20_000:20_500], x[40_000] = 3, 90_000
    (part,), _ = segments(obspy.Stream([trace(x)]))
    short, long = (PreprocessingConfig(window_length=s) for s in (5.0, 60.0))
    assert prepare(part, short).flaws == prepare(part, long).flaws
    ready = prepare(part, short)
    grid = window_grid(ready.data.shape[1], ready.component_mask, ready.flaws, short)
    assert [int(i) for i in grid.starts[grid.reason == "flat"]] == [20_000]
    assert [int(i) for i in grid.starts[grid.reason == "spike"]] == [40_000]


def inventory_calls(pre_filt, **options):
    "ObsPy's example with its inventory: lookup, response, config."
    inventory = obspy.read_inventory()

    def find(network, station, location, channel, time):
        moment = obspy.UTCDateTime(ns=int(time))
        return inventory.select(network, station, location, channel, time=moment)[0][0][0]

    def lookup(*key):
        found = find(*key)
        gain = found.response.instrument_sensitivity.value
        place = {"azimuth": found.azimuth, "dip": found.dip, "gain": gain, "input_units": "M/S"}
        return {"starttime": 0, "endtime": 2**62, **place}

    def response(*key):
        return find(*key[:-1]).response.get_evalresp_response_for_frequencies(key[-1], output="VEL")

    return lookup, response, PreprocessingConfig(pre_filt=pre_filt, highpass=0.0, taper=1.5, **options)


@pytest.mark.parametrize("output", ["DISP", "VEL", "ACC"])
def test_response_like_obspy(output):
    pre_filt = (0.5, 1.0, 35.0, 45.0)
    lookup, response, config = inventory_calls(pre_filt, output=output)
    (part,), _ = segments(obspy.read(), config, lookup)
    assert part.units == "m/s" and part.data.dtype == np.float64 and part.orientations[2] == (90.0, 0.0)
    ready = prepare(part, config, response)
    theirs = obspy.read().detrend("demean").taper(None, "hann", 1.5)
    theirs.remove_response(
        obspy.read_inventory(), output, pre_filt=pre_filt, water_level=None, taper=False, zero_mean=False
    )
    theirs = np.stack([theirs.select(component=c)[0].data for c in "ZNE"])
    assert np.sqrt(np.mean((ready.data - theirs) ** 2) / np.mean(theirs**2)) < 1e-4
    assert ready.units == {"DISP": "m", "VEL": "m/s", "ACC": "m/s**2"}[output]
    with pytest.raises(ValueError, match="needs a response"):
        prepare(part, config)


def test_a_component_without_a_response_is_dead():
    lookup, response, config = inventory_calls((0.5, 1.0, 35.0, 45.0), output="VEL")
    (part,), _ = segments(obspy.read(), config, lookup)

    def partial(*key):
        return None if key[3] == "EHN" else response(*key)

    (window,) = windows(part, config, partial)
    assert window.component_mask.tolist() == [True, False, True] and not window.waveform[1].any()
    (reject,) = windows(part, config, lambda *key: None)
    assert reject.reason == "response"


def test_horizontals_are_turned():
    "A sensor that points elsewhere gives the same windows, once the table says where; a flaw goes with its component."
    earth = obspy.read()
    angle = np.radians(30)
    north, east = (earth.select(component=c)[0] for c in "NE")
    turned = earth.copy()
    first, second = (turned.select(component=c)[0] for c in "NE")
    first.data, second.data = (
        np.cos(angle) * north.data + np.sin(angle) * east.data,
        -np.sin(angle) * north.data + np.cos(angle) * east.data,
    )
    first.stats.channel, second.stats.channel = "EH1", "EH2"
    azimuths = {"EHZ": (0, -90), "EHN": (0, 0), "EHE": (90, 0), "EH1": (30, 0), "EH2": (120, 0)}

    def lookup(network, station, location, channel, time):
        azimuth, dip = azimuths[channel]
        epoch = {"starttime": 0, "endtime": 2**62, "gain": 1e9, "input_units": "M/S"}
        return {**epoch, "azimuth": azimuth, "dip": dip}

    ready = [prepare(segments(stream, None, lookup)[0][0]) for stream in (earth, turned)]
    assert np.allclose(ready[0].data, ready[1].data, atol=1e-6 * np.abs(ready[0].data).max())
    assert ready[1].orientations is None and ready[1].channels == ("EHZ", "EH1", "EH2")
    first.data[1000:1200] = 0
    broken = prepare(segments(turned, None, lookup)[0][0])
    assert [f.row for f in broken.flaws if f.reason == "flat"] == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset as Linux does it")
def test_a_day_in_bounded_memory():
    "Three components of a day at 100 Hz: beyond the recorded samples and the result, some tens of megabytes."
    code = """
        import re
        from pathlib import Path
        import numpy as np
        from gp2vec.data.preprocessing import PreprocessingConfig, Segment, prepare
        def part(n):
            x = np.ones((3, n), np.int32)
            x[:, ::7], x[:, ::3] = 500, -20
            return Segment("XX", "S", "", "HH", 0, 100.0, x, np.ones(3, bool))
        def megabytes(name):
            return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
        prepare(part(50_000))
        day = part(8_640_000)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = megabytes("VmRSS")
        ready = prepare(day)
        grown, result = megabytes("VmHWM") - before, ready.data.nbytes / 2**20
        assert 0.9 * result < grown < result + 50, (grown, result)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)
