"""Annotate, classify, real time and the commands as a user meets them: processes, kills, real days, SeisBench."""

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
import torch

from gp2vec import cli
from gp2vec.data.archive import Store, write_archive
from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.data.preprocessing import PreprocessingConfig, read_miniseed
from gp2vec.inference import Embeddings, Familiar, Picks, annotate, as_seisbench, classify, embed
from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig
from gp2vec.models.transformer import ContextConfig
from gp2vec.realtime import StreamingPicker
from gp2vec.train.picking import Picker, PickerConfig


@pytest.fixture(scope="module")
def picker():
    "A small picker that knows nothing and has an opinion on everything."
    torch.manual_seed(0)
    lenses = EncoderConfig(conv_layers=tuple(ConvLayer(16, k, 2) for k in (11, 7, 5)))
    context = ContextConfig(num_layers=1, num_heads=2, positions="rotary", dropout=0.0)
    config = GP2VecConfig.preset("tiny", embed_dim=16, feature_encoder=lenses, context_encoder=context)
    made = Picker(GP2Vec(config), PickerConfig(width=8)).eval()
    curves = annotate(made, synthetic_network(SyntheticConfig(stations=1, events=5, duration=300.0)).stream)
    levels = tuple(float(np.quantile(t.data, 0.98)) for t in curves[:2])  # so that there is something to pick
    made.config = replace(made.config, thresholds=levels)
    return made


@pytest.fixture(scope="module")
def archive(tmp_path_factory, picker):
    "A folder with an archive of three stations, a picker, and the stream that went in."
    folder = tmp_path_factory.mktemp("inference")
    network = synthetic_network(SyntheticConfig(stations=3, events=5, duration=300.0))
    write_archive(folder / "archive", network.stream, network.inventory)
    picker.save_pretrained(folder / "picker")
    return folder, network.stream


def command(folder, *words):
    return subprocess.run([sys.executable, "-m", "gp2vec.cli", *words], cwd=folder, capture_output=True, text=True)


def test_classify_with_processes_equals_the_function(archive, picker):
    folder, stream = archive
    done = command(folder, "classify", "picker", "archive", "--output", "two.parquet", "--workers", "2")
    assert done.returncode == 0, done.stderr
    expected = classify(picker, stream).table
    assert len(expected) > 10 and not (folder / "two.parquet.parts").exists()
    found = Picks.read(folder / "two.parquet").table
    pd.testing.assert_frame_equal(found, expected, check_exact=False, atol=1e-5)
    assert np.abs(found.time - expected.time).max() < 1000


def test_a_killed_command_goes_on_where_it_was(archive):
    folder, _ = archive
    words = ["annotate", "picker", "archive", "--output", "curves.mseed"]
    running = subprocess.Popen([sys.executable, "-m", "gp2vec.cli", *words], cwd=folder, stderr=subprocess.DEVNULL)
    parts = folder / "curves.mseed.parts"
    until = time.monotonic() + 120
    while not list(parts.glob("*.mseed")) and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    kept = sorted(parts.glob("*.mseed"))
    assert kept and not (folder / "curves.mseed").exists()
    kept[0].write_bytes(kept[0].read_bytes()[:4096])  # a mark: what is kept is used, not made again
    done = command(folder, *words)
    assert done.returncode == 0, done.stderr
    written = read_miniseed((folder / "curves.mseed").read_bytes())
    assert {t.stats.station for t in written} == {"S01", "S02", "S03"} and len({t.id for t in written}) == 7


def test_curves_of_the_command_are_those_of_the_function(archive, picker):
    folder, stream = archive
    assert command(folder, "annotate", "picker", "archive", "--output", "again.mseed").returncode == 0
    written = read_miniseed((folder / "again.mseed").read_bytes())
    for trace in annotate(picker, stream):
        letters = trace.stats.band + trace.stats.channel.removeprefix("GP2Vec_")[0]
        other = written.select(station=trace.stats.station, channel=letters)
        assert len(other) == 1 and np.allclose(other[0].data, trace.data, atol=1e-5)


