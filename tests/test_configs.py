"""The files of settings: the commands as they are written, wrong words refused in a sentence, no code from files."""

import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml
from project import LIB, ROOT
from training import MODEL, begin, end, rows, settings, wait_for, write_data

from gp2vec.data.archive import write_archive
from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.models.gp2vec import PRESETS, GP2Vec
from gp2vec.train.checkpoints import Checkpoints, export_checkpoint
from gp2vec.train.pretraining import TrainConfig, strategy_of
from gp2vec.train.train import TrainerConfig, build_trainer, compose, main, read_settings

CONFIGS = LIB / "configs"


def typed(*arguments: str) -> tuple[int, str, str]:
    "Status and what is said."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


COMMANDS = [
    "",
    "--config-name=experiment/debug",
    "--config-name=experiment/production",
    "-cn experiment/debug",
    "data.batch_size=64 model.embed_dim=1024 train.max_epochs=200",
    "--data.batch_size=32 --model.embed_dim=512",
    "--config-path=configs --config-name=experiment/production",
    "--config-name=experiment/production train.trainer.fast_dev_run=true",
    "model=small data=small train=debug",
    "data=scedc",
    "data=ncedc",
    "data=earthscope",
    "wandb.enabled=true wandb.project=gp2vec wandb.entity=your-team wandb.tags=[self-supervised,seismic]",
    "loggers.tensorboard.enabled=true loggers.tensorboard.log_graph=true",
    "train.trainer.devices=4 train.trainer.strategy=ddp",
    "train.trainer.devices=8 train.trainer.num_nodes=4 train.trainer.strategy=ddp",
    "train.trainer.strategy=fsdp2 train.trainer.precision=16-mixed",
    "train.optimizer.name=adamw train.optimizer.lr=1e-4 train.lr_scheduler.warmup_steps=1e4",
    "train.lr_scheduler.name=tri_stage train.lr_scheduler.final=0.05",
    "data.metadata.enabled=false data.augmentation.enabled=false",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_and_hold_together(command, tmp_path, monkeypatch):
    "Every command of the specification about training, in a folder that has the user's own `configs`."
    shutil.copytree(CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("__*"))
    monkeypatch.chdir(tmp_path)
    status, out, err = typed(*command.split(), "--cfg", "job")
    assert status == 0, err
    assert set(yaml.safe_load(out)) == {"output", "checkpoints", "data", "model", "train", "loggers", "wandb"}
    assert [p.name for p in tmp_path.iterdir()] == ["configs"], "nothing is written"


def test_files_are_the_defaults_of_the_code():
    for name, preset in PRESETS.items():
        assert read_settings(compose("config", [f"model={name}"])).model == preset, name
    config = read_settings(compose("config", ["data.batch_size=64", "model.embed_dim=1024", "train.max_epochs=200"]))
    assert (config.data.batch_size, config.model.embed_dim, config.train.max_epochs) == (64, 1024, 200)
    assert config.model.context_encoder.num_heads == 16


def test_a_folder_of_ones_own(tmp_path):
    "A file that builds on the package's groups, and a group of the user's own."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "narrow.yaml").write_text("defaults: [tiny, _self_]\nembed_dim: 96\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults: [/config, override /model: narrow, override /data: small, _self_]\ntrain: {max_steps: 7}\n"
    )
    config = read_settings(compose("mine", [], tmp_path))
    assert (config.model.embed_dim, config.train.max_steps, config.data.archive) == (96, 7, "embedded")


@pytest.mark.parametrize("command", ["model=mine", "--config-name=experiment/production model=mine"])
def test_a_folder_may_hold_one_file(command, tmp_path, monkeypatch):
    "All else is the package's, the file to begin with too; where both have a file, it is the user's."
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\nnum_negatives: 96\n")
    (tmp_path / "configs" / "model" / "tiny.yaml").write_text("defaults: [small, _self_]\n")
    monkeypatch.chdir(tmp_path)
    status, out, err = typed("--config-path=configs", *command.split(), "--cfg", "job")
    assert status == 0, err
    found = yaml.safe_load(out)
    assert (found["model"]["num_negatives"], found["model"]["embed_dim"]) == (96, 256)
    assert found["output"] == ("runs/production" if "production" in command else "runs/pretrain")
    status, _, err = typed("--config-path=configs", "--config-name=mien")
    assert status == 2 and "did you mean" not in err and err.count("\n") == 1
    (tmp_path / "configs" / "mine.yaml").write_text("defaults: [/config, _self_]\n")
    assert "did you mean mine?" in typed("--config-path=configs", "--config-name=mien")[2]


