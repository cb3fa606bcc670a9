"""A small run from files of settings, in a process that is forked from one that has imported everything."""

import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch

from gp2vec.data.archive import write_archive
from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.train.checkpoints import Checkpoints
from gp2vec.train.train import main

MODEL = [
    "model=tiny",
    "model.embed_dim=32",
    "model.mask_span=0.4",
    "model.feature_encoder.conv_layers=[[16,11,2],[16,7,2],[16,5,2]]",
    "model.quantizer.codebook_size=16",
    "model.context_encoder={num_layers: 1, num_heads: 2, conv_pos: 8, conv_pos_groups: 4}",
]
RUN = [
    "data.processing.window_length=5",
    "data.held_out=0.25",
    "data.batch_size=8",
    "data.num_workers=0",
    "data.shard_size=100",
    "train.trainer={accelerator: cpu, devices: 1, precision: 32-true}",
    "train.probe_every=0",
    "train.log_every=1",
    "train.lr_scheduler.warmup_steps=5",
]


def settings(data: Path, run: Path, steps: int, *more: str) -> list[str]:
    "What to type for a run of so many steps on the archive in `data`."
    places = [f"data.archive={data / 'archive'}", f"data.directory={data / 'prepared'}", f"output={run}"]
    return [*MODEL, *RUN, *places, f"train.max_steps={steps}", *more]


def write_data(folder: Path) -> Path:
    "An archive of four synthetic stations, seven minutes each."
    network = synthetic_network(SyntheticConfig(stations=4, events=10, duration=400.0))
    write_archive(folder / "archive", network.stream, network.inventory)
    return folder


def begin(arguments: list[str], log: Path, before=lambda: None) -> int:
    "Run the command in a fork; its process id."
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)
        logging.getLogger().handlers.clear()  # pytest's
        torch.set_num_threads(1)
        before()
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(pid: int, timeout: float = 120.0) -> int:
    "Status of a process when it has ended, negative where a signal ended it; it is killed where it takes too long."
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} took longer than {timeout} s")


def write_shards(folder: Path) -> Path:
    "The archive, and the shards that a first run of two steps leaves."
    pid = begin(settings(write_data(folder), folder / "first", 2), folder / "log")
    assert end(pid) == 0, (folder / "log").read_text()
    return folder


def rows(run: Path) -> list[int]:
    "Steps of which there is a row in the table of metrics."
    path = run / "metrics.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame()
    return table.dropna(subset="train_loss").step.tolist() if "train_loss" in table else []


def wait_for(run: Path, count: int, pid: int, timeout: float = 60.0) -> None:
    "Wait for so many rows."
    deadline = time.monotonic() + timeout
    while len(rows(run)) < count and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)


def differences(one, two, path="") -> list[str]:
    "Where two checkpoints differ."
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, two) else [path]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{path}: names"]
        return [d for key in one for d in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [f"{path}: length"]
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if one == two else [path]


def last(run: Path) -> int | None:
    "Step of the last good checkpoint."
    return Checkpoints(run / "checkpoints").last()
