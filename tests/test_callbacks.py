"""What watches a run, in real runs of a small model: broken windows, spikes, collapsed codes, two processes, half
precision; and that watching changes nothing."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import free_ports
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import Dataset

from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig, settings_to_dict
from gp2vec.train.callbacks import (
    CollapseAlarm,
    CollapsedCodes,
    Figures,
    Guard,
    OnlineProbe,
    PeriodicExport,
    Throughput,
)
from gp2vec.train.pretraining import Pretraining, TrainConfig, WindowData
from gp2vec.train.probes import LabelledWindows

pytestmark = pytest.mark.filterwarnings("ignore")

MASKED = {
    "embed_dim": 48,
    "objective": "masked_prediction",
    "feature_penalty": 0.0,
    "feature_encoder": {"conv_layers": [[32, 11, 2], [32, 7, 2], [32, 5, 2]]},
    "quantizer": {"type": "random_projection", "num_codebooks": 1, "codebook_size": 64, "codevector_dim": 16},
    "context_encoder": {"num_layers": 1, "num_heads": 6, "conv_pos": 16, "dropout": 0.0},
}
MEANS = MASKED | {  # codebooks that are moving averages of frames
    "objective": "contrastive",
    "num_negatives": 10,
    "quantizer": {"type": "ema", "num_codebooks": 2, "codebook_size": 32, "codevector_dim": 32},
}


class Windows(Dataset):
    "Wavelets in noise, six seconds each; `change` may spoil some."

    def __init__(self, count=64, change=None, pause=0.0):
        random = np.random.default_rng(0)
        self.waveforms = random.normal(size=(count, 3, 600)).astype(np.float32)
        for i, onset in enumerate(random.integers(50, 300, count)):
            shape = np.exp(-np.arange(300) / 60) * np.sin(np.arange(300) * random.uniform(0.1, 1.5))
            self.waveforms[i, :, onset : onset + 300] += 5 * random.normal(size=(3, 1)) * shape
        for i, spoil in (change or {}).items():
            spoil(self.waveforms[i])
        self.pause = pause

    def __len__(self):
        return len(self.waveforms)

    def set_epoch(self, epoch):
        "An order of its own: as it is."

    def __getitem__(self, i):
        time.sleep(self.pause)
        return {
            "waveform": torch.from_numpy(self.waveforms[i]),
            "component_mask": torch.ones(3, dtype=torch.bool),
            "id": f"XX.S{i:02d}",
            "starttime": 1_577_836_800_000_000_000 + i * 10**9,
            "log_scale": torch.tensor(0.0),
            "metadata": {"elevation": torch.tensor(float("nan"))},
        }


class Task(Pretraining):
    "`Pretraining` whose windows may break on the device, where nobody leaves them out, and whose loss may be spoiled."

    broken = ()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        for i, name in enumerate(batch["id"]):
            if name in self.broken:
                batch["waveform"][i, 1, 200] = torch.nan
        return batch

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        return found | {"loss": self.spoil(found["loss"])}

    def spoil(self, loss):
        return loss


def lost(waveform):
    waveform[1, 200] = np.nan


def task(cls=Task, model=MASKED, broken=(), **train):
    settings = settings_to_dict(TrainConfig(**{"max_steps": 8} | train))
    made = cls(settings_to_dict(GP2VecConfig.from_dict(model)), settings)
    made.broken = {f"XX.S{i:02d}" for i in broken}
    return made


def fit(module, callbacks, folder, windows=None, steps=8, batch=4, **trainer):
    "Train; the trainer."
    pl.seed_everything(0, verbose=False)
    data = WindowData(windows or Windows(), Windows(8), batch)
    options = {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1, "accelerator": "cpu"}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    made = pl.Trainer(max_steps=steps, callbacks=callbacks, default_root_dir=folder, **options | trainer)
    made.fit(module, data)
    return made


class States(pl.Callback):
    "Copies of everything that a step may change, after every step."

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        everything = [*pl_module.state_dict().values(), *moments]
        self.seen.append([v.detach().clone() for v in everything])


def said(caplog):
    "What our callbacks logged."
    return [record.getMessage() for record in caplog.records if record.name == "gp2vec.train.callbacks"]


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def whole(tensor):
    "All of a tensor that may be dealt out to processes."
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def finite(module):
    return all(bool(whole(v).isfinite().all()) for v in module.state_dict().values())


@pytest.mark.parametrize("model", [MASKED, MEANS], ids=["frozen codes", "moving averages"])
def test_broken_windows_cost_their_step_and_nothing_else(tmp_path, caplog, model):
    guard, states = Guard(), States()
    module = task(model=model, broken=(9, 10, 22))  # two of the third step, one of the sixth
    fit(module, [guard, states], tmp_path)
    assert guard.skipped == 2 and guard.in_a_row == 0 and finite(module)
    stayed = [same(before, after) for before, after in zip(states.seen, states.seen[1:], strict=False)]
    assert stayed == [False, True, False, False, True, False, False], "weights, moments and codebooks stay as they were"
    first, second = said(caplog)
    names = ", ".join(f"XX.S{i:02d} at 2020-01-01T00:00:{i:02d}.000000000" for i in (8, 9, 10, 11))
    assert first == f"step 2 has a loss of nan and a gradient of norm nan and is skipped; its windows: {names}"
    assert "step 5" in second and "XX.S22" in second and "XX.S12" not in second
    table = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    assert table["skipped_steps"].tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert np.isfinite(table["gradient_norm"]).tolist() == [True, True, False, True, True, False, True, True]


def test_without_a_guard_one_window_is_enough_to_lose_everything(tmp_path):
    module = task(broken=[9])
    fit(module, [], tmp_path)
    assert not any(p.isfinite().all() for p in module.model.context_encoder.parameters())


def test_windows_that_arrive_broken_never_get_that_far(tmp_path, caplog):
    guard, module = Guard(), task()
    fit(module, [guard, Figures(every=4)], tmp_path, Windows(change={9: lost, 10: lost}))
    assert guard.skipped == 0 and finite(module) and not said(caplog)
    assert "left out, for samples that are no numbers: XX.S09" in caplog.text


def test_a_run_of_nothing_else_stops_with_its_weights_finite(tmp_path, caplog):
    guard, module = Guard(max_bad_steps=3), task()
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row .* XX\.S16 .* and 3 more, or lower train\.optimizer\.lr"
    ):
        fit(module, [guard], tmp_path, Windows(change={i: lost for i in range(8, 64)}), max_epochs=1, steps=99)
    assert guard.skipped == 3 and finite(module) and len(said(caplog)) == 3


def test_a_gradient_may_be_infinite_where_the_loss_is_not(tmp_path, caplog):
    class Cliff(Task):
        def spoil(self, loss):
            return loss + (self.model.mask_embedding[0] * 0).abs().sqrt() if self.global_step == 3 else loss

    guard, module = Guard(), task(Cliff)
    fit(module, [guard], tmp_path)
    assert guard.skipped == 1 and finite(module)
    assert "a gradient of norm nan" in caplog.text and "XX.S12" in caplog.text


def test_accumulated_gradients_are_skipped_together(tmp_path, caplog):
    guard, states = Guard(), States()
    module = task(max_steps=4, broken=[9])
    fit(module, [guard, states], tmp_path, steps=4, accumulate_grad_batches=2)
    assert guard.skipped == 1 and finite(module)
    assert same(states.seen[1], states.seen[3]) and not same(states.seen[3], states.seen[5])
    (message,) = said(caplog)
    assert all(f"XX.S{i:02d}" in message for i in range(8, 16)) and "XX.S07" not in message


def test_a_spike_is_named_and_does_no_harm(tmp_path, caplog):
    class Spike(Task):
        def spoil(self, loss):
            return loss * 1e6 if self.global_step == 30 else loss

    guard, module = Guard(), task(Spike, max_steps=40)
    fit(module, [guard], tmp_path, steps=40, max_epochs=99)
    assert guard.spikes == 1 and guard.skipped == 0 and finite(module)
    assert "step 30 has a loss of" in caplog.text and "the median before it is" in caplog.text
    assert "XX.S56" in caplog.text and len(said(caplog)) == 1


def test_a_sample_a_million_times_too_large_does_no_harm(tmp_path):
    def spike(waveform):
        waveform[0, 300] *= 1e6

    def loud(waveform):
        waveform *= 1e6

    module = task()
    fit(module, [Guard()], tmp_path, Windows(change={9: spike, 22: loud}))
    assert finite(module)


def test_counts_are_in_the_checkpoint(tmp_path):
    guard = Guard()
    trainer = fit(task(broken=[9]), [guard], tmp_path)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)["callbacks"]["Guard"]
    again = Guard()
    again.load_state_dict(saved)
    assert again.state_dict() == guard.state_dict() and again.skipped == 1 and len(saved["recent"]) == 7


def test_constant_codes_are_seen_and_stop_the_run(tmp_path, caplog):
    class Constant(Task):
        def on_fit_start(self):
            super().on_fit_start()
            self.model.quantizer.codevectors.copy_(self.model.quantizer.codevectors[:, :1].expand(1, 64, 16))

    module = task(Constant, max_steps=200)
    with pytest.raises(CollapsedCodes, match=r"the codes have collapsed: over 50 steps their perplexity is 1\.0"):
        fit(module, [CollapseAlarm(window=50)], tmp_path, steps=200, max_epochs=99)
    assert module.trainer.global_step == 50 and "10 steps before step 10 have a perplexity of 1.0" in caplog.text


def test_a_collapse_on_the_way_is_seen_within_fifty_steps(tmp_path, caplog):
    class Collapsing(Task):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 23:
                self.model.quantizer.codevectors.copy_(self.model.quantizer.codevectors[:, :1].expand(1, 64, 16))

    module = task(Collapsing, max_steps=200)
    alarm = CollapseAlarm()
    with pytest.raises(CollapsedCodes):
        fit(module, [alarm], tmp_path, steps=200, max_epochs=99)
    assert module.trainer.global_step <= 23 + 50
    assert "before step 40 have" in caplog.text and "before step 20 have" not in caplog.text
    assert alarm.history[20] > 5 > alarm.history[40]


def labels(count=80):
    import pandas as pd

    random = np.random.default_rng(1)
    kind = np.arange(count) % 2
    waveforms = random.normal(size=(count, 3, 400)).astype(np.float32)
    waveforms[kind == 1, 1:] *= 2
    table = {"event_id": np.arange(count) // 8, "network": "XX", "station": random.integers(0, 6, count).astype(str)}
    return LabelledWindows(waveforms, pd.DataFrame(table | {"label": np.where(kind, "S", "P")}))


@pytest.mark.parametrize("model", [MASKED, MEANS], ids=["masked prediction", "contrastive"])
def test_watching_changes_nothing(tmp_path, model):
    "A run that is watched by everything ends with the very weights of one that is not."
    plain = task(model=model)
    fit(plain, [], tmp_path / "plain")
    watched, probe = task(model=model), OnlineProbe(labels(), every=3)
    watchers = [Guard(), CollapseAlarm(), Throughput(), probe, Figures(every=3), PeriodicExport(every=4)]
    fit(watched, watchers, tmp_path / "watched")
    assert same(list(plain.state_dict().values()), list(watched.state_dict().values()))
    assert list(probe.history) == [0, 3, 6, 8]
    before = torch.get_rng_state()
    Figures().on_train_start(watched.trainer, watched)  # a loader draws a seed
    assert torch.equal(torch.get_rng_state(), before), "random numbers are not taken from the run"
    drawn = {path.name for path in (tmp_path / "watched" / "figures").iterdir()}
    assert drawn == {f"{name}-{step:09d}.png" for name in ("answers", "codes", "frames") for step in (3, 6, 8)}
    exported = GP2Vec.from_pretrained(tmp_path / "watched" / "exports" / "step=000000008")
    assert same(list(exported.state_dict().values()), list(watched.model.state_dict().values()))
    assert [path.name for path in sorted((tmp_path / "watched" / "exports").iterdir())] == [
        "step=000000004",
        "step=000000008",
    ]


def test_the_average_is_exported_where_there_is_one(tmp_path):
    module = task(ema_decay=0.9)
    fit(module, [PeriodicExport(every=8)], tmp_path)
    exported = GP2Vec.from_pretrained(tmp_path / "exports" / "step=000000008").answer_head.weight
    assert torch.equal(exported, module.average["model.answer_head.weight"])
    assert not torch.equal(exported, module.model.answer_head.weight), "the run goes on with the weights themselves"


def test_the_average_is_what_is_probed_and_drawn(tmp_path, monkeypatch):
    "Where there is one, as it is what is validated and exported; the run goes on with the weights."
    seen = []
    monkeypatch.setattr("gp2vec.train.callbacks.draw_answers", lambda model, _: seen.append(weights(model)) or Figure())
    monkeypatch.setattr(OnlineProbe, "probe", lambda self, model: seen.append(weights(model)) or 0.5)

    def weights(model):
        return model.answer_head.weight.detach().clone()

    module, plain = task(ema_decay=0.9), task(ema_decay=0.9)
    fit(plain, [], tmp_path / "plain")
    fit(module, [OnlineProbe(labels(), every=8), Figures(every=8)], tmp_path / "watched")
    assert len(seen) == 3 and torch.equal(seen[1], seen[2]), "a probe before the first step, both after the last"
    assert torch.equal(seen[1], module.average["model.answer_head.weight"])
    assert not torch.equal(seen[1], weights(module.model))
    for mine, other in ((module.state_dict(), plain.state_dict()), (module.average, plain.average)):
        assert same(list(mine.values()), list(other.values()))


def test_what_is_due_every_few_steps_counts_steps_of_the_optimiser(tmp_path, monkeypatch):
    "Not batches, of which a step has three here; nothing is due before the first step is done."
    reports = []
    monkeypatch.setattr("gp2vec.train.callbacks._gpu", lambda _: reports.append(module.trainer.global_step) or {})
    module, alarm = task(max_steps=24), CollapseAlarm()
    watchers = [alarm, Throughput(), Figures(every=12), PeriodicExport(every=12)]
    options = {"accumulate_grad_batches": 3, "max_epochs": 99, "log_every_n_steps": 8}
    fit(module, watchers, tmp_path, Windows(72), steps=24, **options)
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"step=000000012", "step=000000024"}
    assert {path.stem.partition("-")[2] for path in (tmp_path / "figures").iterdir()} == {"000000012", "000000024"}
    assert list(alarm.history) == [10, 20] and reports == [8, 16, 24]


def test_the_zero_line_survives_a_resume(tmp_path):
    probe = OnlineProbe(labels(), every=4)
    trainer = fit(task(), [probe], tmp_path)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    again = OnlineProbe(labels(), every=4)
    again.load_state_dict(torch.load(tmp_path / "some.ckpt", weights_only=True)["callbacks"]["OnlineProbe"])
    assert again.history == probe.history and list(again.history) == [0, 4, 8]


def test_waiting_is_told_from_working(tmp_path):
    shares = {}
    for name, pause in {"fast": 0.0, "slow": 0.02}.items():
        fit(task(), [Throughput()], tmp_path / name, Windows(pause=pause), log_every_n_steps=4)
        table = np.genfromtxt(tmp_path / name / "metrics.csv", delimiter=",", names=True)
        shares[name] = table["data_wait"][-1]
        hours, windows = table["seismogram_hours_per_second"][-1], table["windows_per_second"][-1]
        assert hours == pytest.approx(windows * 6 / 3600), "windows of six seconds"
        if name == "slow":
            assert windows < 50
    assert shares["fast"] < 0.3 < shares["slow"] and shares["slow"] > 2 * shares["fast"]


def test_loggers_that_take_figures_get_them(tmp_path):
    pytest.importorskip("tensorboard")
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(task(), [Guard(), Figures(every=100)], tmp_path, logger=logger)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["images"]) == {"answers", "codes", "frames"}
    assert {"gradient_norm", "skipped_steps", "loss_spikes"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_gets_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from pytorch_lightning.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    fit(task(), [Guard(), Figures(every=100)], tmp_path, logger=logger)
    logger.experiment.finish()
    kept = {path.name.split("_")[0] for path in tmp_path.rglob("media/images/*.png")}
    assert kept == {"answers", "codes", "frames"}


def test_the_scaler_of_half_precision_does_its_own_work(tmp_path, caplog):
    "Gradients that are infinite because they were scaled are no fault; windows that are broken are."
    guard, module = Guard(max_bad_steps=3), task(broken=[61])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, [guard], tmp_path, steps=16, max_epochs=1, plugins=[plugin])
    skipped = 30 - np.log2(scaler.get_scale())
    assert skipped > 5, "the scaler had to halve several times"
    assert guard.skipped == 1 and "XX.S61" in caplog.text and len(said(caplog)) == 1
    assert finite(module) and not same([task().model.mask_embedding], [module.model.mask_embedding])


def test_a_scaler_with_nothing_left_to_halve_is_no_excuse(tmp_path):
    class Endless(Task):
        def spoil(self, loss):
            return loss + (self.model.mask_embedding[0] * 0).abs().sqrt()

    guard, module = Guard(max_bad_steps=3), task(Endless)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        fit(module, [guard], tmp_path, steps=16, max_epochs=1, plugins=[plugin])
    assert finite(module) and module.trainer.global_step == 4, "two steps of the scaler, three of ours"


TWO = """
import logging, os, sys, warnings
import pytorch_lightning as pl
import torch
import torch.distributed as dist
warnings.filterwarnings("ignore")
sys.path.insert(0, {tests!r})
from test_callbacks import MEANS, Figures, Guard, OnlineProbe, PeriodicExport, Task, Throughput, Windows
from test_callbacks import finite, labels, task, whole
from pytorch_lightning.strategies import ModelParallelStrategy
from gp2vec.train.pretraining import WindowData

