"""Two processes learn what one learns, cannot wait for each other for ever, and end together."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import smallrun
import torch

# One process with batches of 8, or two with batches of 4; dropout is the one thing that cannot be alike.
SETTINGS = {"steps": 12, "every": 6, "validate": 6, "dropout": 0, "ema_decay": 0.9}
SENTENCE = "one process of this run has failed or was killed"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    smallrun.shards(folder)
    return folder


def processes(data, folder, strategy="auto", **changes) -> list[int]:
    "One process, or two that know of each other as under torchrun; they have imported everything already."
    folder.mkdir(exist_ok=True)
    world = 1 if strategy == "auto" else 2
    settings = {"devices": world, "batch_size": 8 // world} | SETTINGS | {"strategy": strategy} | changes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                sys.stderr = open(f"{folder}/said", "a", buffering=1)  # noqa: SIM115
                logging.basicConfig(stream=sys.stderr, force=True)
                if world > 1:
                    mine = {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "GROUP_RANK": "0",
                        "TORCHELASTIC_RUN_ID": "test",
                    }
                    os.environ.update(place | mine)
                smallrun.train(str(data), str(folder), **settings)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    return pids


def ended(pids, folder, seconds=100) -> list[int]:
    "Exit codes; a process that hangs is an error."
    codes, limit = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            pytest.fail("a process hangs: " + (folder / "said").read_text()[-2000:])
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run(data, folder, strategy="auto", **changes):
    "From beginning to end."
    codes = ended(processes(data, folder, strategy, **changes), folder)
    assert not any(codes), (folder / "said").read_text()[-3000:]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    "Runs of one process."
    folders = {}
    for kind in ("gumbel", "ema"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        run(data, folders[kind], kind=kind)
    return folders


def validations(folder) -> dict[str, float]:
    "Metrics of the last validation."
    said = [words for (what, _), words in sorted(smallrun.diary(folder).items()) if what == "val"][-1]
    return {name: float.fromhex(value) for name, value in (word.split("=") for word in said.split())}


def agree(folder, reference, steps=SETTINGS["steps"]):
    "Losses and validations of 1e-5."
    one, two = smallrun.losses(folder), smallrun.losses(reference)
    assert len(one) == len(two) == steps
    assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=0)
    mine, others = validations(folder), validations(reference)
    for name in ("val_answer_loss", "val_accuracy", "val_perplexity", "val_chance"):
        assert mine[name] == pytest.approx(others[name], rel=1e-4), name


# Codebooks of running averages see the windows of both processes, or their codes would differ at once.
@pytest.mark.parametrize(
    ("kind", "strategy"), [("gumbel", "ddp"), ("ema", "ddp"), ("gumbel", "fsdp2"), ("ema", "fsdp2")]
)
def test_two_processes_learn_what_one_learns(data, alone, tmp_path, kind, strategy):
    run(data, tmp_path, strategy, kind=kind)
    agree(tmp_path, alone[kind])
    one, two = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path, alone[kind]))
    for part in ("state_dict", "current_model_state"):
        assert one[part].keys() == two[part].keys()
        for name, value in two[part].items():
            assert one[part][name].shape == value.shape, "whole weights, whoever held them"
    if kind == "ema":
        name = "model.quantizer.counts"
        assert torch.allclose(one["state_dict"][name], two["state_dict"][name], rtol=1e-4)


def later_losses(folder) -> list[float]:
    "The losses of each step, where those of the last life count."
    found = {}
    for line in (Path(folder) / "diary").read_text().splitlines():
        if match := re.match(r"train (\d+) (\S+)", line):
            found[int(match[1])] = float.fromhex(match[2])
    return [found[step] for step in sorted(found)]


def equal_losses(folder, reference):
    one, two = torch.tensor(later_losses(folder)), torch.tensor(smallrun.losses(reference))
    assert torch.allclose(one, two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_other_and_one_goes_on_alone(data, alone, tmp_path, strategy):
    pids, begin = processes(data, tmp_path, strategy, die="train 8", on_rank=1), time.monotonic()
    os.waitpid(pids[1], 0)
    killed = time.monotonic()
    assert ended(pids[:1], tmp_path) == [1] and time.monotonic() - killed < 30, begin
    assert SENTENCE in (tmp_path / "said").read_text()
    run(data, tmp_path)
    equal_losses(tmp_path, alone["gumbel"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_one_process_stops_and_two_go_on(data, alone, tmp_path, strategy):
    assert ended(processes(data, tmp_path, die="train 8"), tmp_path) == [-signal.SIGKILL]
    run(data, tmp_path, strategy)
    equal_losses(tmp_path, alone["gumbel"])


def test_an_average_may_begin_half_way(data, tmp_path):
    "With the weights of the checkpoint, however they are dealt out; and end, without a trace of it."
    for strategy in ("ddp", "fsdp2"):
        folder = tmp_path / strategy
        run(data, folder, strategy, ema_decay=0)
        run(data, folder, strategy, ema_decay=0.5, steps=14)
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        apart = [(saved["state_dict"][k] - v).abs().max() for k, v in saved["current_model_state"].items()]
        assert 0 < max(apart) < 0.02, strategy
        run(data, folder, strategy, ema_decay=0, steps=16)
        assert "current_model_state" not in torch.load(folder / "last.ckpt", weights_only=True), strategy


def test_a_process_killed_under_torchrun_ends_the_job_and_it_goes_on_as_if_nothing_had_been(data, tmp_path):
    settings = SETTINGS | {"data": str(data), "strategy": "ddp", "devices": 2, "batch_size": 4}
    run(data, tmp_path / "whole", "ddp")
    folder = tmp_path / "killed"
    folder.mkdir()

    def torchrun(**changes):
        what = [str(Path(__file__).with_name("smallrun.py")), json.dumps(settings | {"folder": str(folder)} | changes)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *what]
        result = subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=100)
        return result.returncode, result.stderr

    code, said = torchrun(die="train 8", on_rank=1)
    assert code and time.time() - (folder / "diary").stat().st_mtime < 30
    assert "SIGKILL" in said or "exitcode  : -9" in said
    run(data, folder, "ddp")
    assert smallrun.diary(folder) == smallrun.diary(tmp_path / "whole")


def test_uneven_data_hang_nobody(data, tmp_path):
    "Streams of which one process has more: both end with the shorter one."
    run(data, tmp_path, "ddp", stream=True, steps=1000, validate=1000)
    assert len(smallrun.losses(tmp_path)) == 2 * 5, "two epochs of five steps, 20 windows in batches of 4"
