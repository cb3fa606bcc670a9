"""Seconds of three-component record at 100 Hz that `annotate` reads in a second of one core, beside PhaseNet.

usage: python benchmarks/annotate.py [--presets tiny small base] [--minutes 20] [--rounds 3] [--json FILE]

Whole calls on a stream: segments, filters, windows, network, stitching. Weights are random: they do not change the
speed. `no overlap` has windows side by side. bfloat16 is faster on processors that know it. PhaseNet's architecture
is measured by SeisBench, as it comes, where that is installed.
"""

import copy

import numpy as np
import torch
from measure import compare, parser

from gp2vec.data.embedded import SyntheticConfig, synthetic_network
from gp2vec.data.preprocessing import PreprocessingConfig
from gp2vec.inference import annotate
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig
from gp2vec.train.picking import Picker


def main():
    options = parser(__doc__, 3, minutes=20)
    options.add_argument("--presets", nargs="+", default=["tiny", "small", "base"])
    args = options.parse_args()
    torch.set_num_threads(1)
    seconds = 60.0 * args.minutes
    stream = synthetic_network(SyntheticConfig(stations=1, events=args.minutes // 2, duration=seconds)).stream
    peer = {}
    try:
        from seisbench.models import PhaseNet

        phasenet = PhaseNet(phases="PSN").eval()
        peer["PhaseNet"] = lambda: phasenet.annotate(stream)
    except ImportError:
        print("PhaseNet: not measured, seisbench is not installed")
    for preset in args.presets:
        torch.manual_seed(0)
        picker = Picker(GP2Vec(GP2VecConfig.preset(preset))).eval()
        half = copy.deepcopy(picker).bfloat16()
        side = PreprocessingConfig(window_length=30.0, overlap=0.0)
        sides = {
            "gp2vec bfloat16": lambda p=half: annotate(p, stream),
            "gp2vec float32": lambda p=picker: annotate(p, stream),
            "gp2vec bfloat16, no overlap": lambda p=half, c=side: annotate(p, stream, c, blinding=0.0),
        }
        name = f"annotate, {preset}, {args.minutes} minutes"
        row = compare(name, sides | peer, args.rounds, _gate, args.json, seconds=seconds)
        for name, side in row["sides"].items():
            print(f"  {name}: {seconds / side['cpu']:.0f} x real time per core")


def _gate(made):
    "As many curves of the same samples from bfloat16 as from float32, no probability moved by a twentieth."
    half, full = list(made.values())[:2]
    assert [(t.id, t.stats.starttime, t.stats.npts) for t in half] == [
        (t.id, t.stats.starttime, t.stats.npts) for t in full
    ]
    worst = max(float(np.abs(a.data - b.data).max()) for a, b in zip(half, full, strict=True))
    assert worst < 0.05, worst
    return f"curves of bfloat16 within {worst:.3f} of those of float32"


if __name__ == "__main__":
    main()
