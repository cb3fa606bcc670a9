"""Drawing masks and distractors for a batch, against Hugging Face's NumPy samplers.

usage: python benchmarks/sampling.py [--batch 64] [--frames 742] [--negatives 100] [--rounds 21]
"""

import torch
from measure import compare, parser
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from gp2vec.models.gp2vec import sample_negatives, span_mask


def main():
    args = parser(__doc__, 21, batch=64, frames=742, negatives=100).parse_args()
    torch.set_num_threads(1)
    shape = (args.batch, args.frames)

    def theirs():
        mask = _compute_mask_indices(shape, 0.65, 10, min_masks=2)
        return mask, _sample_negative_indices(shape, args.negatives, mask)

    def ours():
        mask = span_mask(*shape, 0.65, 10)
        return mask, sample_negatives(mask.sum(1), args.negatives)

    def gate(made):
        (found, negatives), (mask, _) = made["gp2vec"], made["Hugging Face"]
        assert abs(mask.mean() / found.float().mean().item() - 1) < 0.05
        for row, count in zip(negatives, found.sum(1).tolist(), strict=True):
            assert row[:count].min() == 0 and row[:count].max() == count - 2
        return "as many hidden frames, distractors over all others; distributions in tests/golden"

    row = f"mask and distractors, B {args.batch}, T {args.frames}, K {args.negatives}"
    compare(row, {"gp2vec": ours, "Hugging Face": theirs}, args.rounds, gate, args.json)


if __name__ == "__main__":
    main()