@pytest.mark.parametrize("loud", (True, False))
def test_a_file_that_is_no_good_is_named_and_the_others_are_written(archive, tmp_path, loud, capsys):
    folder, stream = archive
    stream.select(station="S01").write(tmp_path / "good.mseed", format="MSEED")
    (tmp_path / "bad.csv").write_text("station,time\n")
    words = ["classify", str(folder / "picker"), str(tmp_path / "good.mseed"), str(tmp_path / "bad.csv")]
    status = cli.main([*words, "--output", str(tmp_path / "p.parquet"), *([] if loud else ["--quiet"])])
    said = capsys.readouterr().err
    assert status == 1 and len(Picks.read(tmp_path / "p.parquet")) > 3
    assert f"gp2vec: left out was {tmp_path / 'bad.csv'}: " in said and "miniSEED" in said
    assert ".parquet:" not in said and "_csv-" not in said, "no part of ours is named"
    assert not (tmp_path / "p.parquet.parts").exists()
    assert cli.main([*words[:2], words[3], "--output", str(tmp_path / "q.csv"), "--quiet"]) == 2
    assert f"{tmp_path / 'bad.csv'}: " in capsys.readouterr().err


def test_a_folder_of_loose_files_is_read(archive, tmp_path, capsys):
    folder, stream = archive
    for trace in stream:
        trace.write(tmp_path / f"{trace.id}.mseed", format="MSEED")
    (tmp_path / "notes.txt").write_text("no record")
    output = tmp_path / "p.csv"
    assert cli.main(["classify", str(folder / "picker"), str(tmp_path), "--output", str(output), "--quiet"]) == 0
    assert set(Picks.read(output).table.station) == {"S01", "S02", "S03"}
    (tmp_path / "empty").mkdir()
    words = ["classify", str(folder / "picker"), str(tmp_path / "empty"), "--output", str(output), "--quiet"]
    assert cli.main(words) == 2 and "name the files themselves" in capsys.readouterr().err


def test_picks_and_detections_come_back(archive, picker, tmp_path):
    folder, stream = archive
    picks = classify(picker, stream, thresholds=0.3 * min(picker.config.thresholds))
    assert len(picks.detections) > 3
    none = classify(picker, stream, thresholds=1.0)
    for made in (picks, none):
        for end in ("parquet", "csv"):
            made.write(tmp_path / f"p.{end}")
            again = Picks.read(tmp_path / f"p.{end}")
            pd.testing.assert_frame_equal(again.detections, made.detections)
            pd.testing.assert_frame_equal(again.table, made.table)
    assert len(pd.read_csv(tmp_path / "p.csv")) == len(none)
    (tmp_path / "p.detections.csv").unlink()
    assert len(Picks.read(tmp_path / "p.csv")) == len(none)


def test_one_threshold_is_for_all_phases_and_a_model_is_no_picker(archive, picker):
    _, stream = archive
    level = picker.config.thresholds[0]
    both = classify(picker, stream, thresholds=(level, level)).table
    pd.testing.assert_frame_equal(classify(picker, stream, thresholds=level).table, both)
    assert StreamingPicker(picker, thresholds=level).thresholds == (level, level)
    for call in (annotate, classify, lambda model, stream: StreamingPicker(model)):
        with pytest.raises(ValueError, match="expected a Picker, got GP2Vec.*train_picker or gp2vec adapt"):
            call(picker.model, stream)
    with pytest.raises(ValueError, match="one threshold above 0 and up to 1, or one for each of P, S"):
        StreamingPicker(picker, thresholds=(0.1, 0.2, 0.3))