class Rank(Task):
    "The first window of rank 1 is broken at step 3, and from step 6 on."
    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.global_rank == 1 and (self.global_step == 3 or self.global_step >= 6):
            batch["waveform"][0, 1, 200] = torch.nan
        return batch

class Same(pl.Callback):
    "Prints whether both ranks have the same state, after every step."
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = torch.cat([whole(v).flatten().double() for v in pl_module.state_dict().values()])
        other = state.clone()
        dist.broadcast(other, 0)
        print(f"rank {{trainer.global_rank}} step {{batch_idx}} same {{torch.equal(state, other)}}", flush=True)

    def on_exception(self, trainer, pl_module, error):
        state = f"after {{guard.skipped}} finite {{finite(pl_module)}}"
        print(f"rank {{trainer.global_rank}} stops {{state}}: {{error}}", flush=True)

def run(rank):
    os.environ |= {{"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
    strategies = {{"ddp": "ddp", "fsdp2": ModelParallelStrategy(2, 1, False)}}
    watchers = [guard, Same(), OnlineProbe(labels(), every=4), Figures(every=4), PeriodicExport(every=4), Throughput()]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategies["{strategy}"], max_steps=20, max_epochs=9,
        callbacks=watchers, default_root_dir="{folder}", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )
    trainer.fit(module, WindowData(Windows(128), Windows(8), 4))

guard, module = Guard(max_bad_steps=3), task(Rank, MEANS)
logging.basicConfig(format="%(message)s")
sys.stdout.flush()
ranks = []
for rank in (0, 1):  # forked, so that what takes seconds to import is imported once
    ranks.append(os.fork())
    if not ranks[-1]:
        try:
            run(rank)
        finally:
            os._exit(0)
for pid in ranks:
    os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_skip_and_stop_together(tmp_path, strategy):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            TWO.format(tests=str(Path(__file__).parent), port=free_ports(1)[0], strategy=strategy, folder=tmp_path)
        )
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path
    )
    for rank in (0, 1):  # the lines of two processes may run into each other
        assert f"rank {rank} step 5 same True" in done.stdout, done.stderr
        assert done.stdout.count(f"rank {rank} stops after 4 finite True: 3 steps in a row") == 1, done.stdout
    assert "same False" not in done.stdout
    assert done.stderr.count("and is skipped; its windows") == 4, "only the rank with the broken window names it"
    assert len(list((tmp_path / "figures").iterdir())) == 6, "what looks on works with a model in parts, too"
    GP2Vec.from_pretrained(tmp_path / "exports" / "step=000000008")
