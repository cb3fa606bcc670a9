"""Peak memory of a training step (forward, backward, AdamW) above the model's own, against Hugging Face (Linux).

usage: python benchmarks/memory.py [--shape base] [--batch 2] [--json FILE]

With `--checkpointing` our transformer layers are run again in the backward pass instead of being remembered.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from measure import append, machine, versions
from peak import peak_memory
from peer import SHAPES, ours, peer, same_weights
from pretraining_step import steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="file to which a row is appended")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, theirs = ours(args.shape), peer(args.shape)
    same_weights(model, theirs)
    context = model.context_encoder
    context.config = replace(context.config, checkpointing=args.checkpointing)
    waveforms = torch.randn(args.batch, 3, 3000, generator=torch.Generator().manual_seed(0))
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    sides = steps(model, theirs, waveforms, torch.float32)
    peaks = {name: peak_memory(side) for name, side in sides.items()}
    print(f"{args.shape}, batch {args.batch}, T {model.frame_count(3000)}, weights {weights:.0f} MiB")
    for name, peak in peaks.items():
        print(f"  {name:14} {peak:8.0f} MiB above the weights, gradients and moments ({3 * weights:.0f} MiB) included")
    print(f"peak of the step: {peaks['gp2vec'] / peaks['Hugging Face']:.2f} of the peer's")
    row = f"memory of a training step, {args.shape}, T {model.frame_count(3000)}, B {args.batch}"
    row += ", checkpointing" if args.checkpointing else ""
    append({"row": row, "MiB": peaks, "machine": machine(), "versions": versions()}, args.json)


if __name__ == "__main__":
    main()
