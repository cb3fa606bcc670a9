"""Stream shards from a real S3 server: ShardDataset, whole objects verified, beside webdataset over pipe:curl.

The server (SeaweedFS) runs on this machine and shares its cores. The index has been read, and every round starts with
an empty cache. Batches of 32 as in read_shards.py, in this process. The peer streams ready windows in float32 (equal to
ours, twice the bytes) or float16.
"""

import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

import measure
import read_shards as local

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import KEY, SECRET, weed

from gp2vec.data.archive import Cache
from gp2vec.data.datapipes import SeismicDataPipeline, ShardDataset


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    binary = Path(sys.executable).with_name("weed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "weed").mkdir()
        with weed(str(binary) if binary.exists() else shutil.which("weed"), folder / "weed") as server:
            os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-west-2"}
            os.environ["AWS_ENDPOINT_URL"] = server.endpoint_url
            pipeline = SeismicDataPipeline(local.archive(folder / "archive", 6, 4.0))
            samples = list(pipeline.create_webdataset(1, folder / "shards", shuffle=False))
            pipeline.create_webdataset(1, "s3://public/shards", cache=Cache(folder / "cache", 10**9))
            for name in ("float32", "float16"):
                for i in range(6):  # as many shards as ours
                    local.write_peer(folder / "peer.tar", samples[480 * i : 480 * (i + 1)], name)
                    server.fs().put_file(str(folder / "peer.tar"), f"public/{name}-{i}.tar")
            caches = itertools.count()

            dataset = ShardDataset("s3://public/shards", shuffle=False, mix=1)

            def ours():
                dataset._forget()
                dataset.cache = Cache(folder / f"cache-{next(caches)}", 10**9)
                return local.our_batches(dataset)

            def peer(name: str):
                return local.peer_batches(
                    [f"pipe:curl -sf {server.endpoint_url}/public/{name}-{i}.tar" for i in range(6)]
                )

            def gate(results: dict) -> str:
                assert len(set(results.values())) == 1, results
                local.equal(ours(), peer("float32"))
                count = local.equal(ours(), peer("float16"), 2**-10)
                return f"{count} windows, arrays and metadata equal (float16: within 2^-10 of a window's peak)"

            sides = {"gp2vec": lambda: local.drain(ours())}
            for name in ("float32", "float16"):
                sides[f"webdataset, pipe:curl, {name}"] = lambda name=name: local.drain(peer(name))
            measure.compare("stream shards from S3", sides, options.rounds, gate, options.json)


if __name__ == "__main__":
    main()
