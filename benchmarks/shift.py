"""How far picks move when a window begins some samples later, and how many onsets lie in their intervals.

usage: python benchmarks/shift.py DATA [--model gp2vec-tiny] [--output benchmarks/published]

The pickers of the published tables on real records (all labels, the same splits, head, budget and seeds), as they come
and with curves averaged over windows moved by parts of a frame (`shifts`), beside PhaseNet's architecture (extra
`seisbench`) and STA/LTA. `shift.csv` has a row per picker, the mean over seeds of `shift_score`; `coverage.csv` the
share of right picks whose onset lies in the interval that promises 90 %, by phase and signal-to-noise ratio.
"""

import time
from dataclasses import replace

import pandas as pd
import torch
from measure import published

from gp2vec.models.gp2vec import GP2Vec
from gp2vec.train.evaluate_downstream import PICKING_ARMS, EvaluationConfig
from gp2vec.train.picking import calibrate, coverage, find_candidates, match_picks, shift_consistency, shift_score
from gp2vec.train.probes import read_onsets, split_parts

PICKERS = {"gp2vec": (1, 2, 4, 8), "PhaseNet from scratch": (1,), "STA/LTA": (1,)}  # arm -> values of `shifts`


def main():
    args = published(__doc__)
    torch.set_num_threads(1)
    model, config = GP2Vec.from_pretrained(args.model).eval(), EvaluationConfig.read("published")
    onsets = read_onsets(args.data).picked()
    stable, covered = [], []
    for arm, averages in PICKERS.items():
        for seed in config.seeds:
            parts = split_parts(onsets.table, config.shares, config.never_test, seed)
            train, dev, test = (onsets.take(parts[name]) for name in ("train", "dev", "test"))
            windows = test.crops(config.picker.window_length, seed=seed)
            made = PICKING_ARMS[arm](model, train, config, replace(config.fit, seed=seed)).eval()
            picker = calibrate(made, dev, seed)
            for shifts in averages:
                picker.config = replace(picker.config, shifts=shifts)
                begin = time.process_time()
                score = shift_score(shift_consistency(picker, test, seed=seed))
                spent = time.process_time() - begin
                stable.append({"picker": arm, "shifts": shifts, "seed": seed, "CPU (s)": spent} | score)
                print(stable[-1], flush=True)
            picker.config = replace(picker.config, shifts=1)
            found = match_picks(find_candidates(picker, windows), windows.table)
            covered.append(coverage(picker, found).assign(picker=arm))
    table = pd.DataFrame(stable).drop(columns="seed").groupby(["picker", "shifts"], sort=False).mean()
    table.to_csv(args.output / "shift.csv")
    print(table.round(4))
    counts = pd.concat(covered).assign(inside=lambda t: (t.picks * t.covered).round().astype(int))
    by = counts.groupby(["picker", "phase", "snr"], sort=False)[["inside", "picks"]].sum()
    by.to_csv(args.output / "coverage.csv")
    print(by)


if __name__ == "__main__":
    main()
