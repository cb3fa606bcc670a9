"""Measure sides of a comparison in one process: correctness first, then interleaved rounds, medians of their times.

CPU time counts this process and the children it has waited for, so a ratio of CPU times is a ratio per core and holds
on a machine that others use too; wall time means something only where the load average is low.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = "gp2vec numpy scipy torch transformers seisbench numba obspy pymseed webdataset".split()


def cpu_time() -> float:
    "Seconds of CPU time of this process and of the children it has waited for."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def published(about: str | None) -> argparse.Namespace:
    "What the scripts behind the published tables are asked: labels, model, and where their tables go."
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="folder with picks.csv")
    options.add_argument("--model", default="gp2vec-tiny")
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "published")
    return options.parse_args()


def machine() -> str:
    "The processor, what it has for products, the cores, the memory and the Python of this machine."
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    told = {key.strip(): value.strip() for key, value in lines}
    name = told.get("model name", platform.processor())
    widest = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in told.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    sets = f" ({' '.join(widest)})" if widest else ""
    return f"{name}{sets}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def versions() -> dict[str, str]:
    "Versions of the packages that the figures depend on."
    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def parser(
    description: str | None,  # the script's docstring
    rounds: int = 5,  # unless asked for otherwise
    **numbers: int,  # further options that are whole numbers, and their defaults
) -> argparse.ArgumentParser:  # to which a script may add options of its own
    "The options that every benchmark has, --rounds and --json, and some numbers."
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, of which the median counts")
    made.add_argument("--json", type=Path, help="file to which a row is appended")
    for name, value in numbers.items():
        made.add_argument(f"--{name}", type=int, default=value)
    return made


class Timed(NamedTuple):
    "What a side gives that has measured itself: in other processes, or without its start."

    result: Any
    cpu: float  # s
    wall: float  # s


def _once(side: Callable[[], Any]) -> Timed:
    gc.collect()
    wall, cpu = time.perf_counter(), cpu_time()
    result = side()
    return result if isinstance(result, Timed) else Timed(result, cpu_time() - cpu, time.perf_counter() - wall)


def compare(
    row: str,  # what is measured
    sides: Mapping[str, Callable[[], Any]],  # name -> what to run; the first is ours, the others are peers
    rounds: int = 5,  # of each side
    gate: Callable[[dict[str, Any]], str] | None = None,  # asserts on the results by name, says what holds
    out: Path | None = None,  # file to which the row is appended as JSON
    **more: Any,  # whatever else the row is to say
) -> dict[str, Any]:  # the row
    "Run each side once for the gate and to warm up, then `rounds` times in turn; print and return medians and ratios."
    load = os.getloadavg()[0]
    print(row, flush=True)
    holds = gate({name: _once(side).result for name, side in sides.items()}) if gate else ""
    print(f"  gate: {holds or 'none'}", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for done in range(rounds):
        for name, side in sides.items():
            times[name].append(_once(side)[1:])
        print(f"  round {done + 1}: CPU {', '.join(f'{spent[-1][0]:.4f}' for spent in times.values())} s", flush=True)
    result: dict[str, Any] = {"row": row, "gate": holds, "rounds": rounds, "load": [load, os.getloadavg()[0]]}
    result |= {"machine": machine(), "versions": versions(), "sides": {}} | more
    print(f"  load {load:.1f} -> {os.getloadavg()[0]:.1f}; {result['machine']}")
    ours = next(iter(sides))
    base = [statistics.median(t[i] for t in times[ours]) for i in (0, 1)]
    for name, spent in times.items():
        cpu, wall = ([t[i] for t in spent] for i in (0, 1))
        middle = statistics.median(cpu), statistics.median(wall)
        side = {
            "cpu": middle[0],
            "cpu_range": [min(cpu), max(cpu)],
            "wall": middle[1],
            "wall_range": [min(wall), max(wall)],
        }
        if name != ours:
            side |= {"cpu_ratio": middle[0] / base[0], "wall_ratio": middle[1] / base[1]}
        result["sides"][name] = side
        ratio = f"  {side['cpu_ratio']:6.2f} x CPU {side['wall_ratio']:6.2f} x wall" if name != ours else ""
        print(
            f"  {name:32} CPU {middle[0]:8.4f} s ({min(cpu):.4f}..{max(cpu):.4f})"
            f"  wall {middle[1]:8.4f} s ({min(wall):.4f}..{max(wall):.4f}){ratio}"
        )
    append(result, out)
    return result


def append(row: Mapping[str, Any], out: Path | None) -> None:
    "Add a row to a file of JSON lines, where one is wanted."
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
