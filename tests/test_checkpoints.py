"""Checkpoints that are killed, cut, flipped, hostile, or refused by a server: never wrong, never lost in silence."""

import hashlib
import io
import json
import logging
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import KEY, NEW_KEY, NEW_SECRET, SECRET
from omegaconf import OmegaConf
from project import few_or_many
from pytorch_lightning.callbacks import Checkpoint, EMAWeightAveraging
from torch.utils.data import DataLoader

from gp2vec.data.archive import Place, Retry, Store
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig, settings_to_dict
from gp2vec.train.checkpoints import Checkpoints, VerifiedCheckpointIO, export_checkpoint

QUICK = Retry(budget=5.0, first=0.004, longest=0.03, timeout=2.0)


def state(step: int, size: int = 5_000) -> dict:
    "A small checkpoint whose every number is its step."
    return {
        "global_step": step,
        "state_dict": {name: torch.full((size,), float(step)) for name in "abcd"},
        "hyper_parameters": {"model": {"embed_dim": 8, "layers": [1, 2]}},
    }


def step_of(saved: dict) -> int:
    "The step of a checkpoint all of whose numbers agree on it."
    values = {float(v) for tensor in saved["state_dict"].values() for v in tensor.unique()}
    assert values == {float(saved["global_step"])}, values
    return saved["global_step"]


# Kills


class Naive:
    "What a careful person might write: a good file is overwritten."

    def __init__(self, url):
        self.folder = Path(url)

    def save(self, state, step):
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.folder / "last.ckpt")

    def load(self):
        return torch.load(self.folder / "last.ckpt", weights_only=True)


def save_until_killed(make, begin: int, again: bool, done: int) -> None:
    "The child: save step after step, each with its number to the parent before and after; or one step again and again."
    checkpoints, size = make(), random.Random(begin).choice([500, 5_000, 20_000])
    for count in range(begin, begin + 10_000):
        os.write(done, f"b{count}\n".encode())
        checkpoints.save(state(count, size), 1 if again else count)
        os.write(done, f"e{count}\n".encode())


def kill_once(make, begin: int, again: bool, delay: float) -> tuple[int, int]:
    "Fork, let it save, kill it with -9 after a delay; the last number that it began and the last it acknowledged."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_until_killed(make, begin, again, write)
        finally:
            os._exit(1)
    os.close(write)
    heard = b""
    while b"e" not in heard:  # one is saved, so there is something to lose
        heard += (more := os.read(read, 100))
        assert more, "the child ended by itself"
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
    while more := os.read(read, 1 << 16):
        heard += more
    os.close(read)
    words = heard.decode().split()
    return tuple(max([int(w[1:]) for w in words if w[0] == kind], default=0) for kind in "be")


def kill_many(folder: str, count: int, naive: bool, temporary: str) -> dict:
    "Kill a saving process many times; after each the last step that was acknowledged is there, or one that was begun."
    draw, seen = random.Random(1), Counter()
    tempfile.tempdir = temporary
    logging.disable(logging.WARNING)
    for turn in range(count):
        if turn % 5 == 0:
            last, where = 0, f"{folder}/{turn}"
        again, keep = turn // 5 % 2 == 1, 1 + turn // 10 % 3

        def make(where=where, keep=keep):
            return Naive(where) if naive else Checkpoints(where, keep=keep)

        begun, acknowledged = kill_once(make, last + 1, again, draw.uniform(0, 0.02))
        seen["inside a save"] += begun > acknowledged
        seen["acknowledged"] += acknowledged - last
        last = max(last, acknowledged)
        try:
            found = step_of(make().load())
        except FileNotFoundError:
            found = 0
        except Exception:
            found = -1
        seen["whole" if last <= found <= begun else "torn"] += 1
        last = max(last, found)
        if not naive:  # every file under a checkpoint's name is one
            for step in make().steps():
                step_of(make().load(step))
            seen["left over"] += len(list(Path(where).glob(".*")))
    return dict(seen)