def test_the_shipped_model_embeds_by_its_name(archive):
    folder, stream = archive
    done = command(folder, "embed", "gp2vec-tiny", "archive", "--output", "tiny.parquet")
    assert done.returncode == 0, done.stderr
    found, expected = Embeddings.read(folder / "tiny.parquet"), embed(GP2Vec.from_pretrained("gp2vec-tiny"), stream)
    assert len(found) == len(expected) > 10 and np.allclose(found.vectors, expected.vectors, atol=1e-4)


def test_a_shipped_picker_works_and_its_files_are_what_counts(archive, picker, monkeypatch):
    "What is kept of a killed command belongs to the very model, station table and record that it was made with."
    folder, _ = archive
    picker.save_pretrained(folder / "zoo" / "shipped")
    monkeypatch.setattr("gp2vec.models.gp2vec.files", lambda package: folder)
    monkeypatch.chdir(folder)
    assert cli.main(["classify", "shipped", "archive", "--output", "named.parquet", "--quiet"]) == 0
    assert cli.main(["annotate", "shipped", "archive", "--output", "named.mseed", "--quiet"]) == 0
    assert len(Picks.read("named.parquet")) > 10
    Path("stations.parquet").write_bytes(b"some")

    def name(model="shipped", stations="stations.parquet", verb="classify", threshold=None):
        return cli._Work(verb, model, stations, threshold).stamped().name("named.mseed")

    first = name()
    assert name() == first == name(str(folder / "zoo" / "shipped"))
    torch.manual_seed(1)
    Picker(GP2Vec(picker.model.config), picker.config).save_pretrained("other")
    assert len({first, name(stations=""), name(verb="annotate"), name(threshold=0.5), name("other")}) == 5
    for changed in ("zoo/shipped/config.json", "stations.parquet", "named.mseed"):
        before = name()
        Path(changed).write_bytes(Path(changed).read_bytes() + b" ")
        assert name() != before, changed
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, file: str(folder / "zoo" / "shipped" / file))
    for file in ("config.json", "model.safetensors"):
        before = name("owner/name")
        Path("zoo/shipped", file).write_bytes(Path("other", file).read_bytes())
        assert name("owner/name") != before, "a name on the Hub is worth what it stands for"


def test_weights_that_were_replaced_are_not_gone_on_from(archive, picker, monkeypatch):
    "Not even where the files have the size and the time of those before, and the process is the same."
    folder, stream = archive
    monkeypatch.chdir(folder)
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = GP2Vec(picker.model.config)
        model.save_pretrained("model")
        for file in Path("model").iterdir():
            os.utime(file, (0, 0))
        assert cli.main(["embed", "model", "archive", "--output", "replaced.parquet", "--quiet"]) == 0
        seen.append(cli._Work("embed", "model").stamped().name(str(folder / "picker" / "config.json")))
        assert np.allclose(Embeddings.read("replaced.parquet").vectors, embed(model, stream).vectors, atol=1e-4)
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("verb", "end"), [("embed", "parquet"), ("annotate", "mseed"), ("classify", "csv"), ("classify", "xml")]
)
def test_outputs_on_s3_are_resumed_and_leave_nothing_else(archive, picker, verb, end, s3_server, monkeypatch):
    folder, _ = archive
    s3_server.env(monkeypatch)
    monkeypatch.chdir(folder)
    model = "picker"
    if verb == "embed":
        model = "model"
        picker.model.save_pretrained(model)
    here, output = set(folder.rglob("*")), f"s3://private/{verb}-{end}/out.{end}"
    words, store = (
        [verb, model, "archive", "--output", output, "--quiet"],
        Store(f"s3://private/{verb}-{end}", credentials="environment"),
    )
    do, given = cli._do, []

    def stops(work, unit, parts, key):
        given.append(key)
        if len(given) == 3:
            raise OSError("the machine is gone")
        return do(work, unit, parts, key)

    monkeypatch.setattr(cli, "_do", stops)
    store.write(f"out.{end}.parts.txt", b"another's")
    assert cli.main(words) == 2 and len(store.find(f"out.{end}.parts/")) == 2
    assert cli.main(words) == 0 and len(given) == 4 and given[2] == given[3], "only what was missing is done"
    beside = {"out.detections.csv"} if end == "csv" else set()
    assert set(store.find()) == {f"out.{end}", f"out.{end}.parts.txt"} | beside and set(folder.rglob("*")) == here
    assert cli.main([*words[:4], f"local.{end}", "--quiet"]) == 0
    assert store.read(f"out.{end}") == Path(f"local.{end}").read_bytes() or end in ("parquet", "xml")
    assert not Path(f"local.{end}.parts").exists() and len(store.read(f"out.{end}")) > 1000


