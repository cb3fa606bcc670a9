"""The contrastive objective alone, projected states to loss, forward and backward, against Hugging Face's formulation.

usage: python benchmarks/objective.py [--batch 16] [--frames 742] [--negatives 100] [--rounds 5]

Both sides get the same states, quantised vectors, codes, mask and distractors. With the default sizes the peer needs
about 8 GB; the ratio hardly depends on the batch, so a smaller one tells the same.
"""

import torch
import torch.nn.functional as F
from measure import append, compare, machine, parser, versions
from peak import peak_memory
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForPreTraining

from gp2vec.models.gp2vec import contrastive, sample_negatives, span_mask


def theirs(states, quantised, mask, index, temperature=0.1):
    "Lines of `Wav2Vec2ForPreTraining.forward` between the projections and the loss."
    batch, frames, width = quantised.shape
    negative = quantised.view(-1, width)[index.long().view(-1)]
    negative = negative.view(batch, frames, -1, width).permute(2, 0, 1, 3)
    logits = Wav2Vec2ForPreTraining.compute_contrastive_logits(quantised[None, :], negative, states, temperature)
    same = (quantised == negative).all(-1)
    if same.any():
        logits[1:][same] = float("-inf")
    logits = logits.transpose(0, 2).reshape(-1, logits.size(0))
    target = ((1 - mask.long()) * -100).transpose(0, 1).flatten()
    return F.cross_entropy(logits.float(), target, reduction="sum") / mask.sum()


def ours(states, quantised, mask, codes, negatives):
    return contrastive(states[mask], quantised[mask], codes, mask.sum(1), negatives)[0]


def inputs(batch, frames, count, width=256, words=320):
    "States, quantised vectors that are codewords, mask, codes at the hidden frames, distractors in both spellings."
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(batch, frames, width, generator=generator).requires_grad_()
    codes = torch.randint(words, (batch, frames, 2), generator=generator)
    table = torch.randn(2, words, width // 2, generator=generator)
    quantised = torch.cat([table[0][codes[..., 0]], table[1][codes[..., 1]]], -1).requires_grad_()
    mask = span_mask(batch, frames, 0.65, 10, generator)
    negatives = sample_negatives(mask.sum(1), count, generator)
    index = torch.zeros(batch, frames, count, dtype=torch.int32)
    for row, hidden in enumerate(mask):
        places, m = hidden.nonzero().ravel(), int(hidden.sum())
        others = negatives[row, :m] + (negatives[row, :m] >= torch.arange(m)[:, None])
        index[row, hidden] = places[others].int() + row * frames
        index[row, ~hidden] = row * frames
    return states, quantised, mask, codes[mask], negatives, index


def main():
    args = parser(__doc__, batch=16, frames=742, negatives=100).parse_args()
    states, quantised, mask, codes, negatives, index = inputs(args.batch, args.frames, args.negatives)
    torch.set_num_threads(1)

    def step(objective):
        def run():
            loss = objective()
            loss.backward()
            gradients = states.grad, quantised.grad
            states.grad = quantised.grad = None
            return loss.item(), *gradients

        return run

    sides = {
        "gp2vec": step(lambda: ours(states, quantised, mask, codes, negatives)),
        "Hugging Face": step(lambda: theirs(states, quantised, mask, index)),
    }

    def gate(made):
        errors = [abs(made["gp2vec"][0] / made["Hugging Face"][0] - 1)]
        pairs = zip(made["gp2vec"][1:], made["Hugging Face"][1:], strict=True)
        errors += [((found - wanted).norm() / wanted.norm()).item() for found, wanted in pairs]
        assert max(errors) < 1e-5, errors
        return f"loss and gradients agree to {max(errors):.0e}"

    row = f"objective, B {args.batch}, T {args.frames}, K {args.negatives}"
    compare(row, sides, args.rounds, gate, args.json)
    peaks = {name: peak_memory(side) for name, side in sides.items()}
    print("  peak " + ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items()), end=": ")
    print(f"{peaks['Hugging Face'] / peaks['gp2vec']:.1f} times less")
    append({"row": f"memory of the {row}", "MiB": peaks, "machine": machine(), "versions": versions()}, args.json)


if __name__ == "__main__":
    main()
