"""A run that is told to stop, or loses a process or its memory: it ends in time, says what to do, and goes on."""

import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from project import few_or_many
from training import begin, end, last, rows, settings, wait_for, write_data

from gp2vec.train.pretraining import Pretraining
from gp2vec.train.train import Saving

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")
STEPS = 400
IMPORTS = 20  # s that a new process may take to import everything on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "An archive, and the shards that a first run of two steps leaves."
    folder = write_data(tmp_path_factory.mktemp("data"))
    pid = begin(settings(folder, folder / "first", 2), folder / "log")
    assert end(pid) == 0, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@few_or_many(3, 20)
def test_told_to_stop(data, tmp_path, name, count):
    "Told again and again, at any moment, to stop: it saves its step and ends with 75; no step is lost or done twice."
    run, log, numbers = tmp_path / "run", tmp_path / "log", random.Random(f"{name} 0")
    for _ in range(count):
        before = len(rows(run))
        pid = begin(settings(data, run, STEPS, "train.checkpoint_every=0"), log)
        wait_for(run, before + 1, pid)
        time.sleep(numbers.uniform(0, 0.15))
        os.kill(pid, getattr(signal, name))
        assert end(pid, 30) == 75, log.read_text()[-3000:]
        assert rows(run) == list(range(last(run))), "saved at the step it was at"
    assert len(rows(run)) < STEPS, "the stops came before the end"
    assert log.read_text().count("the same command goes on") == count


def test_interrupted_run_is_the_uninterrupted_one(data, tmp_path):
    "Losses and weights are those of a run that nobody stopped."
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert end(begin(settings(data, whole, 20), tmp_path / "log")) == 0
    for count in (3, 9, 14):
        pid = begin(settings(data, stopped, 20, "train.checkpoint_every=0"), tmp_path / "log")
        wait_for(stopped, count, pid)
        os.kill(pid, signal.SIGTERM)
        assert end(pid, 30) == 75, (tmp_path / "log").read_text()[-3000:]
    assert end(begin(settings(data, stopped, 20), tmp_path / "log")) == 0
    losses = [pd.read_csv(r / "metrics.csv").dropna(subset="train_loss").train_loss.tolist() for r in (whole, stopped)]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_told_to_stop_in_the_middle_of_a_validation(data, tmp_path):
    "It does not wait for the end of it, and begins it anew."
    whole, stopped, log, look = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log", Pretraining.validation_step

    def look_and_be_told(self, batch, batch_idx):
        assert batch_idx == 0, "told before the first batch, gone before the second"
        os.kill(os.getpid(), signal.SIGTERM)
        return look(self, batch, batch_idx)

    often = ("train.validate_every=3", "train.checkpoint_every=0", "data.batch_size=4")
    assert end(begin(settings(data, whole, 7, *often), log)) == 0
    asked = settings(data, stopped, 7, *often)
    pid = begin(asked, log, before=lambda: setattr(Pretraining, "validation_step", look_and_be_told))
    assert end(pid, 30) == 75 and last(stopped) == 3, log.read_text()[-3000:]
    assert end(begin(asked, log)) == 0
    columns = ["step", "train_loss", "val_loss", "val_accuracy"]
    tables = [pd.read_csv(run / "metrics.csv")[columns].dropna(thresh=2) for run in (whole, stopped)]
    assert tables[0].val_loss.count() == 2 and tables[0].reset_index(drop=True).equals(tables[1].reset_index(drop=True))


def test_before_it_learns_nothing_is_lost(data, tmp_path):
    "While it still looks for shards a signal ends it as it would any program, and the next begins."
    run, log = tmp_path / "run", tmp_path / "log"
    pid = begin(settings(data, run, 4), log)
    time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    assert end(pid, 30) in (-signal.SIGTERM, 75)
    assert end(begin(settings(data, run, 4), log)) == 0, log.read_text()[-3000:]
    assert rows(run) == [0, 1, 2, 3]


def test_loading_process_is_killed(data, tmp_path):
    "As the kernel does where memory is short: the run ends within 30 s, says so, and goes on."
    run, log = tmp_path / "run", tmp_path / "log"
    asked = settings(data, run, STEPS, "data.num_workers=2", "train.checkpoint_every=5")
    pid = begin(asked, log)
    wait_for(run, 8, pid)
    children = psutil.Process(pid).children()
    assert len(children) >= 2, log.read_text()[-3000:]
    children[0].kill()
    started = time.monotonic()
    assert end(pid, 60) == 1 and time.monotonic() - started < 30
    said = log.read_text()
    assert "a process was killed" in said and "the same command goes on" in said and "Traceback" not in said
    saved = last(run)
    assert saved >= 5
    pid = begin([*asked, f"train.max_steps={saved + 3}"], log)
    assert end(pid) == 0 and rows(run) == list(range(saved + 3)), log.read_text()[-3000:]


def test_probes_before_a_stop_stay_in_the_table(data, tmp_path):
    "The one at the very step that the run goes on from, too."
    run, log = tmp_path / "run", tmp_path / "log"
    for steps in (3, 6):
        assert end(begin(settings(data, run, steps, "train.probe_every=3"), log)) == 0, log.read_text()[-3000:]
    assert pd.read_csv(run / "metrics.csv").dropna(subset="probe_auc").step.tolist() == [0, 2, 5]


def test_killed_right_after_a_save(data, tmp_path):
    "The checkpoint is there, and so are the metrics of its step."
    run, log, save = tmp_path / "run", tmp_path / "log", Saving._save

    def save_and_die(self, trainer):
        save(self, trainer)
        if self.saved == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    asked = settings(data, run, 13, "train.checkpoint_every=5")
    pid = begin(asked, log, before=lambda: setattr(Saving, "_save", save_and_die))
    assert end(pid) == -signal.SIGKILL and last(run) == 10, log.read_text()[-3000:]
    assert end(begin(asked, log)) == 0 and rows(run) == list(range(13)), log.read_text()[-3000:]


def test_memory_is_short(data, tmp_path):
    "A limit on memory ends the run within 30 s with a status that is not 0, and what was saved is good."
    run, log = tmp_path / "run", tmp_path / "log"
    assert end(begin(settings(data, run, 5), log)) == 0

    program = """import resource, sys, psutil
from gp2vec.train.train import main
most = psutil.Process().memory_info().vms + 48 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(main(sys.argv[1:]))"""
    asked = [*settings(data, run, STEPS), "data.batch_size=100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, "-c", program, *asked], stdout=file, stderr=file, env=environment)
    started = time.monotonic()
    assert process.wait(60) not in (0, 75) and time.monotonic() - started < 30 + IMPORTS, log.read_text()[-3000:]
    assert last(run) == 5
    assert end(begin(settings(data, run, 8), log)) == 0 and rows(run) == list(range(8)), log.read_text()[-3000:]