@few_or_many(40, 200)
def test_killed_while_it_saves(tmp_path, count):
    """Killed again and again while it saves, half the time with temporary files on another disk: nothing torn or lost.

    In a process of its own, for one that has threads is not to be forked. First the same is done to a program that
    overwrites its file: the kills are real.
    """
    shared = Path("/dev/shm")
    other = shared if shared.is_dir() and shared.stat().st_dev != tmp_path.stat().st_dev else tmp_path
    half = count // 2
    jobs = [("naive", 20, True, tmp_path), ("here", half, False, tmp_path), ("elsewhere", half, False, other)]
    calls = ", ".join(
        f"t.kill_many({str(tmp_path / n)!r}, {kills}, {naive}, {str(d)!r})" for n, kills, naive, d in jobs
    )
    code = f"import json, test_checkpoints as t; print(json.dumps([{calls}]))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    naive, *ours = map(Counter, json.loads(done.stdout.splitlines()[-1]))
    seen = ours[0] + ours[1]
    print(dict(naive), dict(seen))
    assert naive["torn"] > 0, naive
    assert seen["whole"] == count and not seen["torn"]
    assert seen["acknowledged"] >= count and seen["inside a save"] >= half, "the kills came at harmless moments"
    assert seen["left over"] > 0


def test_leftovers_go_with_the_next_save(tmp_path):
    "What a kill leaves is removed, what is somebody else's is not."
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(1), 1)
    ours = [f".step=000000002.ckpt.{'0' * 32}", f".last.json.{'a' * 32}", "step=000000000.ckpt.sha256"]
    theirs = [".git", "notes.txt", "step=best.ckpt", ".step=000000002.ckpt.mine"]
    for name in ours + theirs:
        (tmp_path / name).write_text("x")
    checkpoints.save(state(2), 2)
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {*theirs, "last.json", "step=000000002.ckpt", "step=000000002.ckpt.sha256"}


# Disks


@contextmanager
def full_disk(size: int):
    "No file may grow beyond this."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("again", [False, True])
def test_full_disk(tmp_path, again):
    "A save for which there is no room raises; the checkpoint before it stays, also where the same step is saved again."
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(state(1), 1)
    for size in (0, 50, 1_000, 40_000):
        with full_disk(size), pytest.raises(OSError, match="step=.* was not saved .*File too large.*nor could a copy"):
            checkpoints.save(state(2), 1 if again else 2)
        assert checkpoints.last() == 1 and step_of(checkpoints.load()) == 1
        assert not list((tmp_path / "run").glob(".*")), "half a file was left"
    checkpoints.save(state(2), 1 if again else 2)
    assert step_of(checkpoints.load()) == 2


def test_full_disk_with_room_elsewhere(tmp_path, monkeypatch):
    "The copy of what could not be saved is a checkpoint: its place is named, it loads, and nobody else may read it."
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "run").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="was not saved .*a copy was kept") as failure:
        Checkpoints(tmp_path / "run").save(state(7), 7)
    copy = Path(str(failure.value).rpartition(" ")[2])
    assert step_of(Checkpoints(copy.parent).load()) == 7 and copy.parent.stat().st_mode & 0o077 == 0
    assert step_of(VerifiedCheckpointIO().load_checkpoint(copy)) == 7


def test_temporary_folder_is_not_needed(tmp_path, monkeypatch):
    "What is renamed lies in the folder itself: where the temporary folder is does not matter."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(state(1), 1)
    assert checkpoints.last() == 1


# Damage


@pytest.fixture
def pair(tmp_path):
    "Two checkpoints, the bytes of the newer one, and where it lies."
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state(step, 1_000), step)
    newest = Path(checkpoints.path(2))
    return checkpoints, newest, newest.read_bytes()


