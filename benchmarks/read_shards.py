"""Read windows back from a local shard: ShardDataset beside webdataset, and litdata where it is installed.

All give batches of 32 through a PyTorch DataLoader, in this process: waveforms (32, 3, 3000) float32, masks, scales,
times, ids and metadata. Ours cuts them from float16 segments and normalises them; the peers read ready windows, a tar
of npy and JSON in float32 (equal to ours) or in float16 (half the bytes, rounded once more).
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import numpy as np
import torch
import webdataset
from obspy import Stream, Trace, UTCDateTime
from torch.utils.data import DataLoader

from gp2vec.data.archive import build_manifest, write_archive
from gp2vec.data.datapipes import METADATA_KEYS, SeismicDataPipeline, ShardDataset

try:
    import litdata
except ImportError:
    litdata = None

BATCH = 32


def archive(folder: Path, stations: int, hours: float) -> Any:
    "A manifest of stations that recorded noise at 100 Hz, three components each."
    random, stream = np.random.default_rng(0), Stream()
    for i in range(stations):
        for channel in ("HHZ", "HHN", "HHE"):
            data = random.normal(0, 300, round(hours * 360_000)).round().astype(np.int32)
            header = {"network": "XX", "station": f"S{i:02d}", "channel": channel, "sampling_rate": 100.0}
            stream += Trace(data, header | {"starttime": UTCDateTime(2020, 1, 1)})
    return build_manifest(write_archive(folder, stream))


def write_peer(path: Path, samples: list[dict], dtype: str) -> None:
    "A tar of windows as webdataset has them: an npy and a JSON each."
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, sample in enumerate(samples):
            array = io.BytesIO()
            np.save(array, sample["waveform"].numpy().astype(dtype), allow_pickle=False)
            meta = {"mask": sample["component_mask"].tolist(), "log_scale": float(sample["log_scale"])}
            meta |= {"starttime": sample["starttime"], "id": sample["id"]}
            meta["metadata"] = {name: float(sample["metadata"][name]) for name in METADATA_KEYS}
            members = {"waveform.npy": array.getvalue(), "meta.json": json.dumps(meta).encode()}
            for name, data in members.items():
                info = tarfile.TarInfo(f"{i:08d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def sample_of(waveform: np.ndarray, meta: dict) -> dict:
    "A sample as ours are, from what a peer stores."
    return {
        "waveform": torch.from_numpy(waveform.astype(np.float32, copy=False)),
        "component_mask": torch.tensor(meta["mask"]),
        "log_scale": torch.tensor(meta["log_scale"], dtype=torch.float32),
        "starttime": meta["starttime"],
        "id": meta["id"],
        "metadata": {name: torch.tensor(meta["metadata"][name], dtype=torch.float32) for name in METADATA_KEYS},
    }


def peer_batches(urls: list[str]) -> Iterator[dict]:
    "Batches that webdataset reads."
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return iter(DataLoader(dataset.map(lambda s: sample_of(s["waveform.npy"], s["meta.json"])), BATCH))


def our_batches(dataset: ShardDataset) -> Iterator[dict]:
    "Batches that gp2vec reads."
    return iter(DataLoader(dataset, BATCH))


def drain(batches: Iterator[dict]) -> int:
    "Windows of all batches."
    return sum(len(batch["id"]) for batch in batches)


def equal(ours: Iterator[dict], peer: Iterator[dict], tolerance: float = 0.0) -> int:
    "Assert that two sides give the same; the number of windows."
    count = 0
    for one, two in zip(ours, peer, strict=True):
        if tolerance:
            assert (one["waveform"] - two["waveform"]).abs().max() <= tolerance * one["waveform"].abs().max()
        else:
            assert torch.equal(one["waveform"], two["waveform"])
        assert one["id"] == two["id"] and torch.equal(one["starttime"], two["starttime"])
        assert torch.equal(one["component_mask"], two["component_mask"])
        assert torch.equal(one["log_scale"].nan_to_num(7), two["log_scale"].nan_to_num(7))
        for name in METADATA_KEYS:
            assert torch.equal(one["metadata"][name].nan_to_num(7), two["metadata"][name].nan_to_num(7)), name
        count += len(one["id"])
    return count


def lit_copy(folder: Path, samples: list[dict]) -> str:
    "The windows as litdata stores them, float16 arrays and nothing else."
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for i, sample in enumerate(samples):
        writer.add_item(i, sample["waveform"].half())
    writer.done()
    writer.merge(num_workers=1)
    return str(folder)


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline = SeismicDataPipeline(archive(folder / "archive", 6, 4.0))
        dataset = pipeline.create_webdataset(1, folder / "shards", shuffle=False)
        samples = list(dataset)
        for name in ("float32", "float16"):
            write_peer(folder / f"{name}.tar", samples, name)
        sides = {
            "gp2vec": lambda: drain(our_batches(dataset)),
            "webdataset, float32": lambda: drain(peer_batches([str(folder / "float32.tar")])),
            "webdataset, float16": lambda: drain(peer_batches([str(folder / "float16.tar")])),
        }
        if litdata is not None:
            place = lit_copy(folder / "lit", samples)
            stream = litdata.StreamingDataset(place)
            sides["litdata, float16, arrays only"] = lambda: sum(len(b) for b in DataLoader(stream, BATCH))

        def gate(results: dict) -> str:
            assert len(set(results.values())) == 1, results
            equal(our_batches(dataset), peer_batches([str(folder / "float32.tar")]))
            count = equal(our_batches(dataset), peer_batches([str(folder / "float16.tar")]), 2**-10)
            return f"{count} windows, arrays and metadata equal (float16: within 2^-10 of a window's peak)"

        row = measure.compare("read windows back from a local shard", sides, options.rounds, gate, options.json)
        print({name: f"{len(samples) / side['cpu']:,.0f} windows/s/core" for name, side in row["sides"].items()})


if __name__ == "__main__":
    main()
