"""A run that is killed goes on as if nothing had happened, to the last bit."""

import itertools
import os
import random
import signal
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import pytorch_lightning as pl
import smallrun
import torch
from training import differences

from gp2vec.data.datapipes import ShardDataset
from gp2vec.models.gp2vec import settings_to_dict
from gp2vec.train.pretraining import Pretraining, WindowData

# What a run can depend on: Gumbel noise, running codebooks, frozen codes, averages, accumulation, half precision.
RUNS = {
    "gumbel": {"ema_decay": 0.99},
    "ema": {"accumulate": 2, "batch_size": 4},
    "random_projection": {"precision": "bf16-mixed", "ema_decay": 0.9},
}
STEPS, EVERY, VALIDATE = 24, 3, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    smallrun.shards(folder)
    return folder


def begin(data, folder, kind, **changes) -> int:
    "A process that has imported everything already trains, or goes on."
    settings = {"steps": STEPS, "every": EVERY, "validate": VALIDATE} | RUNS[kind] | changes
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        errors = os.open(f"{folder}/errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(errors, 2)
        smallrun.train(str(data), str(folder), kind, **settings)
        os._exit(0)
    except BaseException:
        Path(folder, "traceback").write_text(traceback.format_exc())
        os._exit(1)


def end(pid, folder) -> bool:
    "Wait; whether the run came to its end, which only a kill may prevent."
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), Path(folder, "traceback").read_text()
    return status == 0


def complete(data, folder, kind, **changes):
    folder.mkdir()
    assert end(begin(data, folder, kind, **changes), folder)
    return folder


def lines(folder) -> int:
    path = folder / "diary"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_within(pid, folder, new_lines: int, seconds: float) -> bool:
    "Kill a run and its loading processes so many lines and seconds later; False where it was done before."
    start, limit = lines(folder), time.monotonic() + 60
    while lines(folder) < start + new_lines and time.monotonic() < limit:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.002)
    time.sleep(seconds)
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return False
    os.killpg(pid, signal.SIGKILL)
    return True


def same(folder, reference):
    "Every loss, rate, draw and validation, and all that the last checkpoint holds but the loops' own counters."
    assert smallrun.diary(folder) == smallrun.diary(reference)
    one, two = (torch.load(f / "last.ckpt", weights_only=True) for f in (folder, reference))
    for checkpoint in (one, two):
        checkpoint.pop("loops")
    assert not differences(one, two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_leave_no_trace(data, tmp_path):
    moments, kills, runs = random.Random(0), 0, 0  # noqa: S311
    references = {kind: complete(data, tmp_path / f"{kind}-whole", kind) for kind in RUNS}
    for kind in itertools.cycle(RUNS):
        if kills >= 20 and runs >= 3:
            break
        folder, done = tmp_path / f"{kind}-{runs}", False
        folder.mkdir()
        while not done:
            pid = begin(data, folder, kind, workers=moments.choice((0, 0, 1, 2)))
            if kills < 20:
                kill_within(pid, folder, moments.randrange(9), moments.uniform(0, 0.1))
            done = end(pid, folder)
            kills += not done
        same(folder, references[kind])
        runs += 1
    assert kills == 20 and runs >= 3


@pytest.mark.parametrize(
    ("validate", "every", "steps"),
    [(12, 4, 26), (0, 22, 26), (12, 4, 12)],
    ids=["every 12 steps", "at the end of an epoch", "behind the last step"],
)
def test_a_validation_that_was_due_is_not_skipped(data, tmp_path, validate, every, steps):
    "Killed in the middle of it, with a checkpoint of that very step."
    settings = {"validate": validate, "every": every, "steps": steps}
    reference = complete(data, tmp_path / "whole", "gumbel", **settings)
    folder = tmp_path / "killed"
    folder.mkdir()
    step = validate or 22
    assert not end(begin(data, folder, "gumbel", **settings, die=f"val {step}"), folder)
    assert ("train", step) in smallrun.diary(folder) and ("val", step) not in smallrun.diary(folder)
    assert end(begin(data, folder, "gumbel", **settings), folder)
    assert ("val", step) in smallrun.diary(folder)
    same(folder, reference)


def test_data_without_a_position_begin_anew_and_say_so(data, tmp_path):
    windows = [ShardDataset(f"{data}/val", shuffle=False)[i] for i in range(16)]
    for steps, path in ((2, None), (4, tmp_path / "last.ckpt")):
        task = Pretraining(settings_to_dict(smallrun.model("gumbel", 0.0)), {"max_steps": steps})
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        expected = pytest.warns(UserWarning, match="do not know their position") if path else nullcontext()
        with expected:
            trainer.fit(task, WindowData(windows, windows, 4), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.global_step == 4
