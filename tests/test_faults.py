"""Networks and servers that fail, before a real S3 server: the bytes are right or one clear error says so."""

import hashlib
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import obspy
import pytest
from conftest import KEY, NEW_KEY, NEW_SECRET, SECRET
from faultproxy import DAMAGES, LOSSES, REFUSALS
from project import few_or_many

from gp2vec.data.archive import (
    Archive,
    Cache,
    Retry,
    Store,
    build_manifest,
    read_records,
    record_index,
    write_archive,
)

# The patience of production in a few hundredths of its time.
QUICK = Retry(budget=20.0, first=0.004, longest=0.03, timeout=0.4)
SIZES = {"small": 700, "medium": 40_000, "large": 300_000}
READ_MODES = [*REFUSALS, *DAMAGES, "reset"]


@pytest.fixture(scope="module")
def bodies(s3_server):
    "Objects of three sizes in both buckets, and 25 tiny ones to list."
    made = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
    for bucket in ("public", "private"):
        s3_server.fs().pipe({f"{bucket}/faults/{name}": body for name, body in made.items()})
    s3_server.fs().pipe({f"public/faults-list/{n:02d}/object": bytes(n) for n in range(25)})
    return made


@pytest.fixture(params=["anonymous", "environment"])
def store(request, s3_server, fault_proxy, bodies, monkeypatch):
    "A store behind the proxy, for readers without keys and with keys."
    s3_server.env(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.endpoint_url)
    return behind(fault_proxy, "public/faults" if request.param == "anonymous" else "private/faults", request.param)


def behind(proxy, path: str, credentials: str = "anonymous", retry: Retry = QUICK) -> Store:
    store = Store(f"s3://{path}", credentials=credentials, endpoint_url=proxy.endpoint_url)
    store.retry = retry
    return store


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("mode", [*READ_MODES, "answer_lost"])
def test_the_faults_are_real(fault_proxy, bodies, mode):
    "Plain HTTP gets wrong bytes, an error or nothing; and then, the fault being over, the right ones."

    def fetch() -> bytes:
        with urllib.request.urlopen(f"{fault_proxy.endpoint_url}/public/faults/medium", timeout=0.4) as answer:
            return answer.read()

    fault_proxy.inject(mode)
    try:
        body = fetch()
    except (OSError, urllib.error.URLError, Exception) as error:
        assert mode not in ("bitflip", "short"), error
    else:
        assert mode in ("bitflip", "short") and body != bodies["medium"]
    assert fetch() == bodies["medium"]


@pytest.mark.parametrize("mode", READ_MODES)
def test_reads_survive(store, fault_proxy, bodies, mode):
    "Twice the same fault, whatever it is, and then the right bytes: of objects, parts and listings."
    times = 1 if mode.startswith("expired") else 2
    ranges = [(5, 900), (30_000, 30_512), (900, 901)]
    whole = bodies["medium"]
    questions = {
        "object": (lambda: store.read("medium"), whole),
        "listed object": (lambda: store.read("medium", len(whole), md5(whole)), whole),
        "part": (lambda: store.read_range("medium", 5, 900), whole[5:900]),
        "parts": (
            lambda: store.read_ranges("medium", ranges, len(whole), md5(whole)),
            [whole[a:b] for a, b in ranges],
        ),
    }
    if mode != "bitflip":  # of a listing: below
        listed = {name: {"byte_size": len(body), "etag": md5(body)} for name, body in sorted(bodies.items())}
        questions["listing"] = (store.find, listed)
        questions["folders"] = (store.folders, [])
    for name, (ask, expected) in questions.items():
        before = fault_proxy.faults[mode]
        fault_proxy.inject(mode, times)
        assert ask() == expected, name
        assert fault_proxy.faults[mode] == before + times, name


@pytest.mark.parametrize("mode", [*REFUSALS, *LOSSES])
def test_writes_survive(s3_server, fault_proxy, bodies, monkeypatch, mode):
    "What a write that returned has written is there, bit for bit."
    s3_server.env(monkeypatch)
    store, body = behind(fault_proxy, "private/faults-written", "environment"), random.Random(mode).randbytes(50_000)
    fault_proxy.inject(mode, 1 if mode.startswith("expired") else 2, "PUT /")
    store.write(mode, body)
    assert s3_server.fs().cat_file(f"private/faults-written/{mode}") == body
    assert fault_proxy.faults[mode]


