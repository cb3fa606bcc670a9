"""Labels from files, honest splits, pickers and their promises, and the commands `evaluate` and `adapt`."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import obspy
import pandas as pd
import pytest
import torch

from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2VecConfig
from gp2vec.models.transformer import ContextConfig
from gp2vec.train.evaluate_downstream import (
    CONTROL,
    DEEP,
    PICKING_ARMS,
    TASKS,
    DownstreamEvaluator,
    EvaluationConfig,
    PhaseNetPicker,
    _limit,
    evaluate,
    evaluate_picking,
    run_evaluation,
    told_fields,
)
from gp2vec.train.picking import (
    FitConfig,
    Picker,
    PickerConfig,
    StaLta,
    _calibrated,
    _conformal,
    _event_folds,
    calibrate,
    coverage,
    find_candidates,
    fit_picker,
    match_picks,
    shift_consistency,
    shift_score,
    train_picker,
)
from gp2vec.train.probes import (
    LabelledWindows,
    audit_split,
    crossed_folds,
    known_times,
    label_onsets,
    mean_auc,
    read_onsets,
    split_parts,
    untrained,
)

DATA = Path(os.environ.get("GP2VEC_DATA") or "no data")
PRETRAINED_ON = ["CCC", "JRC2", "LRL", "MPM", "SLA", "WBM", "WNM", "WRV2", "WVP2", "BRIB", "CVS", "SHW"]
SMALL = GP2VecConfig.preset(
    "tiny",
    embed_dim=48,
    feature_encoder=EncoderConfig(conv_layers=tuple(ConvLayer(32, kernel, 2) for kernel in (11, 7, 5))),
    context_encoder=ContextConfig(num_layers=1, num_heads=3, conv_pos=32, dropout=0.0),
)
QUICK = EvaluationConfig(fractions=(1.0,), seeds=(0,), resamples=1)


@pytest.fixture(scope="session")
def network():
    settings = SyntheticConfig(stations=9, events=40, duration=1900.0, magnitude_range=(1.5, 4.0), minimum_spacing=36.0)
    return synthetic_network(settings)


@pytest.fixture(scope="session")
def onsets(network):
    return label_onsets(network.stream, network.picks, before=30, after=30)


@pytest.fixture(scope="session")
def files(network, onsets, tmp_path_factory):
    "What a user would bring: raw counts around events as NumPy files, and a table with as little as possible."
    folder = tmp_path_factory.mktemp("labels")
    start, rows = network.stream[0].stats.starttime.ns, []
    raw = {s: np.stack([t.data for t in network.stream.select(station=s)]) for s in onsets.table.station.unique()}
    for i, (record, row) in enumerate(zip(onsets.records, onsets.table.itertuples(), strict=True)):
        first = round((record.starttime - start) / 1e7)
        data = raw[row.station][:, first : first + record.data.shape[1]]
        np.savez(folder / f"{i:03d}.npz", data=data, sampling_rate=100.0)
        when = pd.Timestamp(row.time, tz="UTC").isoformat()
        rows.append((f"{i:03d}.npz", row.event_id, "XX", row.station, row.P, row.S, row.magnitude, when))
    columns = ["trace_file", "event_id", "network", "station", "p_sample", "s_sample", "magnitude", "start_time"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "picks.csv", index=False)
    return folder


def run(*arguments):
    "The command in a process of its own."
    command = [sys.executable, "-m", "gp2vec.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


# Labels


@pytest.mark.parametrize("rate", (40.0, 50.0, 100.0, 200.0, 250.0))
def test_an_onset_stays_where_it_is_labelled(tmp_path, rate):
    "Whatever the rate of the file: nothing moves before the label, and motion begins within two samples of it."
    n, at = round(60 * rate), round(30 * rate)
    data = np.zeros((3, n))
    data[:, at:] = 1e4 * np.sin(2 * np.pi * 6 * np.arange(n - at) / rate)
    data += np.random.default_rng(0).normal(size=data.shape)
    np.savez(tmp_path / "a.npz", data=data, sampling_rate=rate)
    pd.DataFrame([("a.npz", "XX", "A", at)], columns=["trace_file", "network", "station", "p_sample"]).to_csv(
        tmp_path / "picks.csv", index=False
    )
    read = read_onsets(tmp_path)
    place, x = read.table.P[0], np.abs(read.records[0].data[0])
    assert abs(place - 3000) < 1e-6
    early, late = x[2000:2999].max(), x[3002:3012].max()
    assert early < 20 and late > 1000, (early, late)


def test_mistakes_in_labels_are_said_in_a_sentence(tmp_path):
    "Each names the file or column that is wrong, and what is expected of it."
    good = {"trace_file": "a.npz", "network": "XX", "station": "A", "p_sample": 3000}
    np.savez(tmp_path / "a.npz", data=np.random.default_rng(0).normal(size=(3, 6000)), sampling_rate=100.0)
    np.savez(tmp_path / "no-rate.npz", data=np.ones((3, 6000)))
    np.save(tmp_path / "plain.npy", np.ones((3, 6000)))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:2000])
    obspy.Stream([obspy.Trace(np.ones(6000, np.int32))]).write(tmp_path / "b.mseed", format="MSEED")
    for change, wanted in (
        ({"trace_file": "no-rate.npz"}, "no-rate.npz to be a NumPy file .npz .* got one without sampling_rate"),
        ({"trace_file": "b.mseed"}, "b.mseed to be a NumPy file .npz .* something else"),
        ({"trace_file": "plain.npy"}, "plain.npy to be a NumPy file .npz"),
        ({"trace_file": "torn.npz"}, "torn.npz to be a NumPy file .npz"),
        ({"p_sample": 6100}, "p_sample 61 s into a.npz, which is 60 s long"),
        ({"p_sample": -3}, "p_sample -0.03 s into a.npz"),
        ({"p_sample": "impulsive"}, "'impulsive' in p_sample: give a sample number"),
    ):
        pd.DataFrame([good | change]).to_csv(tmp_path / "picks.csv", index=False)
        with pytest.raises(ValueError, match=wanted):
            read_onsets(tmp_path)
    for text in ("", "trace_file,network,station,p_sample\n"):
        (tmp_path / "picks.csv").write_text(text)
        with pytest.raises(ValueError, match="picks.csv names no record"):
            read_onsets(tmp_path)


def test_a_label_at_always_the_same_sample_is_not_learned(files, tmp_path):
    "Records with P at sample 3000 make windows with P anywhere."
    table = pd.read_csv(files / "picks.csv").iloc[:30]
    for row in table.itertuples():
        data = np.load(files / row.trace_file)["data"]
        cut = np.zeros((3, 9001), dtype=data.dtype)
        first = round(row.p_sample) - 3000
        part = data[:, max(first, 0) : first + 9001]
        cut[:, max(-first, 0) : max(-first, 0) + part.shape[1]] = part
        np.savez(tmp_path / row.trace_file, data=cut, sampling_rate=100.0)
    table.assign(p_sample=3000, s_sample=np.nan).to_csv(tmp_path / "picks.csv", index=False)
    places = np.concatenate([read_onsets(tmp_path).crops(20.0, seed=s).only("event").table.P for s in range(3)])
    assert np.histogram(places, bins=[2, 6, 10, 14, 18])[0].min() > 0.15 * len(places)


# Splits


def random_table(rng):
    events, stations = rng.integers(8, 40), rng.integers(6, 20)
    time = np.sort(rng.integers(1, 10**6, events)) * 10**9 + 1
    rows = [(e, s) for e in range(events) for s in range(stations) if rng.random() < 0.5]
    table = pd.DataFrame(rows, columns=["event", "site"])
    known = {"event_id": table.event.map("e{}".format), "network": rng.choice(["A", "B"], len(table))}
    known |= {"station": table.site.map("S{}".format), "time": time[table.event] + rng.integers(0, 10**9, len(table))}
    return table.assign(**known)


@pytest.mark.parametrize("seed", range(25))
def test_splits_share_nothing(seed):
    "No event, no station (in any network) and no time is in two parts, and stations of pretraining are never tested."
    table = random_table(np.random.default_rng(seed))
    pairs = [(a, b) for a, b in crossed_folds(table, seed, ["S0", "S1"]) if len(b)]
    seen: set[str] = set()
    for turn in range(4):
        try:
            parts = split_parts(table, never_test=["S0", "S1"], seed=turn)
        except ValueError as error:
            assert "leave nothing" in str(error)
            continue
        pairs += [(parts["train"], parts["dev"]), (parts["train"], parts["test"]), (parts["dev"], parts["test"])]
        train, test = (table.time.iloc[parts[name]].to_numpy() for name in ("train", "test"))
        assert turn or train.max() < test.min(), "seed 0 learns from the past alone"
        apart = np.abs(train[:, None] - test).min()
        assert apart >= 60e9 and not ((train > test.min()) & (train < test.max())).any()
        assert not {"S0", "S1"} & set(table.station.iloc[parts["test"]])
        assert not seen & set(table.event_id.iloc[parts["test"]]), "four seeds test other events each"
        seen |= set(table.event_id.iloc[parts["test"]])
    for k, (a, b) in enumerate(pairs):
        one, other = table.iloc[a], table.iloc[b]
        assert not set(one.event_id) & set(other.event_id) and not set(one.station) & set(other.station)
        if k < 4:
            assert one.time.max() < other.time.min() or other.time.max() < one.time.min()
        audit_split(table, a, b)
    assert not {"S0", "S1"} & set(table.station.iloc[np.concatenate([b for _, b in pairs[:4]])]) or len(pairs) < 4


def test_without_times_four_seeds_test_other_events_too():
    table = random_table(np.random.default_rng(5)).drop(columns="time")
    tests = [set(table.event_id.iloc[split_parts(table, seed=seed)["test"]]) for seed in range(4)]
    assert sum(map(len, tests)) == len(set.union(*tests))


def test_co_located_channels_are_one_station():
    table = random_table(np.random.default_rng(0))
    table["latitude"], table["longitude"] = 10.0 + table.site, 20.0
    twin = table.site == 3
    table.loc[twin & (table.event % 2 == 0), "station"] = "OTHER"  # another code at the same place
    for a, b in crossed_folds(table, 1):
        assert not ({"S3", "OTHER"} & set(table.station.iloc[a]) and {"S3", "OTHER"} & set(table.station.iloc[b]))


@pytest.mark.parametrize("kind", ("event", "station", "time"))
def test_the_audit_finds_one_planted_leak(kind):
    table = random_table(np.random.default_rng(3))
    train, test = next((a, b) for a, b in crossed_folds(table, 0) if len(a) and len(b))
    audit_split(table, train, test)
    bad = table.copy()
    column = {"event": "event_id", "station": "station", "time": "time"}[kind]
    bad.loc[train[0], column] = table[column].iloc[test[0]]
    with pytest.raises(ValueError, match=f"split by {kind}"):
        audit_split(bad, train, test)


def test_no_task_is_tested_at_stations_of_pretraining(onsets, monkeypatch):
    windows, tested = onsets.windows(8.0), []
    table = TASKS["phase"].select(windows)[0].table
    keep = lambda told, answer, folds, *more: tested.append(np.concatenate([b for _, b in folds])) or {"AUC": 0.5}  # noqa: E731
    monkeypatch.setattr("gp2vec.train.evaluate_downstream.score", keep)
    config = EvaluationConfig(fractions=(1.0,), seeds=(0, 1), resamples=1, never_test=("S01", "S02"))
    evaluate(untrained(SMALL), windows, "phase", config)
    seen = set(table.station.iloc[np.concatenate(tested)])
    assert seen and not {"S01", "S02"} & seen and {"S01", "S02"} <= set(table.station)


def test_a_picker_learns_is_tuned_and_is_judged_on_different_records(onsets, monkeypatch):
    "Spies see what training, calibration and judgement are given: no event and no station twice."
    seen, place = {}, "gp2vec.train.evaluate_downstream"

    def make(model, train, config, fit):
        seen["train"] = train.table
        return StaLta(config.picker, train.sampling_rate)

    def tune(picker, dev, seed):
        seen["dev"] = dev.table
        return calibrate(picker, dev, seed)

    def judge(found, table):
        seen["test"] = table
        return match_picks(found, table)

    monkeypatch.setitem(PICKING_ARMS, "spy", make)
    monkeypatch.setattr(f"{place}.calibrate", tune)
    monkeypatch.setattr(f"{place}.match_picks", judge)
    settings = {"arms": ("spy",), "picking_fractions": (1.0,), "seeds": (0,), "resamples": 2, "never_test": ("S01",)}
    evaluate_picking(untrained(SMALL), onsets, EvaluationConfig(**settings, shares=(0.5, 0.25, 0.25)))
    assert set(seen) == {"train", "dev", "test"} and "S01" not in set(seen["test"].station)
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test")):
        for column in ("event_id", "station"):
            assert not set(seen[a][column]) & set(seen[b][column]), (a, b, column)


@pytest.mark.filterwarnings("ignore:picking is tested without seed")
def test_a_draw_without_events_of_one_seed_is_that_of_the_others(onsets, monkeypatch):
    "Blocks of two or three events: a draw often misses all of one, and a perfect picker stays perfect."

    def truth(picker, windows):
        told = windows.table[["P", "S"]].rename_axis("window").reset_index()
        found = told.melt("window", ["P", "S"], "phase", "time").dropna(subset="time", ignore_index=True)
        return found.assign(probability=0.9)

    monkeypatch.setattr("gp2vec.train.evaluate_downstream.find_candidates", truth)
    few = onsets.some_events(12)
    settings = {"arms": ("STA/LTA",), "seeds": (0, 1, 2, 3), "resamples": 200, "shares": (0.5, 0.25, 0.25)}
    table, _ = evaluate_picking(untrained(SMALL), few, EvaluationConfig(**settings))
    rows = table.set_index("metric").loc[["P F1 0.5 s", "P MAE", "P recall 0.5 s"]]
    assert (rows[["value", "low", "high"]].to_numpy() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]).all(), rows
    assert table.events.iloc[0] < 12 and table.windows.iloc[0] <= 2 * len(few)


def test_a_seed_that_cannot_be_split_is_left_out_by_name(onsets, monkeypatch):
    def split(table, shares, never_test, seed):
        if seed in (1, 3):
            raise ValueError("20 records leave nothing in the part train or test: label more stations and events")
        return split_parts(table, shares, never_test, seed)

    monkeypatch.setattr("gp2vec.train.evaluate_downstream.split_parts", split)
    config = EvaluationConfig(seeds=(0, 1), resamples=2, arms=("STA/LTA",))
    with pytest.warns(UserWarning, match="without seed 1: 20 records leave"):
        evaluate_picking(untrained(SMALL), onsets, config)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="label more"):
        evaluate_picking(untrained(SMALL), onsets, replace(config, seeds=(1, 3)))


def test_folds_of_adapt_keep_an_event_together(onsets):
    "The records of an event are all taught or all judged, and crops are dealt as their records are."
    fold = pd.Series(_event_folds(onsets.table, 4, 0)).groupby(onsets.table.event_id)
    assert (fold.nunique() == 1).all() and set(fold.first()) == {0, 1, 2, 3}
    crops = onsets.crops(12.0).table
    other = pd.Series(_event_folds(crops, 4, 0)).groupby(crops.event_id).first()
    assert other.equals(fold.first()[other.index])


def test_shares_of_the_labels_are_shares_of_the_events(onsets):
    events = onsets.table.event_id.nunique()
    for share in (0.01, 0.1, 0.5, 1.0):
        few = _limit(onsets, share, 0)
        assert few.table.event_id.nunique() == max(2, round(share * events))
    assert set(_limit(onsets, 0.1, 0).table.event_id) != set(_limit(onsets, 0.1, 1).table.event_id)


@pytest.mark.parametrize("told", (True, False))
def test_a_place_in_a_file_is_not_taken_for_a_time(files, told):
    "`start_time` is optional: without it nothing is split by time, and the tables do not say so."
    table = pd.read_csv(files / "picks.csv")
    (table if told else table.drop(columns="start_time")).to_csv(files / "timed.csv", index=False)
    onsets = read_onsets(files / "timed.csv")
    windows = onsets.windows(8.0)
    assert (known_times(windows.table) is not None) == told
    config = EvaluationConfig(fractions=(1.0,), seeds=(0,), resamples=1, picking_fractions=(1.0,), arms=("STA/LTA",))
    wanted = "event and station" + " and time" * told
    assert set(evaluate(untrained(SMALL), windows, "phase", config).split) == {wanted}
    assert set(evaluate_picking(untrained(SMALL), onsets, config)[0].split) == {wanted}


# Scores


def test_a_fold_counts_by_its_pairs():
    "One S in a fold is one of 31 pairs, not half of the answer; draws of events count pairs by their weights."
    truth = np.array([True, False, *6 * [True], *5 * [False]])
    folds = [(np.arange(2, 13), np.arange(2)), (np.arange(2), np.arange(2, 13))]
    told = np.where(truth, 1.0, -1.0)
    told[:2] *= -1  # the lone pair stands in the wrong order
    assert mean_auc(told, truth, folds) == pytest.approx(30 / 31)
    weight = np.array([2.0, 3.0, *11 * [1.0]])
    assert mean_auc(told, truth, folds, weight) == pytest.approx(30 / 36)
    weight[0] = 0
    assert mean_auc(told, truth, folds, weight) == 1 and np.isnan(mean_auc(told, truth, folds, 0 * weight))


def test_the_table_counts_what_was_tested(onsets):
    "Folds that nothing could be learned from, and stations of pretraining, are not what an answer rests on."
    windows = onsets.windows(8.0)
    table = TASKS["phase"].select(windows)[0].table
    settings = {"fractions": (1.0,), "seeds": (0,), "resamples": 1}
    found = evaluate(untrained(SMALL), windows, "phase", EvaluationConfig(**settings, never_test=("S01", "S02"))).iloc[
        0
    ]
    tested = table[~table.station.isin(["S01", "S02"])]
    assert (found.windows, found.events, found.stations) == (len(tested), tested.event_id.nunique(), 7)
    count = tested.label.value_counts()
    assert found.classes == f"{count.S} S, {count.P} P"
    one = windows.take(((windows.table.label != "S") | (windows.table.station == "S03")).to_numpy())
    with pytest.raises(ValueError, match="to test"):
        evaluate(untrained(SMALL), one, "phase", EvaluationConfig(**settings))


def test_polarity_is_asked_of_p_alone(onsets):
    "A record's polarity stands in the row of its S and noise windows too."
    windows = onsets.windows(8.0)
    windows.table["polarity"] = np.where(windows.table.event_id.str[-1].isin(list("02468")), "up", "down")
    subset, answer = TASKS["polarity"].select(windows)
    assert set(subset.table.label) == {"P"} and 0 < answer.mean() < 1
    found = DownstreamEvaluator(untrained(SMALL), QUICK).evaluate("polarity", *arrays(subset, subset.table.polarity))
    assert found.windows[0] == len(subset)


def arrays(windows, answers):
    return (
        windows.waveforms,
        answers,
        {name: windows.table[name] for name in ("event_id", "network", "station", "time")},
    )


def test_classes_may_be_named_or_counted(onsets):
    windows = onsets.windows(8.0)
    evaluator, yes = DownstreamEvaluator(untrained(SMALL), QUICK), (windows.table.label != "noise").to_numpy()
    first = evaluate(untrained(SMALL), windows, "event", QUICK)
    for answers in (yes, yes.astype(int).tolist(), torch.tensor(yes), np.where(yes, "event", "noise")):
        found = evaluator.evaluate("event", *arrays(windows, answers))
        assert np.allclose(found.value, first.value, atol=0.02) and found.classes.equals(first.classes)
    p = windows.only("P")
    even = p.table.event_id.str[-1].isin(list("02468"))
    assert evaluator.evaluate("polarity", *arrays(p, even)).classes[0] == f"{even.sum()} up, {(~even).sum()} down"


def test_metadata_may_be_a_table_with_any_index(onsets):
    "Rows go with windows by their order."
    windows, evaluator = onsets.windows(8.0), DownstreamEvaluator(untrained(SMALL), QUICK)
    plain, known = arrays(windows, windows.table.label), pd.DataFrame(arrays(windows, [])[2])
    known.index = np.random.default_rng(0).permutation(len(known)) + 7
    labels = pd.Series(windows.table.label.to_numpy(), known.index)
    found = evaluator.evaluate("phase", windows.waveforms, labels, known)
    pd.testing.assert_frame_equal(found, evaluator.evaluate("phase", *plain))


def test_what_means_nothing_is_refused():
    "In one sentence each."
    with pytest.raises(ValueError, match="fit.steps"):
        FitConfig(steps=0)
    for phases in (("S", "P"), ("P",), ("Pg", "Sg")):
        with pytest.raises(ValueError, match="phases are P and S"):
            PickerConfig(phases=phases, thresholds=(0.5,) * len(phases))


def test_too_few_labels_are_no_answer(files, model, tmp_path):
    "It says what there is and what a task needs."
    table = pd.read_csv(files / "picks.csv")
    table.head(6).to_csv(files / "six.csv", index=False)
    done = run("evaluate", model, files / "six.csv", "--settings", "quick", "--output", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "of 6 records, and a task needs 40" in " ".join(done.stderr.split())


def test_heads_learn_what_the_size_leaves_open():
    "What the logarithm of the scale tells is told, though a head may know its windows by heart."
    rng = np.random.default_rng(0)
    count, size = 60, rng.normal(size=60)
    waveforms = rng.normal(size=(count, 3, 400)).astype(np.float32)
    table = pd.DataFrame(
        {"event_id": range(count), "network": "XX", "station": [f"S{i % 12:02d}" for i in range(count)]}
    )
    table = table.assign(label="P", log_scale=size, magnitude=2 * size + rng.normal(0, 0.5, count))
    config = replace(QUICK, protocols=("attentive",), fit=FitConfig(steps=400, batch_size=16), layer=0)
    found = evaluate(untrained(SMALL), LabelledWindows(waveforms, table, 100.0), "magnitude", config)
    assert found[(found.arm == "gp2vec") & (found.metric == "R2")].value.item() > 0.8


def test_a_question_with_one_answer_is_refused(onsets):
    "In place of NaN, or of a perfect score for every arm."
    windows, evaluator = onsets.windows(8.0), DownstreamEvaluator(untrained(SMALL), QUICK)
    few = windows.only("P", "S")
    ask = evaluator.evaluate
    for wanted, call in (
        ("'event' needs two classes, and its [0-9]+ windows are all P or S: give some that are noise",
         lambda: ask("event", *arrays(few, ["event"] * len(few)))),
        ("'phase' needs two classes", lambda: ask("phase", *arrays(few, ["P"] * len(few)))),
        ("all normal: give some that are tremor",
         lambda: evaluator.evaluate_tremor_detection(*arrays(few, [0] * len(few)))),
        ("two bins [(]edges 9[)] or more",
         lambda: evaluator.evaluate_magnitude(*arrays(few, few.table.magnitude), bins=(9.0,))),
        ("tasks are event.*not 'evnt'", lambda: ask("evnt", *arrays(few, few.table.label))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=wanted):
            call()


# Heads on windows


def test_every_way_to_train_on_windows_finds_a_planted_signal():
    "Half of the windows of noise hold a ringing somewhere: a frozen model with a head, and those that may move, tell."
    rng, n = np.random.default_rng(0), 200
    x, ringing = rng.normal(size=(n, 3, 600)), np.arange(n) % 2 == 0
    pulse = 3 * np.sin(2 * np.pi * 12 * np.arange(300) / 100) * np.hanning(300)
    for k in np.flatnonzero(ringing):
        at = rng.integers(0, 300)
        x[k, :, at : at + 300] += pulse
    known = {"event_id": [f"e{k // 10}" for k in range(n)], "network": "XX", "label": np.where(ringing, "S", "P")}
    table = pd.DataFrame(known | {"station": [f"S{k % 7}" for k in range(n)]})
    windows = LabelledWindows(x.astype(np.float32), table)
    fit = FitConfig(steps=30, batch_size=24, learning_rate=2e-2, rank=2)
    config = replace(QUICK, protocols=DEEP, fit=fit)
    model = untrained(SMALL)
    found = evaluate(model, windows, "phase", config)
    assert set(found.protocol) == {"attentive", "last", "adapters", "all"} and len(found) == 8
    assert (found.value > 0.8).all(), found[["protocol", "arm", "value"]]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untrained(SMALL).parameters(), strict=True))
    mixed = LabelledWindows(windows.waveforms, table.assign(label=rng.permutation(table.label)))
    luck = evaluate(model, mixed, "phase", replace(config, protocols=("adapters",)))
    assert (abs(luck.value - 0.5) < 0.2).all(), "labels that mean nothing teach nothing"


# Metadata


def test_a_shortcut_by_metadata_is_told_and_found_out(onsets):
    "Where only a told field knows the answer, the arm that is told gains, and not the one told of another station."
    windows = onsets.windows(8.0).only("P", "S")
    rng = np.random.default_rng(0)
    windows.waveforms = rng.normal(size=windows.waveforms.shape).astype(np.float32)
    place = rng.permutation(np.arange(len(windows)) % 40)  # of each window, so that every station has both answers
    windows.table["elevation"] = 50.0 * place
    windows.table["label"] = np.where(place < 20, "P", "S")
    model = untrained(replace(SMALL, conditioning=replace(SMALL.conditioning, fields=("elevation",))))
    table = evaluate(model, windows, "phase", replace(QUICK, layer=None, resamples=50)).set_index("arm")
    assert table.value["gp2vec, with metadata"] > 0.9 and table.gain_low["gp2vec, with metadata"] > 0.2
    assert abs(table.value["gp2vec, with shuffled metadata"] - 0.5) < 0.1


def test_arms_that_would_be_told_the_same_are_left_out_and_pages_say_what_was_told(onsets, tmp_path):
    model, windows = untrained(SMALL), onsets.windows(8.0).only("P", "S")
    windows.table["sampling_rate"] = 100.0
    assert not any("metadata" in arm for arm in evaluate(model, windows, "phase", QUICK).arm)
    windows.table["elevation"] = pd.factorize(windows.table.station)[0] * 10.0
    assert told_fields(model, windows.table) == ["elevation", "sampling_rate"]
    windows.table["sampling_rate_of_record"] = windows.table.pop("sampling_rate")
    windows.write(tmp_path / "data")
    run_evaluation(model, tmp_path / "data", tmp_path / "out", replace(QUICK, tasks=("magnitude",)))
    page = (tmp_path / "out" / "magnitude.md").read_text()
    assert "The arms with metadata are told: elevation." in page and "gp2vec, with shuffled metadata" in page
    assert "There is no noise-only control: no noise window carries a magnitude" in page


# Pickers


@pytest.mark.parametrize("right", (0.5, 0.75, 0.95))
def test_probabilities_are_shares_of_right_picks(right):
    "The temperature is that at which candidates said to be right with 95 % are as often right as they are."
    rng = np.random.default_rng(0)
    count = 4000
    found = pd.DataFrame({"window": range(count), "phase": "P", "probability": 0.95, "event_id": range(count)})
    found = found.assign(network="XX", station="A", residual=np.where(rng.random(count) < right, 0.01, np.nan))
    table = pd.DataFrame({"P": np.ones(count), "S": np.full(count, np.nan)})
    config = _calibrated(PickerConfig(), found, table)
    said = 1 / (1 + (0.05 / 0.95) ** (1 / config.temperature))
    assert abs(said - max(right, 1 / (1 + (0.05 / 0.95) ** 0.25))) < 0.03


def test_half_widths_are_the_order_statistic_of_the_errors():
    "The error number ⌈(n + 1) · 0.9⌉ in order of size; the next pick is covered with a chance of 90 %."
    numbers, covered = np.random.default_rng(0), []
    known = {"probability": 0.5, "network": "XX", "station": "S01"}
    for _ in range(400):
        errors = numbers.exponential(0.1, 100) * numbers.choice([-1, 1], 100)
        mine = pd.DataFrame({"residual": errors[:99], "event_id": range(99)} | known)
        (interval,) = _conformal(mine, "P", 0.9)
        assert interval.half_width == np.sort(np.abs(errors[:99]))[89]
        covered.append(abs(errors[99]) <= interval.half_width)
    assert 0.85 < np.mean(covered) < 0.95


def test_intervals_cover_what_they_promise_at_stations_never_seen():
    "Errors of picks at other stations and other events, in all and where the signal is weak."
    settings = SyntheticConfig(
        stations=14, events=50, duration=2300.0, magnitude_range=(1.5, 4.0), minimum_spacing=36.0
    )
    many = synthetic_network(settings)
    onsets = label_onsets(many.stream, many.picks, before=30, after=30)
    parts = split_parts(onsets.table, shares=(0.05, 0.45, 0.5))
    dev = onsets.take(parts["dev"])
    picker = calibrate(StaLta(PickerConfig(window_length=15.0)), dev, repeats=1)
    own = dev.crops(15.0)
    told = coverage(picker, match_picks(find_candidates(picker, own), own.table)).query("snr == 'all'")
    assert set(told.phase) == {"P", "S"} and told.covered.between(0.89, 0.96).all(), "neither too narrow nor too wide"
    windows = onsets.take(parts["test"]).crops(15.0)
    found = match_picks(find_candidates(picker, windows), windows.table)
    told = coverage(picker, found, (0.0, 10.0, np.inf)).set_index(["phase", "snr"])
    mine = told.loc[[("P", "all"), ("P", "0 to 10"), ("P", "10 to inf"), ("S", "all")]]
    assert (mine.picks >= 25).all() and mine.picks["P", "all"] > 100
    assert ((mine.low <= 0.9) & (mine.high >= 0.9)).all(), told
    for factor in (0.1, 2.0):  # so many picks tell widths that are wrong
        wrong = tuple(one._replace(half_width=factor * one.half_width) for one in picker.config.intervals)
        picker.config, right = replace(picker.config, intervals=wrong), picker.config
        p = coverage(picker, found).set_index(["phase", "snr"]).loc["P", "all"]
        assert not p.low <= 0.9 <= p.high, (factor, p)
        picker.config = right


@pytest.mark.parametrize("tune", ("head", "last", "adapters", "all"))
def test_what_may_move_moves_and_nothing_else(onsets, tune):
    model = untrained(SMALL)
    fit = FitConfig(steps=3, batch_size=4, tune=tune, learning_rate=1e-2, rank=2)
    picker = train_picker(model, onsets, None, PickerConfig(window_length=10.0, width=8), fit)
    old, new = untrained(SMALL).state_dict(), picker.model.state_dict()
    assert set(old) == set(new), "adapters are folded in"
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    kept = model.state_dict()
    assert all(torch.equal(old[name], kept[name]) for name in old), "the model is left as it was"
    allowed = {"head": set(), "last": {"context_encoder"}, "adapters": {"context_encoder"}}
    assert moved == allowed[tune] if tune in allowed else {"feature_encoder", "context_encoder"} <= moved


def test_one_seed_is_one_picker(onsets):
    fit, config = FitConfig(steps=3, batch_size=4), PickerConfig(window_length=10.0, width=8)
    a, b = (train_picker(untrained(SMALL), onsets, None, config, fit).state_dict() for _ in range(2))
    other = train_picker(untrained(SMALL), onsets, None, config, replace(fit, seed=1)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.score.weight"], other["head.score.weight"])


def test_missing_components_and_lone_labels(onsets):
    "Vertical-only records and records without S teach without a NaN."
    few = onsets.take(np.arange(12))
    few.table["S"] = np.nan
    for record in few.records[:6]:
        record.data = record.data * np.array([[1.0], [0.0], [0.0]], dtype=np.float32)
        record.component_mask = np.array([True, False, False])
    picker = Picker(untrained(SMALL), PickerConfig(window_length=10.0, width=8))
    losses = fit_picker(picker, few, FitConfig(steps=4, batch_size=6))
    assert np.isfinite(losses).all() and all(p.isfinite().all() for p in picker.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("seisbench"), reason="no SeisBench: pip install 'gp2vec[seisbench]'")
def test_picks_move_less_than_phasenets(onsets):
    "The same records, budget and windows: averaged over a frame, picks change less when the window's start does."
    parts = {name: onsets.take(rows) for name, rows in split_parts(onsets.table).items()}
    config, fit, scores = PickerConfig(window_length=15.0), FitConfig(steps=150, batch_size=8, learning_rate=4e-3), {}
    for name, picker in (("gp2vec", Picker(untrained(SMALL), config)), ("PhaseNet", PhaseNetPicker(config))):
        fit_picker(picker, parts["train"], replace(fit, tune="all"))
        calibrate(picker, parts["dev"])
        picker.config = replace(picker.config, shifts=picker.stride)
        scores[name] = shift_score(shift_consistency(picker, parts["test"]))
    assert scores["gp2vec"]["rms (s)"] < scores["PhaseNet"]["rms (s)"], scores


# Commands


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    untrained(SMALL, 5).save_pretrained(folder)
    return folder


def test_evaluate_writes_tables_and_figures(files, model, tmp_path):
    lines = [
        "tasks: [phase, magnitude, picking]",
        "fractions: [0.2, 1.0]",
        "picking_fractions: [0.2, 1.0]",
        "seeds: [0, 1]",
        "resamples: 20",
    ]
    lines += ["shares: [0.5, 0.25, 0.25]", "never_test: [S01]", f"arms: [gp2vec, {CONTROL}, STA/LTA]"]
    lines += ["picker: {layer: 0, window_length: 12.0, width: 8}", "fit: {steps: 4, batch_size: 4}"]
    (tmp_path / "own.yaml").write_text("\n".join(lines))
    done = run("evaluate", model, files, "--settings", tmp_path / "own.yaml", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name for name in made if name.endswith(".md")} == {"phase.md", "magnitude.md", "picking.md"}
    for task in ("phase", "magnitude", "picking"):
        assert {f"{task}.csv", f"{task}.md", f"{task}.png", f"{task}-labels.png"} <= made
    assert {"picking-residuals.png", "picking-reliability.png"} <= made
    table = pd.read_csv(tmp_path / "out" / "picking.csv")
    assert set(table.arm) == {"gp2vec", CONTROL, "STA/LTA"} and (table[table.arm == CONTROL].gain.dropna() == 0).all()
    assert "P F1 0.1 s" in set(table.metric) and table.labels.nunique() == 2
    assert "magnitude, noise only" in set(pd.read_csv(tmp_path / "out" / "magnitude.csv").task)


def test_tasks_of_the_command_go_before_those_of_the_settings(files, model, tmp_path):
    (tmp_path / "own.yaml").write_text("tasks: [picking]\nfractions: [1.0]\nseeds: [0]\nresamples: 5\n")
    how = ("--task", "phase", "--settings", tmp_path / "own.yaml", "--output", tmp_path / "out")
    done = run("evaluate", model, files, *how)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.md")} == {"phase.md"}


def test_adapt_delivers_a_picker_and_a_verdict(files, model, tmp_path):
    table = pd.read_csv(files / "picks.csv")
    few = table[table.event_id.isin(table.event_id.unique()[:12])]
    few.to_csv(files / "few.csv", index=False)
    done = run("adapt", model, files / "few.csv", "--output", tmp_path, "--steps", 4, "--window-length", 12)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "curve.csv", "curve.png", "verdict.txt"} <= made
    assert not {name for name in made if name.endswith((".pkl", ".pt", ".ckpt", ".bin"))}
    assert "ot bother" in (tmp_path / "verdict.txt").read_text(), "four steps teach nothing, and it says so"
    assert Picker.from_pretrained(tmp_path).eval().curves(torch.randn(1, 3, 1200)).isfinite().all()


# Real labels


@pytest.mark.skipif(
    not (DATA / "labels" / "picks.csv").exists(), reason="no labels: GP2VEC_DATA names a folder with labels/picks.csv"
)
def test_real_labels_are_read_and_split():
    onsets = read_onsets(DATA / "labels")
    table = onsets.table
    assert len(onsets) == len(pd.read_csv(DATA / "labels" / "picks.csv")) and (table.time > 0).all()
    assert all(np.isfinite(record.data).all() for record in onsets.records)
    assert {record.component_mask.sum() for record in onsets.records} == {1, 3}
    picked = onsets.picked()
    parts = split_parts(picked.table, never_test=PRETRAINED_ON)
    assert not set(PRETRAINED_ON) & set(picked.table.station.iloc[parts["test"]])
    assert min(len(rows) for rows in parts.values()) >= 20, {name: len(rows) for name, rows in parts.items()}
    crops = picked.crops(20.0).table
    assert crops.P.std() > 3 and {"event", "noise"} == set(crops.label)
