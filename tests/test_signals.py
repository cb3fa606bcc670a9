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
import torch
from project import few_or_many
from training import begin, differences, end, last, rows, settings, wait_for, write_shards

from gp2vec.train import callbacks, train
from gp2vec.train.checkpoints import Checkpoints
from gp2vec.train.pretraining import Pretraining
from gp2vec.train.train import Saving

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")
STEPS = 400
IMPORTS = 20  # s that a new process may take to import everything on a busy machine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "An archive, and the shards that a first run of two steps leaves."
    return write_shards(tmp_path_factory.mktemp("data"))


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_all_processes_of_a_job_are_told_to_stop(data, tmp_path, name):
    "As SLURM and a terminal do: those that load batches go on, the step is saved, and the run goes on after it."
    run, log = tmp_path / "run", tmp_path / "log"
    asked = settings(data, run, STEPS, "data.num_workers=2", "train.checkpoint_every=0")
    pid = begin(asked, log, before=os.setsid)
    wait_for(run, 2, pid)
    assert len(psutil.Process(pid).children()) >= 2, log.read_text()[-3000:]
    os.killpg(pid, getattr(signal, name))
    assert end(pid, 60) == 75, log.read_text()[-3000:]
    assert rows(run) == list(range(last(run)))
    with pytest.raises(ProcessLookupError):  # nobody is left of the job
        for _ in range(100):
            os.killpg(pid, 0)
            time.sleep(0.1)
    done = last(run)
    assert end(begin([*asked, f"train.max_steps={done + 3}"], log)) == 0, log.read_text()[-3000:]
    assert rows(run) == list(range(done + 3))


def test_interrupted_run_is_the_uninterrupted_one(data, tmp_path):
    "Losses, weights and all else in the last checkpoint are those of a run that nobody stopped."
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
    saved = [Checkpoints(r / "checkpoints").load() for r in (whole, stopped)]
    for checkpoint in saved:
        checkpoint.pop("loops")  # Lightning's counters of batches, which begin anew
    assert saved[0]["global_step"] == 20 and "model.mask_embedding" in saved[0]["state_dict"]
    assert not differences(*saved)


