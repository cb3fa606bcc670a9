"""A small real pretraining run that writes down what it does, for tests that interrupt it or share it among processes.

`python smallrun.py SETTINGS` takes the arguments of `train` as JSON; under torchrun every process calls it alike."""

import json
import logging
import os
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytorch_lightning as pl
import torch
from obspy import Stream, Trace, UTCDateTime
from torch.utils.data import IterableDataset

from gp2vec.data.archive import build_manifest, write_archive
from gp2vec.data.augment import AugmentConfig
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset
from gp2vec.data.preprocessing import PreprocessingConfig
from gp2vec.models.conditioning import ConditioningConfig
from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2VecConfig, settings_to_dict
from gp2vec.models.quantizer import QuantizerConfig
from gp2vec.models.transformer import ContextConfig
from gp2vec.train.pretraining import Pretraining, WindowData


def shards(folder) -> None:
    "Shards of 5 s windows of noise with a wandering level: 180 to learn from, 20 held out."
    numbers = np.random.default_rng(0)
    for part, seconds in (("train", 306), ("val", 54)):
        stream = Stream()
        for station in range(3 if part == "train" else 2):
            for channel in ("HHZ", "HHN", "HHE"):
                data = numbers.normal(0, 1000, seconds * 100).cumsum().round().astype(np.int32)
                codes = {"network": "XX", "station": f"{part[0].upper()}{station}", "channel": channel}
                stream += Trace(data, codes | {"sampling_rate": 100, "starttime": UTCDateTime(2020, 1, 1)})
        manifest = build_manifest(write_archive(Path(folder) / f"archive-{part}", stream))
        pipeline = SeismicDataPipeline(manifest, config=PreprocessingConfig(window_length=5.0, highpass=0.0))
        pipeline.create_webdataset(40, Path(folder) / part, progress=False)


def model(kind: str, dropout: float) -> GP2VecConfig:
    "A model of the kind `gumbel`, `ema` or `random_projection`, so small that a step takes milliseconds."
    return GP2VecConfig(
        embed_dim=32,
        objective="masked_prediction" if kind == "random_projection" else "contrastive",
        mask_span=0.4,
        num_negatives=20,
        feature_encoder=EncoderConfig(conv_layers=tuple(ConvLayer(16, kernel, 2) for kernel in (11, 7, 5))),
        quantizer=QuantizerConfig(kind, num_codebooks=2, codebook_size=16, codevector_dim=16, spectral_window=0.32),
        context_encoder=ContextConfig(
            num_layers=2, num_heads=2, conv_pos=8, conv_pos_groups=4, dropout=dropout, layer_drop=dropout / 2
        ),
        conditioning=replace(ConditioningConfig(), hidden_dim=8, dropout=dropout),
    )


class Diary(pl.Callback):
    "Writes every loss to the last bit, and draws from all generators as a careless callback might."

    def __init__(self, folder, die: str = "", on_rank: int = 0):
        self.folder, self.die, self.on_rank = Path(folder), die, on_rank

    def write(self, trainer, *words):
        if trainer.is_global_zero:
            with open(self.folder / "diary", "a") as file:
                file.write(" ".join(map(str, words)) + "\n")

    def moment(self, trainer, name):
        "The end, if it is time."
        if self.die == f"{name} {trainer.global_step}" and trainer.global_rank == self.on_rank:
            os.kill(os.getpid(), 9)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.moment(trainer, "train")
        if trainer.world_size == 1 and (self.folder / "keys").exists():
            with open(self.folder / "keys", "a") as file:
                file.write(json.dumps([trainer.global_step, batch["keys"]]) + "\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.callback_metrics["train_loss"].double().item()
        drawn = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        words = (
            "train",
            trainer.fit_loop.total_batch_idx + 1,
            loss.hex(),
            rate.hex(),
            drawn.hex(),
            len(outputs["codes"]),
        )
        self.write(trainer, *words)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.moment(trainer, "val")

    def on_validation_end(self, trainer, pl_module):
        found = {n: v.double().item() for n, v in trainer.callback_metrics.items() if n.startswith("val_")}
        self.write(trainer, "val", trainer.global_step, *(f"{n}={v.hex()}" for n, v in sorted(found.items())))


class Save(pl.Callback):
    "A checkpoint every so often, whole or not at all."

    def __init__(self, folder, every: int):
        self.path, self.every = Path(folder) / "last.ckpt", every

    def on_train_start(self, trainer, pl_module):
        self.done = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if (step % self.every == 0 or step == trainer.max_steps) and step != self.done:
            self.done = step
            trainer.save_checkpoint(f"{self.path}.part")
            if trainer.is_global_zero:
                os.replace(f"{self.path}.part", self.path)


class Uneven(IterableDataset):
    "A stream of which each process after the first has ten windows more."

    def __init__(self, shards):
        self.shards = shards

    def __iter__(self):
        yield from (self.shards[i] for i in range(20 + 10 * torch.distributed.get_rank()))


def train(
    data: str,
    folder: str,
    kind: str = "gumbel",
    steps: int = 60,
    every: int = 5,
    dropout: float = 0.1,
    batch_size: int = 8,
    workers: int = 0,
    accumulate: int = 1,
    validate: int = 15,  # 0: once an epoch
    precision: str = "32-true",
    strategy: str = "auto",
    devices: int = 1,
    die: str = "",
    on_rank: int = 0,
    stream: bool = False,
    **settings,
) -> Pretraining:
    "Train, or go on from the checkpoint in `folder`."
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    usual = {"max_steps": steps, "gradient_clip": 1.0, "optimizer": {"lr": 2e-3, "name": "adamw"}}
    usual |= {"mask_ramp": (0.7, 1.0), "lr_scheduler": {"warmup_steps": 5}} | settings
    task = Pretraining(settings_to_dict(model(kind, dropout)), usual, settings_to_dict(AugmentConfig()))
    learned, held_out = ShardDataset(f"{data}/train", seed=3), ShardDataset(f"{data}/val", shuffle=False)
    windows = WindowData(Uneven(learned) if stream else learned, held_out, batch_size, workers)
    often = {"check_val_every_n_epoch": None, "val_check_interval": validate * accumulate} if validate else {}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, precision=precision, max_steps=steps,
        max_epochs=2 if stream else 1000,
        gradient_clip_val=usual["gradient_clip"], accumulate_grad_batches=accumulate, num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1, callbacks=[Diary(folder, die, on_rank), Save(folder, every)],
        **often, **dict.fromkeys(quiet, False),
    )  # fmt: skip
    last = Path(folder) / "last.ckpt"
    trainer.fit(task, windows, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return task


def diary(folder) -> dict[tuple[str, int], str]:
    "What happened at each step; a step that was done again must have happened alike."
    found: dict[tuple[str, int], str] = {}
    counts: dict[tuple[str, int], int] = {}
    for line in (Path(folder) / "diary").read_text().splitlines():
        what, step, said = line.split(" ", 2)
        key = (what, int(step))
        assert found.setdefault(key, said) == said, f"{key} happened twice, and differently"
        counts[key] = counts.get(key, 0) + 1
    return found


def losses(folder) -> list[float]:
    return [float.fromhex(said.split()[0]) for (what, _), said in sorted(diary(folder).items()) if what == "train"]


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
