"""Peak memory of a function, in a process of its own (Linux)."""

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path


def peak_memory(
    run: Callable[[], object],  # what to run; what it needs is made before, in the parent
) -> float:  # MiB above what was there before
    "Run in a forked process and tell its high-water mark."
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_measure, args=(run, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the measured process ended with {process.exitcode}: is there enough memory?")
    return queue.get()


def _measure(run, queue):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    queue.put(_status("VmHWM") - before)


def _status(name):
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024
