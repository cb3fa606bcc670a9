"""Build shards with one process and with two: the same bytes, and how much sooner.

Wall time is what counts, so the machine must be quiet, with two cores at least. The processes are started and warmed up
before, and each does its arithmetic on one core.
"""

import itertools
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import read_shards as local

from gp2vec.data.datapipes import SeismicDataPipeline


def contents(folder: Path) -> dict[str, bytes]:
    "The shards and indices of a folder."
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder, numbers = Path(temporary), itertools.count()
        pipeline = SeismicDataPipeline(local.archive(folder / "archive", 12, 8.0))
        pools = {n: stack.enter_context(ProcessPoolExecutor(n, get_context("spawn"))) for n in (2, 1)}

        def build(workers: int) -> Path:
            out = folder / f"out-{next(numbers)}"
            pipeline.create_webdataset(1, out, executor=pools[workers], progress=False)
            return out

        def gate(results: dict[str, Path]) -> str:
            two, one = (contents(path) for path in results.values())
            assert two == one and len(two) == 2 + 2 * 12
            return f"{len(two)} files, {sum(map(len, two.values())) / 1e6:.0f} MB, byte for byte the same"

        for workers in (2, 2, 1):  # every process has imported what it needs, and compiled its kernels
            build(workers)
        sides = {"two workers": lambda: build(2), "one worker": lambda: build(1)}
        measure.compare("build shards: one worker, two workers", sides, options.rounds, gate, options.json)


if __name__ == "__main__":
    main()