@pytest.mark.parametrize("place", ["curves", "s3://private/curves"])
def test_curves_are_replaced_whole_or_not_at_all(archive, picker, place, s3_server, monkeypatch):
    folder, _ = archive
    s3_server.env(monkeypatch)
    monkeypatch.chdir(folder)
    store, read, parts = Store(place, credentials="environment"), Store.read, []
    store.write("out.mseed", b"the curves of before")

    def lost(self, key, *rest):
        if ".parts" in self.path(key):
            parts.append(key)
            if len(parts) == 2:
                raise OSError("the disk is gone")
        return read(self, key, *rest)

    monkeypatch.setattr(Store, "read", lost)
    words = ["annotate", "picker", "archive", "--output", f"{place}/out.mseed", "--quiet"]
    assert cli.main(words) == 2 and store.read("out.mseed") == b"the curves of before"
    assert cli.main(words) == 0 and set(store.find()) == {"out.mseed"}
    assert len(obspy.read(io.BytesIO(store.read("out.mseed")))) == 9


def test_embeddings_as_an_array_with_labels():
    pytest.importorskip("xarray", reason="xarray is an extra")
    network = synthetic_network(SyntheticConfig(stations=2, events=3, duration=120.0))
    found = embed(GP2Vec(GP2VecConfig.preset("tiny")), network.stream)
    array = found.to_xarray()
    assert array.dims == ("window", "dimension") and np.array_equal(array.to_numpy(), found.vectors)
    one = array.sel(window=array.id == "XX.S02..HH")
    assert one.shape[0] == (found.table.station == "S02").sum() > 1
    assert (array.starttime.to_numpy() == found.table.starttime.to_numpy().astype("datetime64[ns]")).all()


def test_without_xarray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    columns = {name: [""] for name in ("network", "station", "location", "band", "components", "units")}
    table = pd.DataFrame(columns | {"starttime": [0], "endtime": [1], "log_scale": [0.0]})
    with pytest.raises(ImportError, match=r"pip install 'gp2vec\[xarray\]'"):
        Embeddings(np.zeros((1, 2), np.float32), table).to_xarray()


def test_many_gaps_are_not_slow(picker):
    stream = synthetic_network(SyntheticConfig(stations=1, events=5, duration=3600.0)).stream
    begin = stream[0].stats.starttime
    torn = stream.copy()
    torn.clear()
    for i in range(300):
        torn += stream.slice(begin + 12 * i, begin + 12 * i + 11.5)
    began = time.process_time()
    curves = annotate(picker, torn)
    torn_time = time.process_time() - began
    assert len(curves) == 900 and torn_time < 30


def test_seisbench_model_agrees(picker):
    pytest.importorskip("seisbench", reason="seisbench is an extra")
    stream = synthetic_network(SyntheticConfig(stations=1, events=4, duration=200.0)).stream
    model = as_seisbench(picker)
    theirs, ours = model.annotate(stream), annotate(picker, stream)
    assert {t.stats.channel for t in theirs} >= {"GP2Vec_P", "GP2Vec_S"}
    for phase in "PS":
        a, b = (s.select(channel=f"GP2Vec_{phase}")[0] for s in (theirs, ours))
        start, end = max(a.stats.starttime, b.stats.starttime) + 30, min(a.stats.endtime, b.stats.endtime) - 30
        x, y = a.slice(start, end).data, b.slice(start, end).data
        n = min(len(x), len(y))
        assert np.corrcoef(x[:n], y[:n])[0, 1] > 0.9
    assert len(model.classify(stream).picks.to_dataframe()) > 0


