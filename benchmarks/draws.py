"""How much the answer for a few labels hangs on which labels they are: the published probe, ten draws of them.

usage: python benchmarks/draws.py DATA [--model gp2vec-tiny] [--output benchmarks/published]

The linear probe of the published tables on earthquakes and noise, once for each of ten seeds, which draw the folds, the
labels and the untrained twin. `draws.csv` has a row per seed and share of the labels: the AUC of each arm. Intervals
of the published tables are over events, with four such draws as they are; those printed here are over draws.
"""

from dataclasses import replace

import pandas as pd
import torch
from measure import published
from scipy.stats import t

from gp2vec.models.gp2vec import GP2Vec
from gp2vec.train.evaluate_downstream import CONTROL, EvaluationConfig, evaluate, read_data

ARMS = {"gp2vec": "gp2vec", CONTROL: "untrained", "handcrafted": "handcrafted"}


def main():
    args = published(__doc__)
    torch.set_num_threads(1)
    model, config = GP2Vec.from_pretrained(args.model).eval(), EvaluationConfig.read("published")
    config = replace(config, protocols=("linear",), fractions=(0.01, 0.05, 0.1), resamples=1)
    windows, _ = read_data(args.data, config, model.config.sampling_rate)
    parts = []
    for seed in range(10):
        table = evaluate(model, windows, "event", replace(config, seeds=(seed,)))
        wide = table[table.arm.isin(ARMS)].pivot(index="labels", columns="arm", values="value").sort_index()
        parts.append(wide.reset_index().rename(columns=ARMS).assign(seed=seed, share=config.fractions))
    found = pd.concat(parts)[["share", "labels", "seed", *ARMS.values()]].sort_values(["share", "seed"])
    found.round(4).to_csv(args.output / "draws.csv", index=False)
    for share, group in found.groupby("share"):
        gain, labels = group["gp2vec"] - group["untrained"], group["labels"].mean()
        half = t.ppf(0.975, len(gain) - 1) * gain.std() / len(gain) ** 0.5
        above = f"above zero in {(gain > 0).sum()} of {len(gain)}"
        print(f"{share:.0%}, {labels:.0f} labels: gain {gain.mean():+.3f} ± {half:.3f}, {above}")


if __name__ == "__main__":
    main()
