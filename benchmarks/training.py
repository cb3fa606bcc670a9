"""Pretraining from shards beside the model's bare steps on tensors that are ready, and by two processes beside one.

usage: python benchmarks/training.py [--rounds 3] [--steps 12] [--batch 16]

First row, `tiny`, one thread: `Pretraining` under Lightning, with what watches a run, on windows from local shards; the
same on one batch that is always there; and a loop with nothing but forward, backward, clipping and the optimiser's
step on that batch. The data path should not cost more than a twentieth of the bare loop's speed, Lightning and we
together not more than 3 %. Second row: as many steps by two processes (gloo, one thread each); twice as many, the same
windows, by one; and two runs that know nothing of each other, which is the best that two processes can do here. Their
clocks start after two steps, when processes have found each other and dealt out their gradients. It wants two quiet
cores.
"""

import copy
import logging
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from read_shards import archive
from torch.utils.data import default_collate

from gp2vec.data.augment import sample_keys
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset
from gp2vec.models.gp2vec import GP2VecConfig, settings_to_dict
from gp2vec.train.callbacks import CollapseAlarm, Guard, Throughput
from gp2vec.train.pretraining import Pretraining, TrainConfig, WindowData, build_optimizer, questions, rate_factor

CLIP = 1.0
FIRST = 2  # steps before the clocks of processes start


class Again:
    "One batch, over and over."

    def __init__(self, batch: dict[str, Any], count: int):
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


class Ready(WindowData):
    "One batch, over and over, from no loader at all."

    batch: dict[str, Any]

    def train_dataloader(self) -> Any:
        return Again(self.batch, int(self.epoch_batches))


class Losses(pl.Callback):
    "The loss of every step, and when it was done by CPU and wall, s."

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self.times: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(outputs["loss"].detach())
        self.times.append((time.process_time(), time.perf_counter()))


def fresh(steps: int, calibration: tuple[torch.Tensor, torch.Tensor] | None = None) -> Pretraining:
    "An untrained model; calibrated, if it has been done before."
    train = settings_to_dict(TrainConfig(max_steps=steps, max_epochs=9999, gradient_clip=CLIP))
    task = Pretraining(settings_to_dict(GP2VecConfig.preset("tiny")), train)
    if calibration:
        task.model.quantizer.mean.copy_(calibration[0]), task.model.quantizer.std.copy_(calibration[1])
    return task


def learn(task: Pretraining, data: WindowData, steps: int, folder: Path, **options: Any) -> Losses:
    "A run under Lightning with what watches it."
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    notes = Losses()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=9999, gradient_clip_val=CLIP, log_every_n_steps=10,
        callbacks=[Guard(), CollapseAlarm(), Throughput(), notes], logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, reload_dataloaders_every_n_epochs=1, **options,
    )  # fmt: skip
    trainer.fit(task, data)
    return notes


