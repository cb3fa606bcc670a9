"""What a run takes from its settings, what it leaves, and what it refuses or says aloud."""

import os
import shutil
import time

import pandas as pd
import pytest
import yaml
from training import begin, end, settings, write_shards

from gp2vec.models.gp2vec import GP2Vec
from gp2vec.train import train
from gp2vec.train.pretraining import Pretraining
from gp2vec.train.train import compose, main, read_settings

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "An archive, and the shards that a first run of two steps leaves."
    return write_shards(tmp_path_factory.mktemp("data"))


def ran(arguments, log, status=0) -> str:
    "What a run says; it ends with this status."
    assert end(begin(arguments, log)) == status, log.read_text()[-3000:]
    return log.read_text()


def test_settings_of_shards_that_are_there(data, tmp_path):
    "What cannot be met any more is said, once; what was not asked for is not."
    asked = settings(data, tmp_path / "run", 1, "data.archive=''")
    assert "taken as they are" not in ran(asked[: asked.index("data.held_out=0.25")] + [
        a for a in asked if a.startswith(("data.batch", "data.num", "train.", "data.archive=''", "data.dir", "output"))
    ], tmp_path / "plain")  # fmt: skip
    text = ran([*asked, "data.processing.highpass=5", "data.networks=[QQ]"], tmp_path / "log")
    assert text.count("are taken as they are, whatever is set of data.networks, data.held_out") == 1
    assert "data.processing.highpass=5.0 (they have 1.0)" in text


def test_shards_that_were_removed_are_made_anew(data, tmp_path):
    "Their archive is named."
    asked = [*settings(data, tmp_path / "run", 1), f"data.directory={tmp_path / 'prepared'}"]
    shards = tmp_path / "prepared" / "shards"
    for _ in range(2):
        ran(asked, tmp_path / "log")
        assert list((shards / "train").glob("*.tar"))
        shutil.rmtree(shards)


def test_a_refused_run_leaves_the_settings_of_the_good_one(data, tmp_path):
    "They are what its checkpoints were made with."
    run, log = tmp_path / "run", tmp_path / "log"
    ran(settings(data, run, 2), log)
    before = (run / "config.yaml").read_text()
    assert "another output" in ran(settings(data, run, 4, "model.num_negatives=50", "train.log_every=2"), log, 2)
    ran(settings(data, run, 2, "train.optimizer.lr=0.1"), log)  # complete
    assert (run / "config.yaml").read_text() == before
    ran(settings(data, run, 3, "train.optimizer.lr=0.001"), log)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["optimizer"]["lr"] == 0.001


def test_an_export_is_of_its_own_run(data, tmp_path):
    "The model of another run that wrote there before gives way."
    run, log = tmp_path / "run", tmp_path / "log"
    for width in (32, 16):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        ran(settings(data, run, 2, "train.export_every=2", f"model.embed_dim={width}"), log)
        assert GP2Vec.from_pretrained(run / "exports" / "step=000000002").config.embed_dim == width


def test_the_last_validation_is_in_the_table(data, tmp_path):
    "Also where epochs end a run in the middle of an interval; and once, however often the command is repeated."
    run, log = tmp_path / "run", tmp_path / "log"
    asked = settings(data, run, 1000, "train.max_epochs=1", "train.validate_every=10000")
    for _ in range(2):
        ran(asked, log)
        table = pd.read_csv(run / "metrics.csv")
        assert table.val_loss.count() == 1 and table.val_loss.iloc[-1] > 0


def test_a_validation_does_not_count_as_slow_training(data, tmp_path):
    "The clock of the throughput stands still in it."
    look = Pretraining.validation_step

    def look_long(self, batch, batch_idx):
        time.sleep(4 * (batch_idx == 0))
        return look(self, batch, batch_idx)

    asked = settings(data, tmp_path / "run", 12, "train.validate_every=3", "train.log_every=3")
    before = lambda: setattr(Pretraining, "validation_step", look_long)  # noqa: E731
    assert end(begin(asked, tmp_path / "log", before)) == 0, (tmp_path / "log").read_text()[-3000:]
    speeds = pd.read_csv(tmp_path / "run" / "metrics.csv").windows_per_second.dropna()
    assert len(speeds) == 4 and speeds[1:].min() > 10, "3 steps of 8 windows, and 4 s of validation between"


def test_memory_can_be_saved_half_way(data, tmp_path):
    "Activation checkpointing changes no weight."
    run, log = tmp_path / "run", tmp_path / "log"
    ran(settings(data, run, 2), log)
    ran(settings(data, run, 4, "model.context_encoder.checkpointing=true"), log)
    assert "goes on after step 2" in log.read_text()


def test_a_run_whose_checkpoints_are_all_corrupt(data, tmp_path):
    "To go on is not offered, since the same command would end alike."
    run, log = tmp_path / "run", tmp_path / "log"
    ran(settings(data, run, 2), log)
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"rotten")
    text = ran(settings(data, run, 4), log, 2)
    assert "none of 1 checkpoints verifies" in text and "the same command goes on" not in text


def test_ground_motion_and_probe(data, tmp_path):
    "Windows in m/s beside a probe whose labels have no responses."
    more = ("train.probe_every=2", "data.processing.output=VEL", "data.processing.pre_filt=[0.5,1,8,9.5]")
    run, directory = tmp_path / "run", f"data.directory={tmp_path / 'prepared'}"
    ran([*settings(data, run, 2, *more), directory], tmp_path / "log")
    assert pd.read_csv(run / "metrics.csv").probe_auc.count() > 0


def test_metadata_can_be_withheld(monkeypatch, tmp_path):
    "All of it."

    class Told(Exception):
        "What the model is to be made of."

    def told(data):
        raise Told

    seen = []
    monkeypatch.setattr(train, "replace", lambda thing, **new: seen.append(new) or thing)
    monkeypatch.setattr(train, "prepare", told)
    config = read_settings(compose("config", ["model=tiny", "data.metadata.enabled=false"]))
    with pytest.raises(Told):
        train.run(config)
    untold = seen[0]
    assert untold["fields"] == ("log_scale",) and untold["response"] is False
    assert all(untold[name] == () for name in ("networks", "bands", "sensors", "dataloggers", "stations"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["checkpoints=gs://bucket/run"], "checkpoints is a folder or s3://…, not gs://bucket/run"),
        (["checkpoints=s3:"], "checkpoints is a folder or s3://…, not s3:"),
        (["train.trainer.strategy=fsdp2", "model.context_encoder.layer_drop=0.1"], "set layer_drop to 0"),
    ],
)
def test_what_cannot_be_is_refused_before_data_are_made(changes, said, capsys):
    assert main([*changes, "model=tiny", "--cfg=job"]) == 2 and said in capsys.readouterr().err


def test_numbers_from_the_environment(monkeypatch):
    "They are text."
    monkeypatch.setenv("NNODES", "2")
    config = read_settings(compose("config", ["train.trainer.num_nodes=${oc.env:NNODES}"]))
    assert config.train.trainer.num_nodes == 2