# The files of settings as the specification of this project writes them, before it had any.
SPECIFIED = {
    "data": """
processing:
  target_sampling_rate: 100.0
  window_length: 30.0
  overlap: 0.5

augmentation:
  enabled: true
  probability: 0.8
  time_shift:
    max_shift: 0.1

metadata:
  enabled: true
  fdsn_client: IRIS
""",
    "model": """
feature_encoder:
  conv_layers:
    - {channels: 64, kernel_size: 10, stride: 5}
    - {channels: 128, kernel_size: 8, stride: 4}

context_encoder:
  embed_dim: 768
  num_heads: 12
  num_layers: 12

quantizer:
  type: gumbel
  codebook_size: 320
  num_codebooks: 2
""",
    "train": """
optimizer:
  name: adamw
  lr: 1e-4
  weight_decay: 0.01

lr_scheduler:
  name: cosine_with_warmup
  warmup_steps: 10000

trainer:
  max_epochs: 100
  devices: auto
  strategy: ddp
  precision: 16-mixed
""",
    "": """
wandb:
  enabled: true
  project: gp2vec
  entity: your-team
  tags: [self-supervised, seismic]

loggers:
  tensorboard:
    enabled: true
    log_graph: true

train:
  trainer:
    devices: 8
    num_nodes: 4
    strategy: fsdp
""",
}
CORRECTED = {  # what is said -> what to write
    "did you mean data.processing.sampling_rate?": ("target_sampling_rate", "sampling_rate"),
    "such as data.augmentation.shift_probability": ("  probability", "  shift_probability"),
    "did you mean data.augmentation.max_shift?": ("  time_shift:\n    max_shift", "  max_shift"),
    "did you mean model.embed_dim?": ("context_encoder:\n  embed_dim: 768", "embed_dim: 768\ncontext_encoder:"),
    "did you mean train.max_epochs?": ("trainer:\n  max_epochs: 100", "max_epochs: 100\ntrainer:"),
    "did you mean 'fsdp2'?": ("strategy: fsdp", "strategy: fsdp2"),
}


@pytest.mark.parametrize("group", SPECIFIED)
def test_files_of_the_specification_need_no_other_help_than_the_messages(group, tmp_path, monkeypatch):
    "A sentence for each name that is another here; who follows them has files that hold."
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "configs" / group / "mine.yaml"
    place.parent.mkdir(parents=True)
    begin = f"defaults: [{'default' if group else '/config'}, _self_]\n"
    asked = [f"{group}=mine"] if group else ["--config-name=mine"]
    text, followed = SPECIFIED[group], []
    for _ in range(5):
        place.write_text(begin + text)
        status, _, err = typed("--config-path=configs", *asked, "--cfg", "job")
        if not status:
            break
        (said,) = [said for said in CORRECTED if said in err] or [err]
        before, after = CORRECTED[said]
        assert err.count("\n") == 1 and text.count(before) == 1, err
        text = text.replace(before, after)
        followed.append(said)
    assert status == 0, err
    assert len(followed) == {"data": 3, "model": 1, "train": 1, "": 1}[group]