def test_seisbench_model_knows_what_is_missing(picker):
    "Components that are absent or dead are told to the picker, as by `annotate`."
    pytest.importorskip("seisbench", reason="seisbench is an extra")
    model, x = as_seisbench(picker), torch.randn(2, 3, round(picker.config.window_length * picker.sampling_rate))
    x[0, 1:] = 0
    with torch.no_grad():
        said, known = model(x)[:, :2], picker.curves(x, x.abs().amax(-1) > 0)[:, :2]
        assert torch.equal(said, known) and not torch.allclose(known[0], picker.curves(x)[0, :2], atol=1e-3)


@pytest.mark.parametrize("rate", [20.0, 40.0, 50.0, 200.0, 250.0])
def test_stations_of_all_rates_tell_the_same_time(picker, rate, monkeypatch):
    "Curves of one burst, recorded at several rates, lie over each other: the resampler's delay is taken off."

    def loudness(self, waveforms, component_mask=None, log_scale=None):
        power = waveforms[:, :1].square()
        power = torch.nn.functional.avg_pool1d(power, 51, 1, 25)
        return (power / power.amax(-1, keepdim=True)).expand(-1, 3, -1)

    monkeypatch.setattr(Picker, "curves", loudness)

    def middle(rate: float) -> float:
        t = np.arange(0, 60, 1 / rate)
        burst = 1e4 * np.exp(-(((t - 30) / 0.4) ** 2)) * np.cos(2 * np.pi * 5 * (t - 30)) + np.sin(12 * t)
        header = {"network": "XX", "station": "A", "sampling_rate": rate, "starttime": obspy.UTCDateTime(2020, 1, 1)}
        stream = obspy.Stream([obspy.Trace(burst, header | {"channel": f"HH{c}"}) for c in "ZNE"])
        curve = annotate(picker, stream).select(channel="GP2Vec_P")[0]
        seconds = curve.times() + (curve.stats.starttime - header["starttime"])
        weight = np.where(np.abs(seconds - 30) < 3, curve.data, 0.0)
        return float((seconds * weight).sum() / weight.sum())

    assert middle(rate) == pytest.approx(middle(100.0), abs=0.01)


@pytest.mark.parametrize("thresholds", [2, 0, -1, float("nan"), "high", (0.5,), (0.5, 1.5)])
def test_thresholds_that_mean_nothing(archive, picker, thresholds):
    with pytest.raises(ValueError, match="expected one threshold above 0 and up to 1"):
        classify(picker, archive[1], thresholds=thresholds)


def test_thresholds_of_numpy(archive, picker):
    one, other = (classify(picker, archive[1], thresholds=t).table for t in (0.3, np.float32(0.3)))
    assert abs(len(one) - len(other)) <= 1


@pytest.mark.parametrize("verb", ["classify", "annotate"])
def test_an_input_in_which_nothing_can_be_read_is_no_quiet_one(archive, verb, tmp_path, capsys):
    "It is named, and the status says so."
    folder, stream = archive
    dead = stream.select(station="S01").copy()
    for trace in dead:
        trace.data = np.zeros(len(trace), np.int32)
    (files := tmp_path / "files").mkdir()
    dead.write(files / "dead.mseed", format="MSEED")
    good = stream.select(station="S02").copy()
    for trace in good:
        trace.data = np.round(trace.data).astype(np.int32)
    good.write(files / "good.mseed", format="MSEED")
    output = tmp_path / ("out.csv" if verb == "classify" else "out.mseed")
    assert cli.main([verb, str(folder / "picker"), str(files), "--output", str(output)]) == 1
    assert "dead.mseed: no stretch of it" in capsys.readouterr().err and output.exists()