CHANGED = {
    "data.augmentation.enabled=false": "train.max_steps=8 (was 6), data.augmentation.enabled=False (was True)",
    "data.batch_size=4": "a step takes 4 windows and took 8 when the run was interrupted",
    "train.trainer.accumulate_grad_batches=2": "a step takes 16 windows and took 8 when the run was interrupted",
    "train.optimizer.lr=1e-5": "than it began with: train.optimizer.lr=1e-05 (was 0.0005), train.max_steps=8 (was 6)",
    "train.lr_scheduler.warmup_steps=2": "than it began with: train.lr_scheduler.warmup_steps=2 (was 5), ",
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_that_goes_on_as_another_says_so(data, tmp_path, change):
    "Once, in one sentence; the same run says nothing, and a new learning rate is the one it goes on with."
    run, log = tmp_path / "run", tmp_path / "log"
    assert end(begin(settings(data, run, 4, "train.max_epochs=9"), log)) == 0, log.read_text()[-3000:]
    assert end(begin(settings(data, run, 4), log)) == 0, log.read_text()[-3000:]
    assert "than it began with" not in log.read_text() and "was interrupted" not in log.read_text()
    assert end(begin(settings(data, run, 6), log)) == 0, log.read_text()[-3000:]
    assert log.read_text().count("than it began with: train.max_steps=6 (was 4)\n") == 1, "schedules run over them"
    assert end(begin(settings(data, run, 8, change), log)) == 0, log.read_text()[-3000:]
    assert log.read_text().count(CHANGED[change]) == 1, log.read_text()[-3000:]
    rates = pd.read_csv(run / "metrics.csv").filter(like="lr-").dropna().iloc[:, 0].tolist()
    if "optimizer.lr" in change:
        assert max(rates[6:8]) <= 1e-5 < min(rates[1:3])


HOPELESS = {
    "the codes have collapsed": lambda: setattr(callbacks, "MIN_PERPLEXITY", 1e9),
    "10 steps in a row had no finite loss": lambda: setattr(Pretraining, "training_step", infinite(Pretraining)),
}


def infinite(cls):
    step = cls.training_step

    def no_number(self, batch, batch_idx):
        found = step(self, batch, batch_idx)
        return found | {"loss": found["loss"] * float("inf")}

    return no_number


@pytest.mark.parametrize("said", HOPELESS)
def test_what_would_end_alike_is_not_tried_again(data, tmp_path, said):
    "Status 2, which stops Kubernetes, one sentence, and no word of going on."
    run, log = tmp_path / "run", tmp_path / "log"
    assert end(begin(settings(data, run, STEPS), log, before=HOPELESS[said])) == 2, log.read_text()[-3000:]
    text = log.read_text()
    assert text.count(f"gp2vec: {said}") == 1 and "the same command goes on" not in text and "Traceback" not in text


@pytest.mark.parametrize("steps", [7, 3], ids=["half-way", "behind the last step"])
def test_told_to_stop_in_the_middle_of_a_validation(data, tmp_path, steps):
    "It does not wait for the end of it, and begins it anew."
    whole, stopped, log, look = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log", Pretraining.validation_step

    def look_and_be_told(self, batch, batch_idx):
        assert batch_idx == 0, "told before the first batch, gone before the second"
        os.kill(os.getpid(), signal.SIGTERM)
        return look(self, batch, batch_idx)

    often = ("train.validate_every=3", "train.checkpoint_every=0", "data.batch_size=4")
    assert end(begin(settings(data, whole, steps, *often), log)) == 0
    asked = settings(data, stopped, steps, *often)
    pid = begin(asked, log, before=lambda: setattr(Pretraining, "validation_step", look_and_be_told))
    assert end(pid, 30) == 75 and last(stopped) == 3, log.read_text()[-3000:]
    assert end(begin(asked, log)) == 0
    columns = ["step", "train_loss", "val_loss", "val_accuracy"]
    tables = [pd.read_csv(run / "metrics.csv")[columns].dropna(thresh=2) for run in (whole, stopped)]
    assert tables[0].val_loss.count() == -(-steps // 3) and tables[0].reset_index(drop=True).equals(
        tables[1].reset_index(drop=True)
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_told_to_stop_just_before_the_first_step(data, tmp_path, name):
    "As while the first probe is fitted: it has nothing to save, and ends as a run that goes on."
    run, log = tmp_path / "run", tmp_path / "log"

    def be_told(self, trainer, pl_module):
        os.kill(os.getpid(), getattr(signal, name))

    asked = settings(data, run, 4)
    pid = begin(asked, log, before=lambda: setattr(callbacks.CollapseAlarm, "on_train_start", be_told))
    assert end(pid, 30) == 75, log.read_text()[-3000:]
    assert f"told to stop by {name} while no step is under way" in log.read_text() and last(run) is None
    assert end(begin(asked, log)) == 0 and rows(run) == [0, 1, 2, 3], log.read_text()[-3000:]


def test_told_to_stop_in_the_closing_validation(data, tmp_path):
    "All is saved, and the same command validates anew."
    run, log, look = tmp_path / "run", tmp_path / "log", Pretraining.validation_step

    def be_told(self, batch, batch_idx):
        if self.trainer.state.fn == "validate":
            os.kill(os.getpid(), signal.SIGTERM)
        return look(self, batch, batch_idx)

    asked = settings(data, run, 4)
    assert end(begin(asked, log, before=lambda: setattr(Pretraining, "validation_step", be_told)), 30) == 75
    assert last(run) == 4 and "the same command goes on" in log.read_text()
    assert end(begin(asked, log)) == 0, log.read_text()[-3000:]


def test_asked_at_the_keyboard(data, tmp_path):
    "Ctrl-C reaches all processes of a terminal: the step is saved. Asked again, the run ends at once."
    run, log = tmp_path / "run", tmp_path / "log"
    asked = settings(data, run, STEPS, "train.checkpoint_every=0", "data.num_workers=2")
    pid = begin(asked, log, before=os.setsid)
    wait_for(run, 2, pid)
    os.killpg(pid, signal.SIGINT)
    assert end(pid, 60) == 75, log.read_text()[-3000:]
    assert rows(run) == list(range(last(run)))

    def be_asked_twice(self, batch, batch_idx):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    pid = begin(asked, log, before=lambda: setattr(Pretraining, "training_step", be_asked_twice))
    assert end(pid, 60) not in (0, 75), log.read_text()[-3000:]


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "said",
    [
        "DataLoader worker (pid 17) is killed by signal: Killed. ",
        "[enforce fail at alloc_cpu.cpp:113] err == 0. DefaultCPUAllocator: can't allocate memory",
        "could not create a primitive",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:17: Connection reset by peer.",
        "NCCL communicator was aborted on rank 0.",
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
)
def test_a_lost_process_and_full_memory_are_no_fault_of_the_program(said, monkeypatch, tmp_path, capsys):
    "Status 1 and a sentence; whatever else a library complains of keeps its traceback."

    def fail(error):
        def run(config, callbacks):
            raise error

        monkeypatch.setattr(train, "run", run)
        return train.main([f"output={tmp_path}"])

    error = said if isinstance(said, Exception) else RuntimeError(said)
    wrapped = TypeError("unsupported callable")  # as `inspect` says of whatever is raised while it looks
    wrapped.__cause__ = error
    assert fail(wrapped) == 1 and capsys.readouterr().err.startswith("gp2vec: a process was killed")
    assert fail(error) == 1
    err = capsys.readouterr().err
    assert err.startswith("gp2vec: a process was killed or found no memory") and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_memory_is_short(data, tmp_path):
    "A limit on memory ends the run within 30 s with status 1 and a sentence, and what was saved is good."
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
    assert process.wait(60) == 1 and time.monotonic() - started < 30 + IMPORTS, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text and text.count("the same command goes on from the last checkpoint") == 1, text[
        -3000:
    ]
    assert "memory" in text.splitlines()[-1] and last(run) == 5
    assert end(begin(settings(data, run, 8), log)) == 0 and rows(run) == list(range(8)), log.read_text()[-3000:]