def test_failed_writes_raise(s3_server, fault_proxy, bodies, monkeypatch):
    "A write that fails to the end says so and leaves what was there: none of them is silent."
    s3_server.env(monkeypatch)
    fs, path = s3_server.fs(), "private/faults-written/kept"
    fs.pipe_file(path, b"old")
    impatient = Retry(budget=0.3, first=0.01, longest=0.05, timeout=0.2)
    store = behind(fault_proxy, "private/faults-written", "environment", impatient)
    for mode in (*REFUSALS, "reset", "upload_bitflip"):
        fault_proxy.inject(mode, -1, "PUT /")
        with pytest.raises(OSError, match="s3://private/faults-written/kept"):
            store.write("kept", b"new")
        assert fs.cat_file(path) == b"old", mode
    fault_proxy.clear()
    with pytest.raises(PermissionError, match="s3://public/faults-written/kept"):
        behind(fault_proxy, "public/faults-written").write("kept", b"new")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionError, match="s3://private/faults-written/kept") as error:
        behind(fault_proxy, "private/faults-written", "environment").write("kept", b"new")
    assert fs.cat_file(path) == b"old"
    assert "wrong" not in str(error.value) and SECRET not in str(error.value)


def endure(server, proxy, name: str, faults: int) -> tuple[int, Counter]:
    "One worker of the test below: faults that struck, and what came of each question."
    draw, direct, results, struck = random.Random(name), server.fs(), Counter(), 0
    bodies = {size: draw.randbytes(bytes_) for size, bytes_ in SIZES.items()}
    for bucket in ("public", "private"):
        direct.pipe({f"{bucket}/{name}/{size}": body for size, body in bodies.items()})
    stores = [behind(proxy, f"public/{name}"), behind(proxy, f"private/{name}", "environment")]
    target, truth = behind(proxy, f"private/{name}-written", "environment"), stores[0].find()
    modes = {"write": [*REFUSALS, *LOSSES], "listing": [m for m in READ_MODES if m != "bitflip"]}

    def ask(kind: str) -> bool:
        "Whether the answer is the truth."
        store, size = draw.choice(stores), draw.choice(list(bodies))
        body, listed = bodies[size], draw.choice([(), (SIZES[size], md5(bodies[size]))])
        if kind == "whole":
            return store.read(size, *listed) == body
        if kind == "parts":
            cuts = sorted(draw.sample(range(len(body)), 6))
            spans = list(zip(cuts[::2], cuts[1::2], strict=True))
            return store.read_ranges(size, spans, *listed) == [body[a:b] for a, b in spans]
        if kind == "listing":
            return stores[0].find() == truth
        new = draw.randbytes(draw.choice([10, 5000]))
        target.write("object", new)
        return direct.cat_file(f"private/{name}-written/object") == new

    while struck < faults:
        kind = draw.choice(["whole", "whole", "parts", "parts", "listing", "write"])
        mode = draw.choice(modes.get(kind, READ_MODES))
        if mode in ("stall", "expired400", "expired403") and draw.random() < 0.8:
            continue  # a time-out, or a new connection: these take long
        times = 1 if mode.startswith("expired") else draw.choice([1, 1, 2, 3])
        proxy.inject(mode, times, f"/{name}" if kind != "listing" else f"prefix={name}")
        try:
            results[kind, "right" if ask(kind) else f"WRONG {mode}"] += 1
        except Exception as error:
            results[kind, f"{mode}: {type(error).__name__}: {error}"] += 1
        struck += times - proxy.clear(f"/{name}" if kind != "listing" else f"prefix={name}")
    return struck, results


