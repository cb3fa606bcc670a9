"""How often the demo's model probes better than its own random initialisation: ten seeds, each a whole demo.

usage: python benchmarks/demo_seeds.py [--first 0] [--seeds 10] [--steps N] [--output runs/seeds]

The seed changes everything that is random: the synthetic networks learned from and probed on, weights, masks, order,
split and resampling. Prints a row per seed and writes seeds.csv; a seed that is already there is not repeated.
"""

import argparse
from pathlib import Path

import pandas as pd

from gp2vec.demo import DemoConfig, run_demo


def row(seed: int, results: dict) -> dict:
    "What counts of one demo."
    arms = {arm["arm"]: arm for arm in results["probe"]}
    metrics, stages = results["metrics"], {s["step"]: s["seconds"] for s in results["stages"]}
    return {
        "seed": seed,
        "untrained": arms["untrained gp2vec"]["auc"],
        "handcrafted": arms["handcrafted"]["auc"],
        "gp2vec": arms["gp2vec"]["auc"],
        "gain_low": arms["gp2vec"]["gain_low"],
        "gain_high": arms["gp2vec"]["gain_high"],
        "better": arms["gp2vec"]["gain_low"] > 0,
        "accuracy": metrics["val_accuracy"],
        "chance": metrics["val_chance"],
        "perplexity": metrics["val_perplexity"],
        "complaints": len(results["complaints"]),
        "pretraining_s": stages["pretraining"],
        "total_s": sum(stages.values()),
        "peak_gb": results["peak_memory_gb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--steps", type=int, default=DemoConfig().steps)
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    table, rows = options.output / "seeds.csv", []
    if table.exists():
        rows = pd.read_csv(table).to_dict("records")
    for seed in range(options.first, options.first + options.seeds):
        if seed not in {r["seed"] for r in rows}:
            config = DemoConfig(output=str(options.output / str(seed)), seed=seed, steps=options.steps)
            rows.append(row(seed, run_demo(config)))
            pd.DataFrame(rows).to_csv(table, index=False)
    found = pd.DataFrame(rows)
    print(found.round(3).to_string(index=False))
    print(f"better than its own random initialisation on {found.better.sum()} of {len(found)} seeds")
    print(f"complaints on {(found.complaints > 0).sum()} of {len(found)} seeds")


if __name__ == "__main__":
    main()
