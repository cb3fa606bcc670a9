"""Peak memory of a training step (forward, backward, AdamW) above the model's own, against Hugging Face (Linux).

usage: python benchmarks/memory.py [--shape base] [--batch 2] [--rounds 5] [--json FILE]

Two steps, of which the second finds the optimiser's moments in place, as every later one does. Medians over rounds in
fresh processes: where the system's allocator puts things moves a peak by several percent. With `--checkpointing` our
transformer layers are run again in the backward pass instead of being remembered.
"""

import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch
from measure import append, machine, parser, versions
from peak import peak_memory
from peer import SHAPES, ours, peer, same_weights
from pretraining_step import steps


def peaks(shape, batch, checkpointing):
    "The row's name, and what a step of each side needs at most, MiB."
    torch.set_num_threads(1)
    model, theirs = ours(shape), peer(shape)
    same_weights(model, theirs)
    context = model.context_encoder
    context.config = replace(context.config, checkpointing=checkpointing)
    waveforms = torch.randn(batch, 3, 3000, generator=torch.Generator().manual_seed(0))
    sides = steps(model, theirs, waveforms, torch.float32)
    row = f"memory of a training step, {shape}, T {model.frame_count(3000)}, B {batch}"
    row += ", checkpointing" if checkpointing else ""
    return row, {name: peak_memory(partial(twice, run)) for name, run in sides.items()}


def twice(run):
    "The first step makes the moments, the second has them."
    run(), run()


def main():
    options = parser(__doc__, batch=2)
    options.add_argument("--shape", default="base", choices=list(SHAPES))
    options.add_argument("--checkpointing", action="store_true")
    args = options.parse_args()
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        jobs = [fresh.submit(peaks, args.shape, args.batch, args.checkpointing) for _ in range(args.rounds)]
        rows = [job.result() for job in jobs]
    row, measured = rows[0][0], [peak for _, peak in rows]
    middle = {name: statistics.median(peak[name] for peak in measured) for name in measured[0]}
    print(row)
    for name, peak in middle.items():
        told = ", ".join(f"{one[name]:.0f}" for one in measured)
        print(f"  {name:14} {peak:8.0f} MiB above the weights, of {told}; gradients and moments included")
    print(f"peak of the step: {middle['gp2vec'] / middle['Hugging Face']:.2f} of the peer's")
    append({"row": row, "MiB": middle, "machine": machine(), "versions": versions()}, args.json)


if __name__ == "__main__":
    main()