@few_or_many(200, 1000)
def test_many_faults(s3_server, fault_proxy, monkeypatch, count):
    "Many faults of every kind in whole reads, parts, listings and writes: no wrong byte is accepted."
    s3_server.env(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(endure, s3_server, fault_proxy, f"endure{n}", count // 4) for n in range(4)]
    struck = sum(job.result()[0] for job in jobs)
    results = sum((job.result()[1] for job in jobs), Counter())
    print(f"{struck} faults: {dict(results)}")
    assert struck >= count and {outcome for _, outcome in results} == {"right"}, results
    assert {kind for kind, _ in results} == {"whole", "parts", "listing", "write"}


def test_damaged_listing_is_harmless(fault_proxy, bodies):
    "A listing has no checksum: whatever a wrong bit makes of it, no wrong byte is read because of it."
    store, outcomes = behind(fault_proxy, "public/faults"), Counter()
    for _ in range(60):
        fault_proxy.inject("bitflip", match="list-type=2")
        try:
            found = store.find()
        except OSError:
            outcomes["refused"] += 1
            continue
        for key, info in found.items():
            fault_proxy.clear()
            try:
                assert store.read(key, **info) == bodies[key]
                outcomes["right"] += 1
            except OSError as error:
                assert f"s3://public/faults/{key}" in str(error)
                outcomes["refused"] += 1
    print(dict(outcomes))
    assert outcomes["right"] > 60


@pytest.mark.parametrize("whole", [True, False])
def test_replaced_object(s3_server, fault_proxy, bodies, whole):
    "An object that is replaced after it was listed is an error; without a listing it is the old or the new one whole."
    fs, old, new = s3_server.fs(), b"old" * 3000, b"new" * 3000
    store = behind(fault_proxy, "public/faults-replaced")

    def read(*listed) -> bytes:
        if whole:
            return store.read("object", *listed)
        return b"".join(store.read_ranges("object", [(0, 3), (8994, 9000)], *listed))

    def replace() -> None:
        fs.pipe_file("public/faults-replaced/object", new)

    for before in ("replaced", "reset"):  # replaced before the first question, or between it and the next
        fs.pipe_file("public/faults-replaced/object", old)
        (info,) = store.find().values()
        fault_proxy.inject("replaced", 1, "GET /", replace) if before == "replaced" else replace()
        with pytest.raises(OSError, match="s3://public/faults-replaced/object.*list it anew"):
            read(9000, info["etag"])
        fault_proxy.clear()
        assert read() in (new, b"newnewnew")

    def replace_late() -> None:
        "Let the other question pass first."
        time.sleep(0.2)
        replace()

    for how in (replace, replace_late):
        fs.pipe_file("public/faults-replaced/object", old)
        fault_proxy.inject("replaced", 1, "GET /", how)
        if whole:
            assert read() == new
        elif how is replace_late:
            with pytest.raises(OSError, match="s3://public/faults-replaced/object.*parts were read; read it anew"):
                read()
        else:  # whether the other question passes first is left to chance
            try:
                assert read() == b"newnewnew"
            except OSError as error:
                assert "parts were read; read it anew" in str(error)


def test_replaced_file(tmp_path):
    "Parts of a file that others keep replacing are of one and the same file."
    store, done = Store(tmp_path), threading.Event()
    store.write("object", b"old" * 10_000)

    def replace() -> None:
        while not done.is_set():
            for body in (b"new" * 10_000, b"old" * 10_000):
                store.write("object", body)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(replace)
        try:
            seen = Counter(b"".join(store.read_ranges("object", [(0, 3), (29_994, 30_000)])) for _ in range(3000))
        finally:
            done.set()
    assert set(seen) == {b"oldoldold", b"newnewnew"}, seen


def test_outage_is_survived(fault_proxy, bodies, caplog):
    "Seven requests in a row without an answer: the work goes on, and the log tells it once."
    caplog.set_level(logging.WARNING, "gp2vec")
    store = behind(fault_proxy, "public/faults", retry=Retry(budget=10.0, first=0.01, longest=0.1, timeout=1.0))
    for mode in ("reset", "503"):
        before = fault_proxy.faults[mode]
        fault_proxy.inject(mode, -1)

        def heal(mode=mode, before=before):
            "A busy machine may take its time over the first requests: end when enough have failed."
            began = time.monotonic()
            while fault_proxy.faults[mode] - before < 7 and time.monotonic() - began < 8:
                time.sleep(0.05)
            fault_proxy.clear()

        end = threading.Thread(target=heal)
        end.start()
        assert store.read("large") == bodies["large"]
        end.join()
        assert fault_proxy.faults[mode] - before >= 7
    assert len(caplog.records) == 2, caplog.text


@pytest.mark.parametrize("mode", ["reset", "503", "500", "stall", "fin"])
def test_outage_beyond_the_budget(fault_proxy, bodies, mode):
    "One error that names the object, soon after the budget is spent."
    store = behind(fault_proxy, "public/faults", retry=Retry(budget=0.6, first=0.01, longest=0.1, timeout=0.2))
    fault_proxy.inject(mode, -1)
    for ask, name in (
        (lambda: store.read("medium"), "s3://public/faults/medium"),
        (lambda: store.read_ranges("medium", [(0, 10), (20_000, 20_010)]), "s3://public/faults/medium"),
        (store.find, "s3://public/faults"),
    ):
        began = time.monotonic()
        with pytest.raises(OSError, match=name) as error:
            ask()
        assert time.monotonic() - began < 3 and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["bitflip", "short"])
def test_damage_that_stays(fault_proxy, bodies, mode):
    "A body that is wrong again and again is never handed out."
    store = behind(fault_proxy, "public/faults")
    fault_proxy.inject(mode, -1)
    body = bodies["medium"]
    for listed in ((), (len(body), md5(body))):
        began = time.monotonic()
        with pytest.raises(OSError, match="s3://public/faults/medium"):
            store.read("medium", *listed)
        assert time.monotonic() - began < QUICK.budget / 2, "a damaged object was waited for as a busy server is"


@pytest.mark.parametrize("answer", ["expired400", "expired403"])
def test_expired_keys_are_renewed(s3_server, fault_proxy, bodies, monkeypatch, tmp_path, answer):
    "The keys in the user's file run out and are replaced there: reading, listing and writing go on, ten times."
    profile = tmp_path / "credentials"
    keys = [(KEY, SECRET), (NEW_KEY, NEW_SECRET)]

    def log_in(key: str, secret: str) -> None:
        profile.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.fspath(profile))
    log_in(*keys[0])
    store = behind(fault_proxy, "private/faults", "environment")
    assert store.read("small") == bodies["small"]
    for turn in range(10):
        fault_proxy.clear()
        fault_proxy.expire(keys[turn % 2][0], answer)
        log_in(*keys[(turn + 1) % 2])
        before = fault_proxy.faults[answer]
        if turn % 4 == 0:
            assert store.read("medium") == bodies["medium"]
        elif turn % 4 == 1:
            store.write("expiry", b"written")
        elif turn % 4 == 2:
            assert set(bodies) <= set(store.find())
        else:
            assert store.read_range("large", 7, 77) == bodies["large"][7:77]
        assert fault_proxy.faults[answer] == before + 1, "asked more than once with keys that have run out"
    fault_proxy.expire(KEY, answer), fault_proxy.expire(NEW_KEY, answer)
    with pytest.raises(PermissionError, match="s3://private/faults/small") as error:
        store.read("small")
    assert not any(secret in str(error.value) for key in keys for secret in key)
    with pytest.raises(PermissionError, match="s3://private/faults/expiry"):
        store.write("expiry", b"lost")


