"""The demo, from archive to report, as a user runs it, on the embedded data with a budget that teaches nothing."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from gp2vec.cli import main
from gp2vec.data.archive import read_manifest
from gp2vec.data.datapipes import verify_shards
from gp2vec.data.metadata import StationMetadataManager
from gp2vec.models.gp2vec import GP2Vec

STEPS = 6
FIGURES = ("windows", "masking", "curves", "codes", "embeddings", "probe")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A finished demo: its folder and what the command said."
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "gp2vec.cli", "demo", "--steps", str(STEPS), "--output", folder]
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=800)


def test_status_tells_that_nothing_was_learned(demo):
    folder, run = demo
    results = json.loads((folder / "results.json").read_text())
    assert run.returncode == (1 if results["complaints"] else 0), run.stderr
    assert results["complaints"], "six steps cannot be enough"
    assert "collapsed" in run.stdout or "guesses" in run.stdout


def test_leaves_everything_behind(demo):
    folder, run = demo
    assert (folder / "report.html").exists(), run.stderr
    manifest = read_manifest(folder / "manifest.parquet")
    assert {"XX", "BW", "MV"} <= set(manifest.network)
    assert len(StationMetadataManager.read(folder / "stations.parquet")) > 30
    for part in ("train", "val"):
        verify_shards(folder / "shards" / part)
    assert (folder / "checkpoints" / f"step={STEPS:09d}.ckpt").exists()
    assert GP2Vec.from_pretrained(folder / "model").config.embed_dim == 192
    steps = pd.read_csv(folder / "metrics.csv").step
    assert steps.max() == STEPS - 1, "rows are numbered from the first step, 0"


def test_report_is_one_file_with_all_pictures_and_a_verdict(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert 'src="http' not in page and "<link" not in page and "<script" not in page
    assert "synthetic" in page and "real" in page and "untrained gp2vec" in page and "95 % interval" in page
    for name in FIGURES:
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000


def test_counts_real_and_synthetic_windows(demo):
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text())
    kinds = {row["network"]: row["kind"] for row in results["windows"]}
    assert kinds["XX"] == "synthetic" and kinds["BW"] == "real"
    windows = sum(row["windows"] for row in results["windows"])
    assert windows == sum(part["windows"] for part in results["data"].values())


def test_second_run_reuses(demo):
    folder, _ = demo
    saved = folder / "checkpoints" / f"step={STEPS:09d}.ckpt"
    kept = [saved, folder / "shards" / "train" / "plan.json", folder / "metrics.csv"]
    before = [p.stat().st_mtime_ns for p in kept]
    assert main(["demo", "--steps", str(STEPS), "--output", str(folder)]) == 1
    assert [p.stat().st_mtime_ns for p in kept] == before


def test_other_settings_are_not_mixed_in(demo, capsys):
    folder, _ = demo
    assert main(["demo", "--steps", str(STEPS + 1), "--output", str(folder)]) == 2
    assert "--fresh" in capsys.readouterr().err