def bare(task: Pretraining, batch: dict[str, Any], keys: list[int], steps: int) -> list[float]:
    "Losses of the same steps in a loop of their own."
    task.model.train()
    optimizer = build_optimizer(task.model, task.config.optimizer, fused=True)
    settings, losses = task.config.lr_scheduler, []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(settings, step, steps))
    mask = questions(task.model, keys, batch["waveform"].shape[-1])["mask"]
    for _ in range(steps):
        torch.manual_seed(sum(keys) % 2**63)  # of what is left out at random, as `Pretraining` does
        known = (batch["metadata"], batch["component_mask"], batch["log_scale"])
        loss = task.model(batch["waveform"], *known, mask).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def from_shards(dataset: ShardDataset, folder: Path, steps: int, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    "The first row; returns the calibration, which is no part of a step."
    val = ShardDataset(dataset.store.url(""), shuffle=False)
    ready = Ready(dataset, val, options.batch)
    ready.batch = batch = default_collate([val[i] for i in range(options.batch)])
    template = fresh(steps)
    learn(template, WindowData(dataset, val, options.batch), 1, folder)
    calibration = copy.deepcopy((template.model.quantizer.mean, template.model.quantizer.std))
    keys = sample_keys(template.config.seed, 0, batch["starttime"], batch["id"]).tolist()

    def lightning(data: WindowData) -> list[float]:
        return [float(loss) for loss in learn(fresh(steps, calibration), data, steps, folder).found]

    sides = {
        "gp2vec from shards": lambda: lightning(WindowData(dataset, val, options.batch)),
        "gp2vec, tensors ready": lambda: lightning(ready),
        "bare loop, tensors ready": lambda: bare(fresh(steps, calibration), batch, keys, steps),
    }

    def gate(results: dict[str, list[float]]) -> str:
        mine, theirs = torch.tensor(results["gp2vec, tensors ready"]), torch.tensor(results["bare loop, tensors ready"])
        apart = float((mine / theirs - 1).abs().max())
        assert apart < 1e-4, apart
        assert len(results["gp2vec from shards"]) == steps
        return f"on the same tensors the same {steps} losses, to {apart:.0e}"

    row = measure.compare(f"pretraining, tiny, B {options.batch}", sides, options.rounds, gate, options.json)
    shards, same, loop = (side["cpu"] for side in row["sides"].values())
    print(f"  {loop / shards:.3f} of the bare loop's speed, {100 * (same / loop - 1):+.1f} % beside Lightning and us")
    print(f"  {options.batch * steps / shards:.1f} windows/s from shards")
    return calibration


def process(
    rank: int | str, port: int, url: str, steps: int, batch: int, calibration: Any, folder: Path
) -> tuple[float, float, float]:
    "A run in this process, alone or one of two: the sum of its weights, CPU and wall time after its first steps, s."
    torch.set_num_threads(1)
    data = WindowData(ShardDataset(url), ShardDataset(url, shuffle=False), batch)
    options: dict[str, Any] = {}
    if isinstance(rank, int):
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        options = {"devices": 2, "strategy": "ddp"}
    task = fresh(FIRST + steps, calibration)
    times = learn(task, data, FIRST + steps, folder / str(rank), **options).times
    cpu, wall = (last - first for first, last in zip(times[FIRST - 1], times[-1], strict=True))
    return float(sum(p.detach().double().sum() for p in task.parameters())), cpu, wall


def two_processes(url: str, folder: Path, steps: int, calibration: Any, options: Any, stack: ExitStack) -> None:
    "The second row."
    with_port = 20_000 + os.getpid() % 20_000
    names: tuple[int | str, ...] = (0, 1, "alone", "beside")
    pools = {rank: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for rank in names}

    def run(ranks: tuple[int | str, ...], steps: int) -> measure.Timed:
        work = (with_port, url, steps, options.batch, calibration, folder)
        done = [future.result() for future in [pools[rank].submit(process, rank, *work) for rank in ranks]]
        weights, cpu, wall = zip(*done, strict=True)
        return measure.Timed(weights, sum(cpu), max(wall))

    def gate(results: dict[str, tuple[float, ...]]) -> str:
        first, second = results["two processes"]
        assert first == second, (first, second)
        return f"both processes end with the same weights after {FIRST + steps} steps of {options.batch} windows each"

    run((0, 1), 1), run(("alone", "beside"), 1)
    sides = {
        "two processes": lambda: run((0, 1), steps),
        "one process": lambda: run(("alone",), 2 * steps),
        "two runs": lambda: run(("alone", "beside"), steps),
    }
    row = measure.compare("pretraining: one process, two processes", sides, options.rounds, gate, options.json)
    print(f"  {row['sides']['one process']['wall_ratio']:.2f} times as fast with two processes")


def main() -> None:
    options = measure.parser(__doc__, 3, steps=12, batch=16).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        pipeline = SeismicDataPipeline(archive(folder / "archive", 6, 1.0))
        dataset = pipeline.create_webdataset(300, folder / "shards", progress=False)
        calibration = from_shards(dataset, folder, options.steps, options)
        two_processes(str(folder / "shards"), folder, options.steps, calibration, options, stack)


if __name__ == "__main__":
    main()