WRONG = {
    # names
    "train.max_epoch=3": "train has no setting 'max_epoch': did you mean train.max_epochs?",
    "data.lr=1e-3": "did you mean train.optimizer.lr?",
    "train.trainer.max_epochs=3": "did you mean train.max_epochs?",
    "model.context_encoder.embed_dim=512": "did you mean model.embed_dim?",
    "data.processing.target_sampling_rate=100": "did you mean data.processing.sampling_rate?",
    "data.augmentation.flip_probabilty=1": "did you mean data.augmentation.flip_probability?",
    "data.metadata.enable=true": "did you mean data.metadata.enabled?",
    "model.quantizer.codebook_sise=3": "did you mean model.quantizer.codebook_size?",
    "train.optimizer.weight_deacy=0": "did you mean train.optimizer.weight_decay?",
    "loggers.tensorbord.enabled=true": "did you mean loggers.tensorboard.enabled?",
    "wandb.projct=x": "did you mean wandb.project?",
    "outptu=x": "did you mean output?",
    "mdoel=tiny": "did you mean model?",
    "model=tniy": "did you mean tiny?",
    "data=scdec": "did you mean scedc?",
    "--config-name=experiment/debgu": "did you mean experiment/debug?",
    "--config-name=debug": "did you mean experiment/debug?",
    "--config-path=nowhere": "no such folder here; make it for files of your own, or leave the option out",
    "max_steps": "write name=value",
    # settings that stand elsewhere
    "model.num_heads=4": "did you mean model.context_encoder.num_heads?",
    "train.weight_decay=0": "did you mean train.optimizer.weight_decay?",
    "trainer.fast_dev_run=true": "did you mean train.trainer.fast_dev_run?",
    "trainer.max_epochs=3": "did you mean train.max_epochs?",
    "lr=1e-3": "did you mean train.optimizer.lr?",
    "train.learning_rate=1e-3": "did you mean train.optimizer.lr?",
    "batch_size=3": "did you mean data.batch_size?",
    "processing.overlap=0.2": "did you mean data.processing.overlap?",
    "processing.target_sampling_rate=50": "did you mean data.processing.sampling_rate?",
    "augmentation.probability=0.8": "each augmentation has a probability of its own, such as",
    "augmentation.time_shift.max_shift=0.1": "did you mean data.augmentation.max_shift?",
    "context_encoder.embed_dim=768": "did you mean model.embed_dim?",
    "metadata.fdsn_client=IRIS": "did you mean data.metadata.fdsn_client?",
    "strategy=fsdp": "did you mean train.trainer.strategy?",
    # types
    "data.batch_size=many": "data.batch_size is a whole number, not 'many'",
    "data.batch_size=2.5": "data.batch_size is a whole number, not 2.5",
    "data.networks=CI": "data.networks is a list",
    "data.networks=[false]": "YAML reads NO as no",
    "data.processing=3": "data.processing is a group of settings, not 3",
    "model.sampling_rate=true": "model.sampling_rate is a number, not True",
    "train.optimizer.betas=[0.9]": "train.optimizer.betas is a list of 2",
    "train.trainer.fast_dev_run=maybe": "train.trainer.fast_dev_run is true or false or a whole number",
    "loggers.tensorboard=true": "loggers.tensorboard is a group of settings",
    "wandb.tags=seismic": "wandb.tags is a list",
    "data.start=2019": "data.start is text",
    # names of registries
    "train.lr_scheduler.name=cosine": "cosine_with_warmup",
    "train.optimizer.name=sgd": "adamw",
    "train.trainer.strategy=fsdp": "did you mean 'fsdp2'?",
    "train.trainer.strategy=FSDP": "did you mean 'fsdp2'?",
    "train.trainer.strategy=DDP": "did you mean 'ddp'?",
    "train.trainer.accelerator=cuda": "auto, cpu, gpu, mps",
    "train.trainer.precision=16": "did you mean '16-mixed'?",
    "train.trainer.precision=32": "did you mean '32-true'?",
    "train.trainer.precision=bf16": "did you mean 'bf16-mixed'?",
    "model.quantizer.type=gumble": "gumbel",
    "model.objective=contrastiv": "contrastive",
    # what does not fit together, or cannot be
    "model.context_encoder.num_heads=7": "num_heads=7 does not divide embed_dim=768; 6 does",
    "model.quantizer.num_codebooks=3": "does not divide into 3 codebooks",
    "model.objective=masked_prediction model.quantizer.type=gumbel": "it predicts the names of codes alone",
    "data.processing.window_length=2": "at least 2 spans",
    "model.sampling_rate=40": "data.processing.sampling_rate=100 Hz, not 40 Hz",
    "model.feature_encoder.in_channels=1": "Z, N and E",
    "data.held_out=1": "a share of the stations",
    "data.held_out_days=1": "a share of the data",
    "data.batch_size=0": "data.batch_size is 1 or more",
    "data.processing.overlap=1.5": "overlap must be in [0, 1)",
    "data.augmentation.flip_probability=2": "flip_probability must be a probability",
    "data.start='2020-01-02' data.end='2020-01-01'": "swap them",
    "train.probe_layer=13": "from 0 to 12",
    "train.trainer.devices=0": "auto or a number of processes",
    "train.max_epochs=0": "train.max_epochs is 1 or more",
    "train.max_steps=0": "train.max_steps is 1 or more, or -1",
    "train.max_steps=-2": "train.max_steps is 1 or more, or -1",
    "train.seed=-1": "train.seed is from 0 to",
    "train.seed=99999999999999999999": "train.seed is from 0 to",
    "data.seed=-1": "data.seed is 0 or more",
    "train.trainer.fast_dev_run=-1": "train.trainer.fast_dev_run is 0 or more",
    "train.lr_scheduler.power=-2": "train.lr_scheduler.power is 0 or more",
    "train.optimizer.betas=[0.9,1]": "train.optimizer.betas are 0 or more and below 1",
    "train.optimizer.betas=[-0.1,0.9]": "train.optimizer.betas are 0 or more and below 1",
    "train.optimizer.eps=0": "train.optimizer.eps is above 0",
    "train.mask_ramp=[0,1]": "train.mask_ramp is from",
    "train.mask_ramp=[0.5,1.2]": "train.mask_ramp is from",
    "model.quantizer.codebook_size=4": "model.quantizer.codebook_size is above 5",
    "train.lr_scheduler.name=tri_stage": "above 0 for tri_stage",
    "train.seed=${data.sed}": "a setting refers to what is not there",
    "output=s3://bucket/run": "checkpoints=s3://… puts those on S3",
    "data.archive=x data.directory=s3://bucket": "gp2vec shards",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_word_is_one_sentence(change, tmp_path, monkeypatch):
    "Status 2 and one line, before anything is read or written."
    monkeypatch.chdir(tmp_path)
    status, out, err = typed(*change.split(" "))
    assert status == 2 and not out, err
    assert err.startswith("gp2vec: ") and err.count("\n") == 1 and WRONG[change] in err, err
    assert not list(tmp_path.iterdir()), "nothing is touched"


def hostile(sentinel: Path) -> dict[str, str]:
    "Settings that would run code where a library instantiates what they name: they make a file."
    program = f"touch {sentinel}"
    calls = {
        "os.system": f"_target_: os.system\n  command: {program}",
        "posix.system": f"_target_: posix.system\n  _args_: ['{program}']",
        "subprocess.call": f"_target_: subprocess.call\n  args: {program}\n  shell: true",
        "eval": f"_target_: builtins.eval\n  _args_: [\"__import__('os').system('{program}')\"]",
        "joblib": "_target_: joblib.load\n  filename: evil.pkl",
        "pandas": "_target_: pandas.read_pickle\n  filepath_or_buffer: evil.pkl",
        "torch": "_target_: torch.load\n  f: evil.pkl\n  weights_only: false",
        "numpy": "_target_: numpy.load\n  file: evil.pkl\n  allow_pickle: true",
        "gopen": f"_target_: webdataset.gopen\n  _args_: ['pipe:{program}']",
        "unpickler": "_target_: webdataset.autodecode.unpickle_loads\n  data: x",
        "spawn": "_target_: distutils.spawn.spawn\n  cmd: [touch, x]",
        "partial": f"_partial_: true\n  _target_: os.system\n  command: {program}",
        "call": f"_call_: os.system\n  command: {program}",
    }
    files = {f"model.quantizer {name}": f"model:\n quantizer:\n  {text}" for name, text in calls.items()}
    handler = f"handlers: {{x: {{'()': os.system, command: '{program}'}}}}"
    return files | {
        "data": "data:\n  _target_: joblib.load",
        "top": f"_target_: os.system\ncommand: {program}",
        "list": "model: {feature_encoder: {conv_layers: [{_target_: os.system, command: x}]}}",
        "callback": f"hydra: {{callbacks: {{x: {{_target_: os.system, command: '{program}'}}}}}}",
        "launcher": "hydra: {launcher: {_target_: joblib.load}}",
        "sweeper": "hydra: {sweeper: {_target_: joblib.load}}",
        "logging": f"hydra: {{job_logging: {{{handler}}}}}",
        "environment": "hydra: {job: {env_set: {LD_PRELOAD: evil.so}}}",
        "tag": f"train:\n  seed: !!python/object/apply:os.system ['{program}']",
        "resolver": "train: {seed: '${eval:1}'}",
        "name": "train: {optimizer: {name: joblib.load}}",
        "type": "model: {quantizer: {type: torch.load}}",
        "strategy": "train: {trainer: {strategy: webdataset.gopen}}",
    }


HOSTILE = list(hostile(Path("x")))


@pytest.mark.parametrize("form", HOSTILE)
def test_files_never_run_code(form, tmp_path, monkeypatch):
    "Refused with one sentence, from a file and, where it can be typed, from the command line."
    monkeypatch.chdir(tmp_path)
    sentinel = tmp_path / "sentinel"
    text = hostile(sentinel)[form]
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "evil.yaml").write_text(f"defaults: [/config, _self_]\n{text}\n")
    status, out, err = typed("--config-path=configs", "--config-name=evil")
    assert status == 2 and err.count("\n") == 1 and not out, err
    assert "name code" in err or not form.startswith("model.quantizer"), err
    (folder / "evil.yaml").write_text(f"# @package _global_\n{text}\n")
    (folder / "config.yaml").write_text("defaults: [data: default, model: default, train: default, evil, _self_]\n")
    assert typed("--config-path=configs")[0] == 2
    assert not sentinel.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["configs"]


