"""Damaged and malicious miniSEED in processes with limits: no crash, no hang, no absurd memory, every refusal told."""

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import BOMBS, numbered, originals
from project import few_or_many

from gp2vec.data.preprocessing import REASONS, decode

PROGRAM = Path(__file__).with_name("mutants.py")


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, os.fspath(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=550)


def decode_mutants(seed: int, count: int, folder: Path) -> dict:
    "Two processes decode `count` mutants; what came of them."
    half, total = count // 2, {"outcomes": {}, "slowest": 0.0, "megabytes": 0.0, "defects": []}
    spans = [(0, half, folder / "first"), (half, count, folder / "second")]
    with ThreadPoolExecutor(2) as pool:
        for done, (_, _, place) in zip(pool.map(lambda span: run(seed, *span), spans), spans, strict=True):
            at = place.read_text() if place.exists() else "none"
            assert done.returncode == 0, f"crash or hang ({done.returncode}) at mutant {at}: {done.stderr[-2000:]}"
            said = json.loads(done.stdout)
            for name, number in said["outcomes"].items():
                total["outcomes"][name] = total["outcomes"].get(name, 0) + number
            total["defects"] += said["defects"]
            for name in ("slowest", "megabytes"):
                total[name] = max(total[name], said[name])
    print(f"seed {seed}: {total}")
    assert not total["defects"] and sum(total["outcomes"].values()) == count
    assert set(total["outcomes"]) <= {"used", "no", "ValueError"}
    return total


@few_or_many(2_000, 10_000)
def test_many_mutants(tmp_path, count):
    "Always the same: every one is used, gives no window, or is refused with a `ValueError`."
    total = decode_mutants(20190704, count, tmp_path)
    assert min(total["outcomes"].values()) > count // 20 and total["slowest"] < 5 and total["megabytes"] < 300


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GP2VEC_FRESH"), reason="other mutants every time: GP2VEC_FRESH=1 asks for them")
def test_fresh_mutants(tmp_path):
    "Others every time; the seed is printed."
    decode_mutants(random.SystemRandom().randrange(2**31), 20_000, tmp_path)


def test_records_that_are_good_only_beside_others():
    "Found by fresh seeds: what can be joined neither with the rest nor read alone is told as lost."
    found = decode(numbered(2010259621, 10894, originals()))
    assert found.lost and {lost.reason for lost in found.lost} <= set(REASONS)


def test_mutants_differ():
    "The numbers of the test above mean damage: nearly all mutants differ from what they were made of, and stay so."
    seeds = originals()
    made = [numbered(1, number, seeds) for number in range(300)]
    assert made == [numbered(1, number, seeds) for number in range(300)]
    assert len(set(made) - set(seeds)) > 280


@pytest.fixture(scope="module")
def exploded() -> dict[str, dict]:
    "What each bomb did in a process with limits; those after one that ended it are missing."
    done = run()
    said = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    return said | {"end": f"{done.returncode}: {done.stderr[-2000:]}"}


@pytest.mark.parametrize("name", BOMBS)
def test_allocation_bomb(exploded, name):
    "Headers that ask for terabytes or hours: over in a second, with less than 200 MB."
    assert name in exploded, f"crash or hang: {exploded['end']}"
    said = exploded[name]
    print(said)
    assert said["outcome"] in ("ValueError", "no window", "used"), said  # used: what is sound beside the rest
    assert said["seconds"] < 1 and said["megabytes"] < 200, said