def test_flipped_bits(pair, caplog):
    "300 of 300 flipped bits are caught, the one before is used and that is said; torch.load alone notices almost none."
    checkpoints, newest, good = pair
    draw, silent = random.Random(0), 0
    for turn in range(300):
        at = draw.randrange(8 * len(good))
        bad = good[: at // 8] + bytes([good[at // 8] ^ 1 << at % 8]) + good[at // 8 + 1 :]
        newest.write_bytes(bad)
        caplog.clear()
        assert step_of(checkpoints.load()) == 1
        assert [r.levelname for r in caplog.records] == ["WARNING"] and "step=000000002.ckpt is corrupt" in caplog.text
        if turn % 10 == 0:
            assert checkpoints.last() == 1
            for load in (lambda: checkpoints.load(2), lambda: VerifiedCheckpointIO().load_checkpoint(newest)):
                with pytest.raises(OSError, match="step=000000002.ckpt is corrupt"):
                    load()
        try:
            torch.load(io.BytesIO(bad), weights_only=True)
            silent += 1
        except Exception:
            pass
    print(f"torch.load took {silent} of 300 for good")
    assert silent > 200
    newest.write_bytes(good)
    caplog.clear()
    assert checkpoints.last() == 2 and not caplog.records


def test_cuts(pair, caplog):
    "Wherever a file ends early, and where it goes on too long."
    checkpoints, newest, good = pair
    for end in (*range(0, len(good), len(good) // 40), len(good) - 1):
        newest.write_bytes(good[:end])
        assert checkpoints.last() == 1
    newest.write_bytes(good + b"\0")
    assert checkpoints.last() == 1 and "corrupt" in caplog.text


def test_rotten_companions(pair, caplog):
    "A fingerprint or a pointer that is damaged costs a checkpoint at most, and never without a word."
    checkpoints, newest, _ = pair
    sidecar, pointer = newest.with_name(newest.name + ".sha256"), newest.with_name("last.json")
    noted, pointed, draw = sidecar.read_bytes(), pointer.read_bytes(), random.Random(0)
    for file, right in ((sidecar, noted), (pointer, pointed)):
        for _ in range(60):
            at = draw.randrange(8 * len(right))
            caplog.clear()
            file.write_bytes(right[: at // 8] + bytes([right[at // 8] ^ 1 << at % 8]) + right[at // 8 + 1 :])
            last = checkpoints.last()
            assert last == 2 or (file is sidecar and last == 1 and "corrupt" in caplog.text), (file.name, at, last)
        file.write_bytes(right)
    for file, right, said in (
        (sidecar, noted, "step 2, which is not there"),
        (newest, newest.read_bytes(), "not there"),
    ):
        file.unlink()
        caplog.clear()
        assert checkpoints.last() == 1 and said in caplog.text
        file.write_bytes(right)
    pointer.unlink()
    assert checkpoints.last() == 2
    for path in newest.parent.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(OSError, match="none of 2 checkpoints verifies"):
        checkpoints.last()


def test_what_is_current(tmp_path):
    "A run that goes on from an older step is the current one, whatever lies beyond; as many as asked for are kept."
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.last() is None and checkpoints.steps() == []
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.load()
    for step in (10, 20, 30):
        checkpoints.save(state(step), step)
    assert checkpoints.steps() == [20, 30]
    checkpoints.save(state(25), 25)
    assert checkpoints.last() == 25 and checkpoints.steps() == [20, 25, 30]
    Path(checkpoints.path(25)).write_bytes(b"gone")
    assert checkpoints.last() == 20
    with pytest.raises(ValueError, match="keep is .* 1 or more, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_checkpoint_without_a_fingerprint(tmp_path, caplog):
    "One that was copied alone is loaded when it is named, and it is said that nothing vouches for it."
    Checkpoints(tmp_path / "run").save(state(3), 3)
    alone = tmp_path / "copied.ckpt"
    alone.write_bytes(Path(Checkpoints(tmp_path / "run").path(3)).read_bytes())
    assert step_of(VerifiedCheckpointIO().load_checkpoint(alone)) == 3
    assert "no copied.ckpt.sha256 beside it" in caplog.text
    with pytest.raises(FileNotFoundError, match="absent.ckpt is not there"):
        VerifiedCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")


# Programs


class Bomb:
    "Writes a file when it is unpickled."

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def hostile(target: Path) -> dict[str, bytes]:
    "Files that run code when they are opened without care."
    bomb, forms = Bomb(target), {}
    for name, held in {"alone": bomb, "value": {"state_dict": {"a": bomb}}, "list": {"x": [1, [bomb]]}}.items():
        buffer = io.BytesIO()
        torch.save(held, buffer)
        forms[f"zip, {name}"] = buffer.getvalue()
        buffer = io.BytesIO()
        torch.save(held, buffer, _use_new_zipfile_serialization=False)
        forms[f"legacy, {name}"] = buffer.getvalue()
    forms["pickle"] = pickle.dumps({"state_dict": bomb})
    array = np.empty(1, object)
    array[0] = bomb
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    forms["npy"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(member := tarfile.TarInfo(name), io.BytesIO(pickle.dumps(bomb)[: member.size]))
    forms["tar"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(bomb))
        file.writestr("archive/version", "3\n")
    forms["zip by hand"] = buffer.getvalue()
    return forms


def test_the_bombs_explode(tmp_path):
    "Opened without care, they do what they say."
    for name, data in hostile(tmp_path / "exploded").items():
        if name.startswith(("zip", "legacy")):
            torch.load(io.BytesIO(data), weights_only=False)
            assert (tmp_path / "exploded").exists(), name
            (tmp_path / "exploded").unlink()


@pytest.mark.parametrize("forced", [False, True])
def test_hostile_checkpoints(tmp_path, monkeypatch, forced):
    "Whoever wrote the fingerprint too, and whatever the environment forces: refused, nothing runs."
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(state(1), 1)
    path = Path(checkpoints.path(1))
    for name, data in hostile(tmp_path / "exploded").items():
        path.write_bytes(data)
        path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
        for load in (
            checkpoints.load,
            lambda: VerifiedCheckpointIO().load_checkpoint(path, weights_only=False),
            lambda: export_checkpoint(tmp_path / "run", tmp_path / "model"),
            lambda: export_checkpoint(path, tmp_path / "model"),
        ):
            with pytest.raises(ValueError, match="step=000000001.ckpt is refused.*nothing of it was run"):
                load()
            assert not (tmp_path / "exploded").exists(), name
    assert not (tmp_path / "model").exists()


def test_only_plain_data_is_saved(tmp_path, s3_server, monkeypatch):
    "What could not be read back without running code is refused when it is saved, by its place and never its content."
    s3_server.env(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1), 1)
    for foreign in (
        OmegaConf.create({"embed_dim": 8}), Path("shards"), np.float64(0.1), np.zeros(3), GP2VecConfig(),
        Bomb(tmp_path), s3_server.fs(), Store("s3://private", credentials="environment"), checkpoints, lambda: None,
    ):  # fmt: skip
        for place, where in (({"model": foreign}, r"\['model'\]"), ({"a": [0, (foreign,)]}, r"\['a'\]\[1\]\[0\]")):
            with pytest.raises(ValueError, match=f"hyper_parameters{where} is a .*{type(foreign).__name__}") as error:
                checkpoints.save(state(2) | {"hyper_parameters": place}, 2)
            assert "\n" not in str(error.value) and SECRET not in str(error.value)
    assert checkpoints.steps() == [1] and len(list(tmp_path.iterdir())) == 3


# S3


@pytest.fixture
def run(s3_server, fault_proxy, monkeypatch, request):
    "The checkpoints of a run on S3, behind the proxy, with the patience of a test."
    s3_server.env(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint_url)
    monkeypatch.setattr(Place, "retry", QUICK)
    return Checkpoints(f"s3://private/checkpoints-{request.node.name.translate({91: 45, 93: None})}", keep=2)


def test_checkpoints_on_s3(s3_server, run, caplog, tmp_path):
    "Saved, kept, current, corrupt, and exported, as in a folder."
    for step in (1, 2, 3):
        run.save(state(step), step)
    assert run.steps() == [2, 3] and run.last() == 3 and step_of(run.load()) == 3
    assert run.path(3) == f"{run.store.url('').rstrip('/')}/step=000000003.ckpt"
    run.save(state(4), 3)
    assert step_of(run.load(3)) == 4
    path, fs = run.path(3).removeprefix("s3://"), s3_server.fs()
    noted = fs.cat_file(path + ".sha256").decode().split()
    good = fs.cat_file(path)
    assert noted == [hashlib.sha256(good).hexdigest(), "step=000000003.ckpt"]
    fs.pipe_file(path, good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    assert run.last() == 2 and step_of(run.load()) == 2 and "step=000000003.ckpt is corrupt" in caplog.text
    with pytest.raises(OSError, match="corrupt"):
        VerifiedCheckpointIO().load_checkpoint(run.path(3))
    plugin = VerifiedCheckpointIO()
    plugin.save_checkpoint(state(5), Path(run.path(5)))  # a strategy may have folded the slashes
    assert not Path("s3:").exists() and run.last() == 5
    plugin.save_checkpoint(state(6), run.path(5).replace("step=000000005", "best"))
    assert run.last() == 5 and step_of(plugin.load_checkpoint(run.path(5).replace("step=000000005", "best"))) == 6
    plugin.remove_checkpoint(run.path(5))
    assert run.last() == 2


@pytest.mark.parametrize("mode", ["500", "503", "reset", "upload_bitflip", "answer_lost"])
def test_saving_through_faults(run, fault_proxy, mode):
    "Two such faults in each request of a save, and it is saved."
    for match in ("PUT /", ".sha256", ".ckpt", "last.json"):
        fault_proxy.inject(mode, 2, match)
    run.save(state(1), 1)
    fault_proxy.clear()
    assert step_of(run.load()) == 1 and fault_proxy.faults[mode] >= 8


def test_an_outage_is_no_corruption(run, fault_proxy, caplog):
    "Where the newest cannot be had just now the run does not silently go on from an older one."
    for step in (1, 2):
        run.save(state(step), step)
    run.store.retry = Retry(budget=0.3, first=0.01, longest=0.05, timeout=0.5)
    name = "000000002.ckpt"
    for ask in (run.last, run.load):  # the fingerprint is still had, or not even that
        fault_proxy.inject("replaced", 1, f"{name}.sha256", lambda: fault_proxy.inject("503", -1, name))
        for what in (name, f"{name}.sha256"):
            with pytest.raises(OSError, match=f"step={what}: no answer"):
                ask()
        fault_proxy.clear()
    assert "is corrupt" not in caplog.text


def expire_after(fault_proxy, run, count: int, answer: str) -> list[str]:
    "Let the first `count` requests for a run pass; then the keys have run out. The requests, as they come."
    seen: list[str] = []

    def before():
        seen.append("request")
        if len(seen) == count:
            fault_proxy.expire(KEY, answer)

    fault_proxy.inject("replaced", -1, f"/{run.store.root}", before)
    return seen


@pytest.mark.parametrize("answer", ["expired400", "expired403"])
def test_expired_token(run, s3_server, fault_proxy, tmp_path, monkeypatch, caplog, answer):
    "The keys run out between two requests of a save, wherever: it raises and a copy is kept, the last one stays."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run.save(state(1), 1)
    requests = expire_after(fault_proxy, run, -1, answer)
    run.save(state(2), 2)
    fault_proxy.clear()
    raised = 0
    for count in range(1, len(requests)):
        step = 2 + count
        caplog.clear()
        expire_after(fault_proxy, run, count, answer)
        try:
            run.save(state(step), step)
        except OSError as error:
            raised += 1
            said, copy = str(error), Path(str(error).rpartition(" ")[2])
            assert "was not saved" in said and "ran out" in said and "a copy was kept" in said
            assert "\n" not in said and not any(secret in said for secret in (KEY, SECRET))
            assert step_of(Checkpoints(copy.parent).load()) == step
            fault_proxy.clear()
            assert step_of(run.load()) in (step - 1, step), "the one before was lost"
            run.save(Checkpoints(copy.parent).load(), step)
        else:  # what was left to do was to remove an old one
            assert "old checkpoints stay" in caplog.text
        fault_proxy.clear()
        assert run.last() == step and step_of(run.load()) == step
    print(f"{len(requests)} requests in a save, expired at {raised} and raised")
    assert raised >= 6


def test_renewed_token(run, s3_server, fault_proxy, tmp_path, monkeypatch):
    "The keys run out in the middle of a save and there are new ones in the user's file: nothing is to be seen of it."
    profile = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.fspath(profile))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    def log_in(key, secret):
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    for count in range(1, 6):
        log_in(KEY, SECRET)
        fresh = Checkpoints(run.store.url(""), keep=2)
        fresh.last()
        log_in(NEW_KEY, NEW_SECRET)
        expire_after(fault_proxy, run, count, "expired400")
        before = fault_proxy.faults["expired400"]
        fresh.save(state(count), count)
        assert fault_proxy.faults["expired400"] == before + 1
        fault_proxy.clear()
        assert fresh.last() == count and step_of(fresh.load()) == count


# The trainer


class Tiny(pl.LightningModule):
    "The least that trains like the real one: settings as plain data, the model under its name, and chance."

    def __init__(self, model):
        super().__init__()
        self.save_hyperparameters()
        self.model = GP2Vec(model)

    def training_step(self, batch, batch_idx):
        return self.model(batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Saving(Checkpoint):
    "Save after every step, what is random with it."

    def __init__(self, url, keep=3):
        self.checkpoints = Checkpoints(url, keep)

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.checkpoints.path(trainer.global_step))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.random = checkpoint["random"]

    def on_train_batch_start(self, trainer, *_):
        if hasattr(self, "random"):
            torch.set_rng_state(self.__dict__.pop("random"))


TINY = settings_to_dict(GP2VecConfig.preset("tiny")) | {"embed_dim": 48}
TINY["feature_encoder"]["conv_layers"] = [[32, 11, 4], [32, 7, 4], [32, 5, 2]]
TINY["context_encoder"] |= {"num_layers": 2}


def fit(url, steps: int, resume: bool = False, module: type = Tiny, settings=TINY) -> Checkpoints:
    "Train for some steps, from the last checkpoint where asked to; the checkpoints."
    torch.manual_seed(0)
    saving, windows = Saving(url), [torch.randn(3, 1000)] * 12  # alike: the order of the data is another test's
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=1, accelerator="cpu", callbacks=[EMAWeightAveraging(decay=0.5), saving],
        logger=False, plugins=[VerifiedCheckpointIO()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    path = saving.checkpoints.path(saving.checkpoints.last()) if resume else None
    trainer.fit(module(settings), DataLoader(windows, batch_size=2), ckpt_path=path)
    return saving.checkpoints


def equal(one, other) -> bool:
    "Whether two states are the same to the last bit."
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_training_goes_on(tmp_path, run, where, caplog):
    "A trainer saves through the plugin and goes on to the same bits, also after the newest was damaged; exported."
    whole = fit(tmp_path / "whole", 3).load()
    url = tmp_path / "run" / "checkpoints" if where == "folder" else f"{run.store.url('').rstrip('/')}/checkpoints"
    checkpoints = fit(url, 2)
    name = checkpoints.path(2).rpartition("/")[2]
    checkpoints.store.write(name, checkpoints.store.read(name)[:-1])
    assert fit(url, 3, resume=True).load(3)["global_step"] == 3 and "step=000000002.ckpt is corrupt" in caplog.text
    saved = checkpoints.load()
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "random"):
        assert equal(saved[part], whole[part]), part
    source = os.fspath(url)
    for one in (source, source.removesuffix("/checkpoints"), checkpoints.path(3)):
        weights = export_checkpoint(one, tmp_path / "model").state_dict()
        assert equal(dict(weights), {k.removeprefix("model."): v for k, v in whole["state_dict"].items()})
        assert not equal(dict(weights), {k.removeprefix("model."): v for k, v in whole["current_model_state"].items()})
        assert equal(dict(GP2Vec.from_pretrained(tmp_path / "model").state_dict()), dict(weights))


def test_a_save_that_fails_ends_the_fit(tmp_path, run, fault_proxy, monkeypatch):
    "An expired token while a trainer saves is an error of the trainer."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expire_after(fault_proxy, run, 12, "expired400")
    with pytest.raises(OSError, match="was not saved.*a copy was kept"):
        fit(run.store.url(""), 3)
    fault_proxy.clear()
    assert run.last() == 1


class Careless(Tiny):
    "Keeps its settings as another library's object."

    def __init__(self, model):
        super().__init__(OmegaConf.to_container(model))
        self.save_hyperparameters(model)


def test_settings_are_plain(tmp_path):
    "A module whose hyperparameters could not be read again is told at its first save."
    with pytest.raises(ValueError, match="hyper_parameters is a omegaconf.*make it plain"):
        fit(tmp_path, 1, module=Careless, settings=OmegaConf.create(TINY))


def test_no_secrets(tmp_path, run, s3_server, caplog):
    "Neither checkpoints nor what is logged while they are saved hold a key."
    caplog.set_level(logging.DEBUG, "gp2vec")
    fit(run.store.url(""), 2)
    texts = [caplog.text.encode()]
    for key in run.store.find():
        data = run.store.read(key)
        texts.append(data)
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                texts += [file.read(member) for member in file.namelist()]
    assert len(texts) > 20
    for secret in (KEY, SECRET):
        assert not any(secret.encode() in text for text in texts)


def test_export_to_s3(tmp_path, s3_server, monkeypatch):
    "Under its key, and not in a folder of that name here; another scheme is refused."
    s3_server.env(monkeypatch)
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    run = fit(tmp_path / "run", 1).path(1)
    export_checkpoint(run, "s3://private/exported/model")
    found = s3_server.fs().ls("private/exported/model")
    assert {name.rpartition("/")[2] for name in found} >= {"config.json", "model.safetensors"}
    with pytest.raises(ValueError, match="s3://bucket"):
        export_checkpoint(run, "gs://private/model")
    assert not list(here.iterdir())


def test_wrong_exports(tmp_path):
    "What is no checkpoint of pretraining is refused in one sentence."
    (tmp_path / "empty").mkdir()
    (tmp_path / "metrics.csv").write_text("step,loss")
    (tmp_path / "text.ckpt").write_text("step,loss")
    Checkpoints(tmp_path / "other").save(state(1), 1)
    for name, said in {
        "empty": "holds none", "metrics.csv": "holds none", "absent": "holds none", "text.ckpt": "is refused",
        "other": "not a checkpoint of gp2vec pretraining",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}.*{said}") as error:
            export_checkpoint(tmp_path / name, tmp_path / "model")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()