@pytest.mark.parametrize(
    "change",
    [
        "+model._target_=os.system",
        "++hydra.callbacks.x._target_=os.system",
        "hydra/launcher=basic",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.job.env_set.LD_PRELOAD=evil.so",
    ],
)
def test_the_command_line_never_runs_code(change):
    status, _, err = typed(change)
    assert status == 2 and "name code" in err and err.count("\n") == 1, err


def test_at_least_twenty_forms_are_refused():
    assert len(HOSTILE) >= 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


CANARY = "CANARYbXkM3q9sT0vW2yZ4"


@pytest.fixture(scope="module")
def watched(data):
    "A run of six steps that everybody is told of, with keys in the environment."
    run, log = data / "run", data / "log"
    more = ["loggers.tensorboard.enabled=true", "train.checkpoint_every=3", "train.ema_decay=0.9"]
    more += ["train.figures_every=3", "train.export_every=3", "train.trainer.precision=bf16-mixed"]
    more += ["wandb={enabled: true, offline: true, tags: [seismic, test]}"] if has_wandb() else []

    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN")
    secrets = dict.fromkeys(names, CANARY) | {"WANDB_ERROR_REPORTING": "false"}

    def elsewhere():
        os.chdir(data)
        os.environ.update(secrets)

    assert end(begin(settings(data, run, 6, *more), log, elsewhere), 300) == 0, log.read_text()[-3000:]
    return run, log


