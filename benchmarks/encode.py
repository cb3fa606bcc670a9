"""`encode` of a base model against Hugging Face's `Wav2Vec2Model` of the same shapes and weights.

usage: python benchmarks/encode.py [--shape base149] [--batches 1 32] [--rounds 3]

gp2vec in float32 and with bfloat16 weights; the peer in float32 and in bfloat16 autocast, and with bfloat16 weights
too: the last line compares our faster with each of theirs. Bfloat16 ratios hold on CPUs with AMX.
"""

import copy

import torch
import torch.nn.functional as F
from measure import compare, parser
from peer import SHAPES, ours, peer, same_weights

from gp2vec.models.gp2vec import normalise


def main():
    options = parser(__doc__, 3)
    options.add_argument("--shape", default="base149", choices=list(SHAPES))
    options.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    args = options.parse_args()
    torch.set_num_threads(1)
    model, theirs = ours(args.shape).eval(), peer(args.shape).eval()
    same_weights(model, theirs)
    half, their_half = copy.deepcopy(model).bfloat16(), copy.deepcopy(theirs.wav2vec2).bfloat16()
    their_half.feature_extractor.forward = lambda x: _stack(their_half.feature_extractor, x)
    for batch in args.batches:
        waveforms = torch.randn(batch, 3, 3000, generator=torch.Generator().manual_seed(0))
        sides = {
            "gp2vec float32": lambda x=waveforms: model.encode(x),
            "gp2vec bfloat16": lambda x=waveforms: half.encode(x).float(),
            "Hugging Face float32": lambda x=waveforms: theirs.wav2vec2(normalise(x)[0]).last_hidden_state,
            "Hugging Face autocast": lambda x=waveforms: _autocast(theirs, x),
            "Hugging Face bfloat16": lambda x=waveforms: their_half(normalise(x)[0].bfloat16()).last_hidden_state,
        }
        with torch.inference_mode():
            row = compare(f"encode, {args.shape}, batch {batch}", sides, args.rounds, _gate, args.json)
        seconds = {name: side["cpu"] for name, side in row["sides"].items()}
        best = min(seconds["gp2vec float32"], seconds["gp2vec bfloat16"])
        ratios = [f"{name} {value / best:.2f}" for name, value in seconds.items() if "Hugging" in name]
        print(f"  gp2vec's faster against {', '.join(ratios)}")


def _gate(made):
    expected = made["Hugging Face float32"]
    cosines = [F.cosine_similarity(value.float(), expected, dim=-1).min().item() for value in made.values()]
    assert min(cosines) > 0.999, cosines
    return f"least cosine of a frame {min(cosines):.5f}"


def _stack(extractor, x):
    for layer in extractor.conv_layers:
        x = layer(x)
    return x


def _autocast(theirs, waveforms):
    with torch.autocast("cpu", torch.bfloat16):
        return theirs.wav2vec2(normalise(waveforms)[0]).last_hidden_state


if __name__ == "__main__":
    main()
