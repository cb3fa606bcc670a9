"""A whole pretraining step (forward, backward, fused AdamW) against Hugging Face's model of the same shapes.

usage: python benchmarks/pretraining_step.py [--shapes seislm small base149 base] [--batch 4] [--rounds 3] [--profile]

Shapes: seislm (T 749), small (T 371), small149, base149 (T 149), base (T 742). Windows of 30 s at 100 Hz with three
components. Both sides draw their own Gumbel noise, get the same mask and distractors, and are compared in float32 and,
where the processor has instructions for it, in bfloat16 autocast; each against the peer in the same type and against
the peer's better one. Floating-point operations are those of products and convolutions, and told as a share of what a
large product reaches here.
"""

import math
import time

import numpy as np
import torch
from measure import compare, parser
from peer import SHAPES, hf, ours, peer, same_weights
from torch.utils.flop_counter import FlopCounterMode

from gp2vec.models.gp2vec import normalise
from gp2vec.train.train import TrainerConfig, working_precision

TYPES = {"float32": torch.float32}
if working_precision(TrainerConfig("cpu", precision="bf16-mixed")) == "bf16-mixed":  # elsewhere it is emulated
    TYPES["bfloat16"] = torch.bfloat16


def exam(frames, batch, count=100):
    "Mask and distractors of the peer's own sampler, and the same distractors as we count them."
    np.random.seed(0)  # noqa: NPY002  the peer draws from it
    mask = hf._compute_mask_indices((batch, frames), 0.65, 10, min_masks=2)
    index = hf._sample_negative_indices((batch, frames), count, mask)
    negatives = torch.zeros(batch, mask.sum(1).max(), count, dtype=torch.int32)
    for row, hidden in enumerate(mask):
        number = np.cumsum(hidden) - 1
        own = np.arange(hidden.sum())[:, None]
        chosen = number[index[row, hidden] - row * frames]
        negatives[row, : hidden.sum()] = torch.from_numpy(chosen - (chosen > own))
    return torch.from_numpy(mask), torch.from_numpy(index), negatives


def steps(model, theirs, waveforms, dtype):
    "One training step of each side, as functions that return the loss per hidden frame."
    mask, index, negatives = exam(model.frame_count(waveforms.shape[-1]), len(waveforms))
    x, hidden = normalise(waveforms)[0], int(mask.sum())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (model, theirs)]

    def finish(loss, optimizer):
        if torch.is_grad_enabled():
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def mine():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(waveforms, mask=mask, negatives=negatives).loss
        return finish(loss, optimizers[0])

    def other():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = theirs(x, mask_time_indices=mask, sampled_negative_indices=index).loss / hidden
        return finish(loss, optimizers[1])

    return {"gp2vec": mine, "Hugging Face": other}


def _backward(gradient, inputs, weight, *rest, out_shape=None, **more):
    "Operations of a convolution's backward pass: PyTorch's own count forgets that groups see a part of the channels."
    once = 2 * math.prod(weight) * gradient[0] * math.prod(gradient[2:])
    return once * sum(rest[-1][:2])  # of the gradients to inputs and weights, those that are asked for


def operations(run):
    "Floating-point operations of products and convolutions in one run."
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter:
        run()
    return counter.get_total_flops()


def peak(dtype, size=1024, repeats=7):
    "Floating-point operations per second of a large matrix product: the best of some."
    a, b = torch.randn(2, size, size).to(dtype)
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        a @ b
        spent.append(time.process_time() - begin)
    return 2 * size**3 / min(spent)


def against_peer(shape, args):
    "Time both sides in both types."
    model, theirs = ours(shape), peer(shape)
    same_weights(model, theirs)
    waveforms = torch.randn(args.batch, 3, 3000, generator=torch.Generator().manual_seed(0))
    model.eval(), theirs.eval()
    with torch.no_grad():  # without noise the same codes are chosen
        found, expected = (run() for run in steps(model, theirs, waveforms, torch.float32).values())
    assert abs(found / expected - 1) < 1e-5, (found, expected)
    model.train(), theirs.train()
    sides = {}
    for name, dtype in TYPES.items():
        for side, run in steps(model, theirs, waveforms, dtype).items():
            sides[f"{side} {name}"] = run
    row = f"pretraining step, {shape}, T {model.frame_count(3000)}, B {args.batch}"
    holds = f"without noise the same loss, {found:.5f}, to {abs(found / expected - 1):.0e}"
    more = {"flops": operations(sides["gp2vec float32"]), "peak": {name: peak(dtype) for name, dtype in TYPES.items()}}
    made = compare(row, sides, args.rounds, lambda first: holds, args.json, **more)
    seconds = {name: side["cpu"] for name, side in made["sides"].items()}
    ours_at, theirs_at = ([seconds[f"{side} {name}"] for name in TYPES] for side in ("gp2vec", "Hugging Face"))
    for name, mine, other in zip(TYPES, ours_at, theirs_at, strict=True):
        share = more["flops"] / mine / more["peak"][name]
        print(
            f"  {name}: {other / mine:.2f} times the peer, {args.batch / mine:.2f} windows/s, "
            f"{more['flops'] / mine / 1e9:.0f} GFLOP/s, {share:.0%} of {more['peak'][name] / 1e9:.0f} of a product"
        )
    print(f"  best setting against the peer's best {min(theirs_at) / min(ours_at):.2f}")


def main():
    options = parser(__doc__, 3, batch=4)
    options.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options.add_argument("--profile", action="store_true", help="where our float32 step spends its time")
    args = options.parse_args()
    torch.set_num_threads(1)
    for shape in args.shapes:
        if args.profile:
            profile(shape, args.batch)
        else:
            against_peer(shape, args)


def profile(shape, batch):
    "Time of the operations of our step."
    model, theirs = ours(shape), peer(shape)
    run = steps(model, theirs, torch.randn(batch, 3, 3000), torch.float32)["gp2vec"]
    run()
    with torch.profiler.profile() as profiler:
        run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    main()
