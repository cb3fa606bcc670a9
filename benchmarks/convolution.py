"""Convolutions over frames whose channels lie side by side against PyTorch's `Conv1d`, which wants moments to do so.

usage: python benchmarks/convolution.py [--rounds 5]

The feature encoder and the positional convolution at the shapes of the presets and of a peer: forward alone and forward
with backward, float32 and bfloat16, on one thread of the CPU.
"""

from functools import partial

import torch
from measure import compare, parser
from peer import SHAPES
from torch import nn

from gp2vec.models.encoder import ConvLayer, EncoderConfig, FeatureEncoder, FrameConv
from gp2vec.models.transformer import PositionalConv

WINDOWS, SAMPLES = 4, 3000  # 30 s at 100 Hz


def copying(conv, x):
    "What a `Conv1d` does with frames: it copies them into its order, and whoever reads the result copies them back."
    return nn.Conv1d.forward(conv, x.mT).mT.contiguous()


def step(module, x, plain, backward):
    "One pass with either convolution."
    for conv in module.modules():
        if isinstance(conv, FrameConv):
            conv.forward = partial(copying, conv) if plain else partial(FrameConv.forward, conv)
    with torch.set_grad_enabled(backward):
        y = module(x)
        if backward:
            y.square().mean().backward()
    return y.detach()


def gate(results):
    "Both give the same frames, but for rounding."
    ours, theirs = results.values()
    apart = ((ours - theirs).norm() / theirs.norm()).item()
    assert apart < (1e-5 if ours.dtype == torch.float32 else 2e-2), apart
    return f"the same frames, to {apart:.0e} of their norm"


def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in ("seislm", "small", "base"):
        width, _, _, _, convs, kernel = SHAPES[shape]
        encoder = FeatureEncoder(EncoderConfig(3, tuple(ConvLayer(*conv) for conv in convs)))
        waveforms = torch.randn(WINDOWS, 3, SAMPLES)
        frames = torch.randn(WINDOWS, encoder(waveforms[:1]).shape[1], width)
        positions = PositionalConv(width, kernel, 16)
        for name, module, x in (("feature encoder", encoder, waveforms), ("positions", positions, frames)):
            for dtype in (torch.float32, torch.bfloat16):
                for backward in (False, True):
                    passes = "forward and backward" if backward else "forward"
                    sides = {
                        side: partial(step, module.to(dtype), x.to(dtype), side == "Conv1d", backward)
                        for side in ("FrameConv", "Conv1d")
                    }
                    row = f"{name}, {shape}, {str(dtype).removeprefix('torch.')}, {passes}"
                    compare(row, sides, args.rounds, gate, out=args.json)


if __name__ == "__main__":
    main()