def test_manifest_through_faults(s3_server, fault_proxy, tmp_path):
    "An archive listed, refined from headers, indexed and read in parts through a fault in every third answer."
    stream = obspy.Stream()
    for trace in obspy.read():  # some hours, so that headers are looked at one by one
        trace.data = np.random.default_rng(len(stream)).normal(scale=1e5, size=360_000).astype(np.int32)
        stream += trace
    local = write_archive(tmp_path / "archive", stream, layout="earthscope")
    (key,) = local.find()
    s3_server.fs().pipe_file(f"public/faults-archive/{key}", local.read(key))
    archive = Archive("s3://public/faults-archive", "earthscope", endpoint_url=fault_proxy.endpoint_url)
    archive.retry, days = QUICK, {"start": "2009-08-24", "end": "2009-08-26"}
    asked = {"networks": "BW", "refine": True, **days}
    truth, remote = (build_manifest(a, **asked).drop(columns="url") for a in (local, archive))
    assert len(truth) == 3 and truth.drop(columns="etag").equals(remote.drop(columns="etag"))
    index, hour = record_index(local.read(key)), ("2009-08-24T00:30:00", "2009-08-24T00:31:00")
    minute = read_records(local, key, index, *hour, "EHZ")
    for mode in READ_MODES:
        fault_proxy.inject(mode, 1 if mode.startswith("expired") else 2, key)
        assert remote.equals(build_manifest(archive, **asked).drop(columns="url")), mode
        fault_proxy.inject(mode, 1, key)
        assert index.equals(record_index(archive, key)), mode
        fault_proxy.inject(mode, 1, key)
        assert read_records(archive, key, index, *hour, "EHZ") == minute, mode
    assert 0 < len(minute) < 40_000
    body = bytearray(local.read(key))
    body[200::512] = bytes(byte ^ 1 for byte in body[200::512])
    s3_server.fs().pipe_file(f"public/faults-archive/{key}", bytes(body))
    with pytest.raises(OSError, match="not those of the index"):
        read_records(archive, key, index, *hour, "EHZ")


@pytest.mark.parametrize("mode", READ_MODES)
def test_cache_through_faults(fault_proxy, bodies, tmp_path, mode):
    "A local copy is right whatever happened on the way to it, also where nothing but its name is known."
    store, cache = behind(fault_proxy, "public/faults"), Cache(tmp_path, 10**8)
    for name, known in (("large", {"sha256": sha256(bodies["large"])}), ("medium", {})):
        fault_proxy.inject(mode, 1 if mode.startswith("expired") else 2, name)
        assert cache.path(store, name, **known).read_bytes() == bodies[name]
        assert cache.path(store, name, **known).read_bytes() == bodies[name]
    assert len(list(tmp_path.glob("[!.]*"))) == 2
    with pytest.raises(OSError, match="s3://public/faults/small"):
        cache.path(store, "small", sha256=sha256(bodies["medium"]))
