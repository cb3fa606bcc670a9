"""Find more like this on the Ridgecrest hours: embeddings beside template matching and STA/LTA.

usage: python benchmarks/search.py DATA [--model gp2vec-tiny] [--queries 10] [--output benchmarks/published/search]

DATA holds `buckets/`, in it the CI stations of 4 July 2019 around the M6.4 earthquake. What is searched for is known
from stations that are not searched: eight REFERENCE stations say what happened, and the others are asked. Questions:

- repeats: the same waveform, by network-wide template matching at the reference stations;
- same place: P comes to the reference stations in the query's pattern, whatever the waveform;
- any earthquake: five reference stations have an onset at about the same time.

A method ranks the moments of a station's record by likeness to a query; a find is right where a wanted event begins,
each event once. Around the query itself nothing is found and nothing is wanted. Average precision counts what is
missed; it is averaged over stations, then over queries, which are drawn with replacement for the 95 % intervals. The
queries for repeats, and those for one place, are of different families. Times are CPU seconds of one thread.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from measure import cpu_time, machine
from obspy import Stream, UTCDateTime
from obspy.signal.cross_correlation import correlate_template
from obspy.signal.trigger import aic_simple, recursive_sta_lta, trigger_onset
from scipy.signal import find_peaks

from gp2vec.data.preprocessing import PreprocessingConfig, Window, prepare, read_miniseed, segments, windows
from gp2vec.inference import cosine, embed
from gp2vec.models.gp2vec import GP2Vec
from gp2vec.train.probes import handcrafted, untrained

KEYS = "buckets/scedc-pds/continuous_waveforms/2019/2019_185"
REFERENCE = "DTP MPM SRT WBM WNM WOR WRV2 WVP2".split()
ASKED = {"never heard": "CCC WBS WMF".split(), "heard in training": "JRC2 LRL SLA WRC2".split()}  # by gp2vec-tiny
ORIGIN = UTCDateTime("2019-07-04T17:33:49")  # of the M6.4 earthquake, whose P gives the stations' delays
BAND = PreprocessingConfig(highpass=1.0, lowpass=10.0)  # for whatever is no network
LENGTH, HOP, BEFORE = 10.0, 1.0, 1.0  # s: of a window, from window to window, from its start to P
WINDOWS = PreprocessingConfig(window_length=LENGTH, overlap=1 - HOP / LENGTH)
ONSETS, SPREAD = 5, 2.5  # stations that make an event; s that its onsets may differ by when delays are taken off
MADS, NEAR = 15.0, 0.2  # least height of a repeat in the stack; s between patterns of one place at most stations
APART = 10.0  # s between finds
SLACK = {"repeats": 1.5, "same place": 1.5, "any earthquake": SPREAD}  # s between a find and what it found
FAMILY = 2  # least number of events that a query wants


def read(data: Path) -> dict[str, Stream]:
    "The record of each station."
    found = {}
    for station in REFERENCE + sum(ASKED.values(), []):
        paths = sorted((data / KEYS).glob(f"CI{station:_<5}H*"))
        found[station] = sum((read_miniseed(p.read_bytes()) for p in paths), Stream())
    return found


def banded(stream: Stream) -> np.ndarray:
    "The record of a station in the band, (3, N)."
    (part,) = segments(stream)[0]
    return prepare(part, BAND).data.astype(float)


def onsets(vertical: np.ndarray, rate: float) -> np.ndarray:
    "Where something begins, s."
    ratio = recursive_sta_lta(vertical, round(0.5 * rate), round(10 * rate))
    found, reach = [], round(1.5 * rate)
    for first, _ in trigger_onset(ratio, 3.0, 1.5):
        low = max(first - reach, 0)
        found.append((low + aic_simple(vertical[low : first + reach // 3]).argmin()) / rate)
    return np.array(found)


@dataclass
class Known:
    "What the reference stations noticed; times are seconds of the record, less the delay of a station."

    time: np.ndarray  # of each event, (n,)
    pattern: np.ndarray  # onset at each station less that, NaN where there is none, (n, stations)


def known(noticed: list[np.ndarray]) -> Known:
    "Moments at which enough stations have an onset."
    times, rows, last = [], [], -np.inf
    for first in np.sort(np.concatenate(noticed)):
        if first < last + LENGTH:  # an onset so soon may be S
            continue
        row = np.array([next((t for t in seen if first <= t < first + 2 * SPREAD), np.nan) for seen in noticed])
        if np.isfinite(row).sum() >= ONSETS:
            last = float(np.nanmedian(row))
            times.append(last)
            rows.append(row - last)
    return Known(np.array(times), np.array(rows))


def match(data: np.ndarray, first: int, samples: int) -> np.ndarray:
    "Correlation with a piece of the record, mean of the components, by first sample, (N - samples + 1,)."
    pieces = data[:, first : first + samples]
    return np.mean([correlate_template(row, p, mode="valid") for row, p in zip(data, pieces, strict=True)], axis=0)


def repeats(
    reference: list[np.ndarray],  # records, (3, N) each
    first: np.ndarray,  # sample at which the query begins in each
    rate: float,  # Hz
) -> tuple[np.ndarray, int]:  # lags, s, at which all see the query again; how often they see it upside down
    "Network-wide template matching."
    length = reference[0].shape[1]
    stack, origin = np.zeros(2 * length), length
    for data, begin in zip(reference, first, strict=True):
        likeness = match(data, begin, round(LENGTH * rate))
        stack[origin - begin : origin - begin + len(likeness)] += likeness / len(reference)
    height = MADS * np.median(np.abs(stack[origin - first.min() : origin - first.max() + length - 10 * round(rate)]))
    peaks = find_peaks(np.abs(stack), height=height, distance=round(LENGTH * rate))[0]
    peaks = peaks[np.abs(peaks - origin) > LENGTH * rate]
    return (peaks[stack[peaks] > 0] - origin) / rate, int((stack[peaks] < 0).sum())


def wanted(
    found: Known,  # events
    reference: list[np.ndarray],  # records, (3, N) each
    delay: np.ndarray,  # of their stations, s
    rate: float,  # Hz
) -> tuple[dict[str, list[np.ndarray]], int]:  # by question and event, lags in s; repeats upside down
    "What each event as a query wants."
    answers: dict[str, list[np.ndarray]] = {name: [] for name in SLACK}
    false = 0
    for time, pattern in zip(found.time, found.pattern, strict=True):
        difference = found.pattern - pattern
        shift = np.nanmedian(np.where(np.isfinite(difference).sum(1, keepdims=True) > 0, difference, np.inf), axis=1)
        far = np.nanquantile(np.abs(difference - shift[:, None]), 0.75, axis=1)
        same = (far <= NEAR) & (np.isfinite(difference).sum(1) >= ONSETS)
        first = np.rint((time + delay + np.nan_to_num(pattern) - BEFORE) * rate).astype(int)
        again, upside_down = repeats(reference, first, rate)
        false += upside_down
        lags = {
            "repeats": again,
            "same place": (found.time + shift - time)[same],
            "any earthquake": found.time - time,
        }
        for name, lag in lags.items():
            answers[name].append(lag[np.abs(lag) > LENGTH])
    return answers, false


def chosen(time: np.ndarray, lags: list[np.ndarray], number: int) -> list[int]:
    "The events that want most, none of which another one wants."
    queries, taken = [], np.empty(0)
    for i in sorted(range(len(time)), key=lambda i: (-len(lags[i]), i)):
        family = np.append(time[i] + lags[i], time[i])
        if len(lags[i]) >= FAMILY and len(queries) < number and not (np.abs(taken - time[i]) <= APART).any():
            queries.append(i)
            taken = np.append(taken, family)
    return queries


@dataclass
class Method:
    "A way to search a station's record."

    name: str
    archive: float  # CPU time spent before any question, s
    ask: Callable[[int], tuple[np.ndarray, np.ndarray]]  # first sample of a query -> starts, s; scores


def by_vectors(name: str, make: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Method:
    "Cosine to the query's window; `make` gives starts of windows, s, and their vectors."
    begin = cpu_time()
    start, vectors = make()
    vectors = vectors - vectors.mean(0)
    spent, place = cpu_time() - begin, np.rint(start / HOP).astype(int)

    def ask(first):
        score = np.full(place.max() + 1, -1.0)  # where no window is, nothing is found
        score[place] = cosine(vectors, vectors[np.abs(start - first / BAND.sampling_rate).argmin()])
        return np.arange(len(score)) * HOP, score

    return Method(name, spent, ask)


def embedded(model: GP2Vec, stream: Stream, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    "Starts, s, and vectors of a model."
    found = embed(model, stream, WINDOWS, layer=layer)
    return (found.table.starttime.to_numpy() - min(t.stats.starttime.ns for t in stream)) / 1e9, found.vectors


def by_hand(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    "Starts, s, and handcrafted features, each to its own scale."
    (part,) = segments(stream)[0]
    found = [w for w in windows(part, WINDOWS) if isinstance(w, Window)]
    features = handcrafted(np.stack([w.waveform for w in found]), WINDOWS.sampling_rate)
    return np.array([w.starttime - part.starttime for w in found]) / 1e9, features / features.std(0)


def methods(stream: Stream, models: dict[str, GP2Vec]) -> Iterator[Method]:
    "Every way to search a record."
    rate = BAND.sampling_rate
    begin = cpu_time()
    data = banded(stream)
    filtered = cpu_time() - begin
    samples = round(LENGTH * rate)

    def correlate(first):
        score = match(data, first, samples)
        return np.arange(len(score)) / rate, score

    yield Method("template matching", filtered, correlate)
    begin = cpu_time()
    ratio = recursive_sta_lta(data[0], round(rate), round(10 * rate))  # the vertical, or S would be highest
    spent = filtered + cpu_time() - begin
    # The ratio is highest about half its short window after P.
    yield Method("STA/LTA", spent, lambda first: (np.arange(len(ratio)) / rate - 0.5 - BEFORE, ratio))
    yield by_vectors("handcrafted", lambda: by_hand(stream))
    for name, model in models.items():
        for depth, layer in (("layer 0", 0), ("last layer", None)):
            yield by_vectors(f"{name}, {depth}", lambda m=model, at=layer: embedded(m, stream, at))
    rng, start = np.random.default_rng(0), np.arange(0, data.shape[1] / rate - LENGTH, HOP)
    yield Method("blind", 0.0, lambda first: (start, rng.uniform(size=len(start))))


def average_precision(start: np.ndarray, score: np.ndarray, query: float, want: np.ndarray, slack: float) -> float:
    "Sum over the right finds, best first, of the precision down to each, divided by the number of what is wanted."
    peaks = find_peaks(score, distance=round(APART / (start[1] - start[0])))[0]
    peaks = peaks[np.abs(start[peaks] - query) > LENGTH]
    left, total, right = want.copy(), 0.0, 0
    for rank, at in enumerate(start[peaks[np.argsort(-score[peaks], kind="stable")]], 1):
        near = np.abs(left - at)
        if (near <= slack).any():
            left, right = np.delete(left, near.argmin()), right + 1
            total += right / rank
    return total / len(want)


def named(names: str, values: pd.Series, draws: int = 1000) -> dict[str, float]:
    "Mean and 95 % interval over queries drawn with replacement, under these names."
    x = values.to_numpy()
    drawn = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    return dict(zip(names.split(), (x.mean(), *np.quantile(x[drawn].mean(1), (0.025, 0.975))), strict=True))


def search(method: Method, firsts: dict[int, int], queries: dict[str, list[int]], want: dict[str, list]) -> list[dict]:
    "A row for each question and query."
    rows, rate = [], BAND.sampling_rate
    for query, first in firsts.items():
        begin, times = cpu_time(), 20 if method.name == "blind" else 1
        answers = [method.ask(first) for _ in range(times)]
        spent = (cpu_time() - begin) / times
        for question, asked in queries.items():
            if query in asked:
                lags, at = want[question][query], first / rate
                precision = [average_precision(*answer, at, at + lags, SLACK[question]) for answer in answers]
                row = {"question": question, "method": method.name, "query": query, "wanted": len(lags)}
                rows.append(row | {"precision": np.mean(precision), "archive": method.archive, "ask": spent})
    return rows


def summary(rows: pd.DataFrame, control: str) -> pd.DataFrame:
    "A row for each question, group of stations and method, with intervals over queries."
    made = []
    for (question, stations), part in rows.groupby(["question", "stations"], sort=False):
        # a row per query, the mean of the stations
        table = part.pivot_table(index="query", columns="method", values="precision", sort=False)
        size = part.groupby("query").wanted.first()
        for name, values in table.items():
            row = {"question": question, "stations": stations, "method": name, "queries": len(table)}
            row |= {"wanted": size.mean()} | named("precision low high", values)
            # gp2vec beside its untrained twin, whatever else beside template matching
            other = str(name).replace("gp2vec", "untrained") if "gp2vec" in str(name) else control
            made.append(row | {"over": other} | named("gain gain_low gain_high", values - table[other]))
    return pd.DataFrame(made)


def written(table: pd.DataFrame, times: pd.DataFrame, notes: list[str], output: Path) -> None:
    "The table as CSV and, with what it is worth, as Markdown."
    output.parent.mkdir(parents=True, exist_ok=True)
    joined = table.merge(times, on="method")
    joined.to_csv(output.with_suffix(".csv"), index=False, float_format="%.3f")
    lines = ["# search", "", *notes, ""]
    lines += [
        "| question | stations | method | average precision | 95 % interval | gain | 95 % interval | over |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in table.itertuples():
        lines.append(
            f"| {r.question} | {r.stations} | {r.method} | {r.precision:.3f} | {r.low:.3f} to {r.high:.3f} "
            f"| {r.gain:+.3f} | {r.gain_low:+.3f} to {r.gain_high:+.3f} | {r.over} |"
        )
    lines += ["", "| method | archive, CPU s per hour | question, CPU s per hour |", "|---|---|---|"]
    lines += [f"| {r.method} | {r.archive:.3f} | {r.ask:.4f} |" for r in times.itertuples() if r.archive > 0]
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="gp2vec-tiny", help="folder or name of a pretrained model")
    parser.add_argument("--queries", type=int, default=10, help="of each question, at most")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/published/search"), help="without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GP2Vec.from_pretrained(options.model).eval()
    models = {"gp2vec": model, "untrained": untrained(model.config).eval()}
    streams, rate = read(options.data), BAND.sampling_rate
    zero = min(t.stats.starttime for stream in streams.values() for t in stream)

    data = {station: banded(stream) for station, stream in streams.items()}
    noticed = {station: onsets(x[0], rate) for station, x in data.items()}
    # P of the large earthquake comes seconds after its origin, and then nothing else can be seen for a while.
    delay = {station: seen[seen > ORIGIN - zero + 2][0] - (ORIGIN - zero) for station, seen in noticed.items()}
    found = known([noticed[s] - delay[s] for s in REFERENCE])
    later = np.array([delay[s] for s in REFERENCE])
    want, false = wanted(found, [data[s][:, ::2] for s in REFERENCE], later, rate / 2)
    queries = {q: chosen(found.time, want[q], options.queries) for q in ("repeats", "same place")}
    queries["any earthquake"] = sorted({i for asked in queries.values() for i in asked})
    for question, asked in queries.items():
        print(question, {round(float(found.time[i])): len(want[question][i]) for i in asked}, flush=True)

    rows = []
    for group, stations in ASKED.items():
        for station in stations:
            expected = found.time + delay[station]
            near = noticed[station][np.abs(noticed[station][:, None] - expected).argmin(0)]
            start = np.where(np.abs(near - expected) < SPREAD, near, expected) - BEFORE  # P as picked there
            firsts = {i: round(start[i] * rate) for i in queries["any earthquake"]}
            for method in methods(streams[station], models):
                made = search(method, firsts, queries, want)
                rows += [row | {"stations": group, "station": station} for row in made]
                print(station, method.name, f"{method.archive:.2f} s", flush=True)
    every = pd.DataFrame(rows)
    hours = data[REFERENCE[0]].shape[1] / rate / 3600
    times = every.groupby("method", sort=False)[["archive", "ask"]].mean() / hours
    total = sum(map(len, want["repeats"]))
    notes = [
        f"{len(found.time)} earthquakes that {ONSETS} of {len(REFERENCE)} reference stations noticed in "
        f"{60 * hours:.0f} minutes; as queries they have {total} repeats above {MADS:g} median absolute deviations "
        f"of the stacked correlation. Upside down, as no repeat is, {false} stand as high: so many may be false.",
        "",
        ", ".join(f"{len(asked)} queries for {question}" for question, asked in queries.items())
        + "; "
        + ", ".join(f"{group}: {' '.join(stations)}" for group, stations in ASKED.items())
        + f". {machine()}.",
    ]
    written(summary(every, "template matching"), times.reset_index(), notes, options.output)


if __name__ == "__main__":
    main()