def has_wandb() -> bool:
    try:
        import wandb  # noqa: F401
    except ImportError:
        return False
    return True


def test_run_leaves_metrics_settings_and_checkpoints(watched):
    run, log = watched
    assert rows(run) == [0, 1, 2, 3, 4, 5]
    table = pd.read_csv(run / "metrics.csv")
    wanted = {"train_loss", "train_accuracy", "train_perplexity", "gradient_norm", "windows_per_second", "val_loss"}
    assert wanted <= set(table), set(table)
    assert table.filter(like="lr").notna().any().any(), "the learning rate"
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["train"]["max_steps"] == 6 and kept["model"]["embed_dim"] == 32
    assert {p.name for p in (run / "checkpoints").glob("*.ckpt")} == {"step=000000003.ckpt", "step=000000006.ckpt"}
    assert len(list((run / "figures").glob("*.png"))) >= 6 and (run / "exports" / "step=000000006").is_dir()
    assert "\r" not in log.read_text() and "━" not in log.read_text(), "no bar where there is no terminal"


def test_tensorboard_has_scalars_and_the_graph(watched):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(watched[0] / "tensorboard"))
    seen.Reload()
    assert seen.Tags()["graph"], "log_graph"
    assert [event.step for event in seen.Scalars("train_loss")] == [0, 1, 2, 3, 4, 5]


def test_wandb_offline_has_the_metrics(watched):
    pytest.importorskip("wandb")
    (folder,) = (watched[0] / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    assert record.stat().st_size > 1000 and b"train_loss" in record.read_bytes()
    assert b"seismic" in record.read_bytes(), "the tags"


def test_wandb_goes_on_with_the_same_run(data, tmp_path):
    "Its name is kept in the folder of the run."
    pytest.importorskip("wandb")
    run, log = tmp_path / "run", tmp_path / "log"
    quiet = partial(os.environ.update, {"WANDB_ERROR_REPORTING": "false"})
    for steps in (2, 4):
        asked = settings(data, run, steps, "wandb={enabled: true, offline: true}")
        assert end(begin(asked, log, quiet), 300) == 0, log.read_text()[-3000:]
        time.sleep(1.1)  # the folders of parts are told apart by the second
    names = {folder.name.rpartition("-")[2] for folder in (run / "wandb").glob("offline-run-*")}
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    assert names == {(run / "wandb.id").read_text().strip()}


def test_no_secret_is_left_behind(watched):
    "In no file of the run, and in nothing that it said."
    run, log = watched
    files = [p for p in [*run.rglob("*"), log] if p.is_file()]
    assert len(files) > 8
    assert not [p for p in files if CANARY.encode() in p.read_bytes()]


def test_secret_in_settings_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for change in (f"data.credentials={CANARY}", f"wandb.api_key={CANARY}", f"data.archive=s3://k:{CANARY}@bucket"):
        status, out, err = typed(*settings(tmp_path, tmp_path / "run", 1), change)
        assert status == 2 and CANARY not in out + err, err


def test_missing_extra_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gp2vec.train.train.find_spec", lambda name: None)
    for change, extra in {
        "wandb.enabled=true": "wandb",
        "loggers.tensorboard.enabled=true": "tensorboard",
        "train.trainer.strategy=deepspeed": "deepspeed",
    }.items():
        status, _, err = typed("data=small", change)
        assert status == 2 and f'pip install "gp2vec[{extra}]"' in err and not list(tmp_path.iterdir()), err


def test_shards_of_other_settings_are_refused_with_what_can_be_typed(data, tmp_path):
    "The folder that has them is named, and so is the setting; no argument of a function."
    places = (data, tmp_path / "run", 1, f"data.directory={tmp_path / 'prepared'}")
    log = tmp_path / "log"
    assert end(begin(settings(*places), log), 200) == 0, log.read_text()[-3000:]
    for change in ("data.processing.highpass=2", "data.held_out=0.5", "data.seed=3"):
        status, _, err = typed(*settings(*places), change)
        assert status == 2 and err.count("\n") == 1, err
        assert f"name another folder in data.directory, or remove {tmp_path / 'prepared' / 'shards'}" in err, err
        assert "overwrite" not in err and "url" not in err
    (status, _, err) = typed(*settings(*places), "data.networks=[ZZ]", "data.start='2020-01-01'")
    assert status == 2 and "holds no objects of data.networks=[ZZ] data.start=2020-01-01: ask for more" in err, err


def test_one_process_prepares_and_the_others_wait(data, tmp_path):
    "Three runs at once on the same archive: one makes the shards, and all learn."
    folder = tmp_path / "data"
    shutil.copytree(data / "archive", folder / "archive")
    pids = [begin(settings(folder, tmp_path / f"run{i}", 2), tmp_path / f"log{i}") for i in range(3)]
    assert [end(pid, 200) for pid in pids] == [0, 0, 0], [(tmp_path / f"log{i}").read_text() for i in range(3)]
    losses = [pd.read_csv(tmp_path / f"run{i}" / "metrics.csv").train_loss.dropna().tolist() for i in range(3)]
    assert losses[0] == losses[1] == losses[2]
    note = folder / "prepared" / "prepared.json"
    before = note.stat().st_mtime_ns
    assert json.loads(note.read_text())["report"]["train"]["objects"]["used"] > 0
    assert end(begin(settings(folder, tmp_path / "run4", 2), tmp_path / "log4"), 200) == 0
    assert note.stat().st_mtime_ns == before


def launch(arguments: list[str], log: Path, **more: str) -> subprocess.Popen:
    "The command in a process of its own."
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | more
    command = [sys.executable, "-m", "gp2vec.train.train", *arguments]
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent)