def test_no_picks_at_all_are_joined():
    assert len(Picks.join([])) == 0


@pytest.mark.skipif(not os.environ.get("GP2VEC_DATA"), reason="GP2VEC_DATA names no folder of real recordings")
@pytest.mark.parametrize("layer", [0, None])
def test_bad_records_are_not_familiar(layer):
    "Vectors before the context network tell all of these from good records; those of its last layer tell few."
    root = Path(os.environ["GP2VEC_DATA"], "buckets/scedc-pds/continuous_waveforms/2019/2019_185")
    model, tens = GP2Vec.from_pretrained("gp2vec-tiny"), PreprocessingConfig(window_length=10.0)

    def record(station: str, seconds: float, band: str = "HH") -> obspy.Stream:
        stream = obspy.Stream()
        for component in "ZNE":
            stream += obspy.read(root / f"{'CI' + station:_<7}{band}{component}___2019185.ms")
        return stream.trim(stream[0].stats.starttime, stream[0].stats.starttime + seconds)

    names = {"SLA": "HH", "WBM": "HH", "MPM": "HH", "CCC": "HH", "WNM": "HN"}
    parts = [embed(model, record(name, 2400, band), tens, layer=layer) for name, band in names.items()]
    familiar, good = Familiar.fit(Embeddings.join(parts)), record("SLA", 300)
    samples = len(good[0])
    t, rng, loud = np.arange(samples) / 100, np.random.default_rng(0), 20 * good[0].data[:30000].std()
    bad = {f"{hz} Hz": lambda x, hz=hz: 1000 * np.sin(2 * np.pi * hz * t) for hz in (5, 16.7, 30)}
    bad["hum"] = lambda x: x + loud * np.sin(2 * np.pi * 16.7 * t)
    bad["slow"] = lambda x: np.interp(np.arange(samples) / 4, np.arange(samples), x)
    flagged = {"unseen": familiar.flag(embed(model, record("LRL", 600), tens, layer=layer)).unusual.mean()}
    for name, spoil in bad.items():
        spoiled = good.copy()
        for trace in spoiled:
            trace.data = np.round(spoil(trace.data) + 3 * rng.normal(size=samples)).astype(np.int32)
        flagged[name] = familiar.flag(embed(model, spoiled, tens, layer=layer)).unusual.mean()
    assert flagged["unseen"] < 0.2
    if layer == 0:
        assert all(flagged[name] > 0.99 for name in bad), flagged
    else:  # as notebook 18 says of the last one
        assert all(flagged[name] < 0.1 for name in ("16.7 Hz", "30 Hz", "hum", "slow")), flagged


@pytest.mark.skipif(not os.environ.get("GP2VEC_DATA"), reason="GP2VEC_DATA names no folder of real recordings")
def test_real_hour_whole_and_in_pieces(picker):
    root = Path(os.environ["GP2VEC_DATA"], "buckets/scedc-pds/continuous_waveforms/2019/2019_185")
    files = sorted(root.glob("CIWBM__HH?*"))
    stream = read_miniseed(files[0].read_bytes())
    for file in files[1:]:
        stream += read_miniseed(file.read_bytes())
    begin = max(t.stats.starttime for t in stream)
    stream = stream.slice(begin, begin + 1800)
    whole = annotate(picker, stream)
    for a, b in ((0, 700.003), (650.777, 1800)):
        for trace in annotate(picker, stream.slice(begin + a, begin + b)):
            inner = trace.slice(trace.stats.starttime + 30, trace.stats.endtime - 30)
            other = whole.select(id=trace.id).slice(inner.stats.starttime, inner.stats.endtime)
            assert len(other) == 1 and np.abs(other[0].data - inner.data).max() < 1e-5
