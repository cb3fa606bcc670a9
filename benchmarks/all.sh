#!/usr/bin/env bash
# Every row of the speed page, one after the other, on a quiet machine: about half an hour on two cores.
# usage: bash benchmarks/all.sh FILE     (FILE gets a JSON line per row; the page shows benchmarks/results.jsonl)
set -euo pipefail
out="$(realpath -m "$1")"
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1
for script in decode windows single_windows response read_shards stream_shards workers sampling objective; do
    python "$script.py" --json "$out"
done
python pretraining_step.py --shapes seislm small base149 --batch 2 --json "$out"
python memory.py --json "$out"
python memory.py --checkpointing --json "$out"
python encode.py --batches 1 32 --json "$out"
python annotate.py --json "$out"
python training.py --json "$out"
