"""Shards of real recordings: all of 80 Hz and more in a folder of archives, and those that ship with gp2vec.

usage: python benchmarks/recordings.py DATA OUTPUT

DATA holds `buckets/` (objects under their archives' keys) and `stationxml/`. OUTPUT gets `manifest.parquet`,
`stations.parquet` and `shards/`, as `data.directory` of a run wants them. Recordings of unclear licence are left out.
"""

import argparse
from pathlib import Path

import pandas as pd

from gp2vec.data.archive import Archive, as_manifest, build_manifest, write_archive, write_manifest
from gp2vec.data.datapipes import ShardDataset, write_split
from gp2vec.data.embedded import real_inventory, real_recordings
from gp2vec.data.metadata import StationMetadataManager, as_station_table
from gp2vec.data.preprocessing import PreprocessingConfig

# No stated licence, and a source under the GPL: nothing that is published may be trained on them.
LEFT_OUT = ["TA.C26K", "NZ.BFZ"]


def station_table(data: Path, archives: dict[str, Archive], manifests: list[pd.DataFrame]) -> StationMetadataManager:
    "What is known of the stations: StationXML of the archives and of the folder beside them."
    tables = [
        StationMetadataManager.from_archive(a, m).table for a, m in zip(archives.values(), manifests, strict=True)
    ]
    tables.append(StationMetadataManager.from_files(str(data / "stationxml" / "*.xml")).table)
    table = pd.concat([t for t in tables if len(t)], ignore_index=True)
    keys = ["network", "station", "location", "channel", "starttime", "endtime"]
    return StationMetadataManager(as_station_table(table.drop_duplicates(keys)))


def write(data: Path, output: Path, highpass: float = 1.0) -> tuple[ShardDataset, ShardDataset]:
    "Shards of the recordings to learn from and of the stations held out, with manifest and station table."
    archives = {p.name: Archive(str(p)) for p in sorted((data / "buckets").iterdir())}
    write_archive(output / "embedded", real_recordings(), real_inventory())
    archives["embedded"] = Archive(str(output / "embedded"), "scedc")
    manifests = []
    for archive in archives.values():
        rows = [archive.layout.parse(key) for key in archive.find(archive.layout.folder)]
        manifests.append(build_manifest(archive, sorted({r["network"] for r in rows if r})))
    manifest = pd.concat(manifests)
    allowed = ~(manifest.network + "." + manifest.station).isin(LEFT_OUT)
    # Bands E and H hold 80 Hz and more. Of a slower recording, resampled, the upper half of every spectrum is empty,
    # so that one code fits all of its frames: a day of it would be half of everything, and teach nothing. Objects of
    # EarthScope hold all channels of a day and come along whole.
    manifest = manifest[allowed & ~manifest.channel.str.fullmatch("[^EH]..", na=False)]
    manifest, manager = as_manifest(manifest), station_table(data, archives, manifests)
    write_manifest(manifest, output / "manifest.parquet")
    manager.write(output / "stations.parquet")
    config = PreprocessingConfig(highpass=highpass, overlap=0.5)
    return write_split(manifest, manager, output / "shards", config, 0.15, 0, progress=False)[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    for name, dataset in zip(("learn from", "validate on"), write(options.data, options.output), strict=True):
        print(f"to {name}: {dataset.count} windows of {dataset.index.config.window_length:g} s")


if __name__ == "__main__":
    main()