TWO = ["train.trainer={accelerator: cpu, devices: 2, strategy: ddp, precision: 32-true}"]


def ranks(arguments: list[str], log: Path) -> list[int]:
    "Two processes of one run, as torchrun starts them."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    place |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    each = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [begin(arguments, log, partial(os.environ.update, mine)) for mine in each]


def test_two_processes_stop_together_and_go_on(data, tmp_path):
    "`devices=2 strategy=ddp` as torchrun starts it: one is told to stop, both save and end with 75, and both go on."
    run, log = tmp_path / "run", tmp_path / "log"
    pids = ranks([*settings(data, run, 2000), *TWO, "train.checkpoint_every=0"], log)
    wait_for(run, 3, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [end(pid) for pid in pids] == [75, 75], log.read_text()[-3000:]
    done = len(rows(run))
    assert done < 2000 and log.read_text().count("the same command goes on") == 1
    assert [end(pid) for pid in ranks([*settings(data, run, done + 3), *TWO], log)] == [0, 0], log.read_text()[-3000:]
    assert rows(run) == list(range(done + 3)), "each step once, from one process"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_killed_process_ends_the_other_with_a_sentence(data, tmp_path, strategy):
    "Within half a minute, with status 1, and without a traceback: there is nothing in the program to look for."
    run, log = tmp_path / "run", tmp_path / "log"
    pids = ranks([*settings(data, run, 2000), *TWO, f"train.trainer.strategy={strategy}"], log)
    wait_for(run, 3, pids[0])
    os.kill(pids[1], signal.SIGKILL)
    started = time.monotonic()
    assert [end(pid) for pid in pids] == [1, -signal.SIGKILL] and time.monotonic() - started < 30
    said = log.read_text()
    assert "Traceback" not in said and said.count("the same command goes on from the last checkpoint") == 1, said[
        -3000:
    ]
    assert len(said.splitlines()) < 8, said


def test_processes_that_share_no_folder_do_not_begin(data, tmp_path):
    "Both end with 2 and say which folders they see: the run would come apart when it goes on."
    log, asked = tmp_path / "log", settings(data, tmp_path / "run", 4)
    pids = ranks([*asked, *TWO, f"output={tmp_path}/run-${{oc.env:RANK}}"], log)
    assert [end(pid) for pid in pids] == [2, 2], log.read_text()[-3000:]
    assert "see different checkpoints" in log.read_text() and "run-1/checkpoints/ (absent)" in log.read_text()
    assert not list(tmp_path.glob("run-*/metrics.csv"))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_processes_miss_each_other_within_minutes(strategy, tmp_path, monkeypatch):
    "Not after the half hour that is usual, where a GPU would wait for one that is gone; notebooks are not asked."
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert strategy_of("auto", 2) == "auto" == strategy_of("auto", 1)
    monkeypatch.delattr(sys, "ps1")
    machine = TrainerConfig(accelerator="cpu", devices=2, strategy=strategy, precision="32-true")
    made = build_trainer(TrainConfig(), machine, tmp_path, progress=False).strategy
    assert made._timeout == timedelta(minutes=10)


def test_weights_in_pieces_and_checkpoints_on_s3(data, s3_server, tmp_path, monkeypatch):
    "`strategy=fsdp2` on two processes; one alone goes on from their checkpoints, and what is exported is the model."
    s3_server.env(monkeypatch)
    run, log, url = tmp_path / "run", tmp_path / "log", "s3://private/runs/fsdp2"
    usual = [f"checkpoints={url}", "train.checkpoint_every=2", "train.ema_decay=0.9", "train.export_every=4"]
    two = [*usual, *TWO, "train.trainer.strategy=fsdp2", "data.batch_size=4"]
    for steps in (4, 6):  # a beginning, and two that go on
        pids = ranks([*settings(data, run, steps), *two], log)
        assert [end(pid) for pid in pids] == [0, 0], log.read_text()[-3000:]
    assert Checkpoints(url).steps() == [2, 4, 6] and not (run / "checkpoints").exists()
    assert end(begin([*settings(data, run, 8), *usual], log)) == 0, log.read_text()[-3000:]
    assert rows(run) == list(range(8)) and Checkpoints(url).steps() == [4, 6, 8]
    assert "windows and took" not in log.read_text(), "two batches of 4 are one of 8"
    exported = export_checkpoint(url, tmp_path / "model")
    written = GP2Vec.from_pretrained(run / "exports" / "step=000000008")
    assert all(value.equal(written.state_dict()[name]) for name, value in exported.state_dict().items())


@pytest.mark.slow
def test_two_processes_that_lightning_starts(data, tmp_path):
    "The same where the command starts the second process itself."
    run, log = tmp_path / "run", tmp_path / "log"
    process = launch([*settings(data, run, 2000), *TWO, "train.checkpoint_every=0"], log)
    deadline = time.monotonic() + 120
    while len(rows(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 75, log.read_text()[-3000:]
    done = len(rows(run))
    assert log.read_text().count("the same command goes on") == 1
    process = launch([*settings(data, run, done + 3), *TWO], log)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    assert rows(run) == list(range(done + 3)), "each step once, from one process"


@pytest.mark.parametrize("name", ["scedc", "ncedc"])
def test_data_centres(name, s3_server, tmp_path, monkeypatch):
    "The archive of a data centre as its bucket has it, on a server of our own, from the file of that name."
    network = synthetic_network(SyntheticConfig(stations=3, events=4, duration=300.0, starttime="2020-01-01T12:00:00"))
    for trace in network.stream:
        trace.stats.network = "CI" if name == "scedc" else "NC"
    for one in network.inventory:
        one.code = "CI" if name == "scedc" else "NC"
    write_archive(
        tmp_path / "archive", network.stream, network.inventory, **({} if name == "scedc" else {"layout": name})
    )
    fs = s3_server.fs()
    bucket = f"{name}-pds"
    fs.exists(bucket) or fs.mkdir(bucket)
    for path in (tmp_path / "archive").rglob("*"):
        if path.is_file():
            fs.put_file(str(path), f"{bucket}/{path.relative_to(tmp_path / 'archive').as_posix()}")
    s3_server.env(monkeypatch)
    monkeypatch.chdir(tmp_path)
    small = ["data.held_out=0.3", "data.processing.window_length=10", "data.workers=1", "data.batch_size=4"]
    run = ["train.max_steps=2", "train.trainer={accelerator: cpu, precision: 32-true}", "train.probe_every=0"]
    dates = ["data.start='2020-01-01'", "data.end='2020-01-02'", "data.num_workers=0"]
    status, _, err = typed(f"data={name}", *MODEL, *small, *run, *dates, "output=run")
    assert status == 0, err
    assert len(pd.read_parquet(tmp_path / "cache" / name / "stations.parquet")) >= 9


# The folder `deploy`


def manifests() -> dict[str, dict]:
    return {d["kind"]: d for d in yaml.safe_load_all((ROOT / "deploy" / "job.yaml").read_text(encoding="utf-8"))}


def test_kubernetes_job():
    "Against what the API asks of a Job and a Service, and against our own statuses and settings."
    service, job = manifests()["Service"], manifests()["Job"]
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    known = {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy", "template"}
    assert set(spec) <= known and spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert pod["restartPolicy"] == "Never", "a policy of failures asks for it"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    allowed = {"name", "image", "args", "env", "envFrom", "resources", "volumeMounts"}
    assert set(container) <= allowed and re.fullmatch(r"[a-z0-9-]+", container["name"])
    assert all(isinstance(a, str) for a in container["args"]), "YAML reads some words as numbers"
    environment = {e["name"]: e for e in container["env"]}
    assert environment["MASTER_ADDR"]["value"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert all(isinstance(e.get("value", ""), str) for e in container["env"])
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    rules = {
        (r["action"], c): r
        for r in spec["podFailurePolicy"]["rules"]
        for c in r.get("onExitCodes", {}).get("values", [])
    }
    assert ("Ignore", 75) in rules and ("FailJob", 2) in rules
    assert all(r["onExitCodes"]["containerName"] == container["name"] for r in rules.values())
    assert container["args"][0] == "pretrain"
    status, out, err = typed(*container["args"][1:], "--cfg", "job")
    assert status == 0, err
    assert yaml.safe_load(out)["train"]["trainer"]["num_nodes"] == spec["completions"]


def test_slurm_script_asks_to_be_requeued(tmp_path):
    "The script itself under bash, with stand-ins for srun, which ends as it is told, and scontrol, which takes notes."
    script = ROOT / "deploy" / "slurm.sh"
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for name, text in {"srun": 'echo "$@" > srun.txt; exit $STATUS', "scontrol": 'echo "$@" > scontrol.txt'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for status in (0, 1, 75):
        (tmp_path / "scontrol.txt").unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUS": str(status)}
        environment |= {"SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
        done = subprocess.run(["bash", script, "model=tiny"], cwd=tmp_path, env=environment)
        assert done.returncode == status and (tmp_path / "scontrol.txt").exists() == (status == 75)
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 123\n"
    asked = (tmp_path / "srun.txt").read_text().split()
    changes = asked[asked.index("gp2vec.train.train") + 1 :]
    status, out, err = typed(*changes, "--cfg", "job")
    assert status == 0 and yaml.safe_load(out)["train"]["trainer"]["num_nodes"] == 2, err
    assert script.stat().st_mode & stat.S_IXUSR
    (log,) = re.findall(r"^#SBATCH --output=(.+)$", script.read_text(), re.MULTILINE)
    assert "/" not in log, "SLURM makes no folder, and a job whose log has none fails without a word"


def instructions() -> list[tuple[str, str]]:
    "Instructions of the Dockerfile, lines joined."
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(None, 1)) for line in lines]


def test_dockerfile_is_whole():
    "Instructions that exist, Python of the right version, and a run that hears signals itself."
    steps = instructions()
    known = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} <= known
    version = re.fullmatch(r"python:3\.(\d+)-slim", dict(steps)["FROM"])
    assert version and int(version[1]) >= 11
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["gp2vec"], "a list: no shell between"
    made = steps.index(("RUN", "mkdir -m 1777 -p /work"))
    assert made < steps.index(("WORKDIR", "/work")) < steps.index(("USER", "1000")), "anybody may write there"
    for name, value in steps:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", value]).returncode == 0, value


@pytest.mark.slow
def test_dockerfile_builds_in_a_clean_environment(tmp_path):
    "The RUN steps as a shell runs them, on a copy of the project in an environment with nothing in it."
    from project import copy_project

    project = copy_project(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    places = f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": places}
    for name, value in instructions():
        if name == "ARG":
            key, _, default = value.partition("=")
            environment[key] = os.environ.get("PIP_INDEX_URL", default) if key == "INDEX" else default
        if name == "RUN" and value.endswith(" /work"):
            continue  # of the image, not of this machine
        if name == "RUN":
            done = subprocess.run(["sh", "-ec", value], cwd=project, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{value}: {done.stderr[-3000:]}"


@pytest.mark.slow
def test_production_runs(data, tmp_path):
    "One batch of the large model, as `trainer.fast_dev_run` asks."
    more = ["train.trainer.fast_dev_run=true", "data.batch_size=1", "data.processing.window_length=10"]
    more += [f"data.archive={data / 'archive'}", f"data.directory={tmp_path / 'prepared'}", "data.held_out=0.25"]
    log = tmp_path / "log"
    process = launch(
        ["--config-name=experiment/production", f"output={tmp_path / 'run'}", "data.num_workers=0", *more], log
    )
    assert process.wait(500) == 0, log.read_text()[-3000:]
    assert not (tmp_path / "run").exists(), "nothing is saved"
