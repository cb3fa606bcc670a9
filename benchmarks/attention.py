"""Attention by PyTorch's fused kernel against two plain batched products: what `attention_kernel` is chosen by.

usage: python benchmarks/attention.py [--device cpu] [--rounds 5]

Forward alone and forward with backward, float32 and bfloat16, at the shapes of the presets and the peers, with and
without a padding mask. Times are of CPU: on another device they say nothing unless it is waited for, as here.
"""

import torch
import torch.nn.functional as F
from measure import compare, parser

from gp2vec.models.transformer import attention_kernel, attention_weights

# windows, frames, heads, width of a head
SHAPES = {
    "base, T 149": (8, 149, 12, 64),
    "small": (4, 371, 4, 64),
    "base": (2, 742, 12, 64),
    "seisLM": (2, 749, 12, 20),
    "base, 60 s": (1, 1492, 12, 64),
    "small, 240 s": (1, 2992, 4, 64),
}


def fused(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def plain(q, k, v, mask):
    return attention_weights(q, k, mask) @ v


def step(attend, qkv, mask, backward):
    "One pass; `qkv` lies in memory as the model's projection leaves it."
    with torch.set_grad_enabled(backward):
        leaf = qkv.requires_grad_(backward)
        mixed = attend(*leaf.permute(2, 0, 3, 1, 4), mask)
        if backward:
            leaf.grad = None
            mixed.backward(mixed.detach())
    if qkv.is_cuda:
        torch.cuda.synchronize()


def main():
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    args = options.parse_args()
    torch.set_num_threads(1)
    for name, (windows, frames, heads, width) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(windows, frames, 3, heads, width, generator=torch.Generator().manual_seed(0))
            qkv = qkv.to(args.device, dtype)
            real = (torch.arange(frames, device=args.device) < frames - 20)[None, None, None]
            for mask in (None, real):
                a, b = (attend(*qkv.permute(2, 0, 3, 1, 4), mask) for attend in (fused, plain))
                assert torch.allclose(a, b, atol=1e-5 if dtype == torch.float32 else 3e-2)
                for backward in (False, True):
                    what = f"{name}, {dtype}, {'padded' if mask is not None else 'full'}"
                    what += ", forward and backward" if backward else ", forward"
                    sides = {
                        "sdpa": lambda q=qkv, m=mask, b=backward: step(fused, q, m, b),
                        "product": lambda q=qkv, m=mask, b=backward: step(plain, q, m, b),
                    }
                    chosen = attention_kernel(args.device, dtype, (windows, heads, frames, frames), backward)
                    sides = dict(sorted(sides.items(), key=lambda side: side[0] != chosen))
                    compare(f"attention, {what}", sides, args.rounds, out=args.json)


if __name__ == "__main__":
    main()
