"""Does it learn? Ablations of pretraining on real recordings, judged by probes on events and stations never seen.

usage: python benchmarks/study.py DATA [--arms "span 1.2 s" "span 0.4 s" …] [--seeds 1] [--steps 600] [--output DIR]

DATA holds `buckets/` (objects under their archives' keys), `stationxml/` and `labels/` (picks.csv and waveforms). What
each arm changes of the first, the `tiny` preset with hidden spans of 1.2 s, stands in ARMS. Each is trained on all
100 Hz recordings but those of unclear licence, on as many windows, and asked two questions on labelled windows: P or
S, and event or noise. A row of results goes to study.jsonl in the output folder; an arm and seed that is there already
is not repeated. A run that ends because its codes collapsed is a result, too: its row says so.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import recordings
import torch
import torch.nn.functional as F

from gp2vec.data.augment import AugmentConfig
from gp2vec.data.preprocessing import PreprocessingConfig
from gp2vec.models.gp2vec import GP2VecConfig, settings_from_dict, settings_to_dict
from gp2vec.train.callbacks import CollapsedCodes
from gp2vec.train.pretraining import OptimizerConfig, SchedulerConfig, TrainConfig, WindowData
from gp2vec.train.probes import (
    LabelledWindows,
    area_under_curve,
    crossed_folds,
    frozen_features,
    handcrafted,
    out_of_fold_scores,
    read_onsets,
    untrained,
)
from gp2vec.train.train import TrainerConfig, pretrain

TRAINED_ON = "CI.CCC CI.JRC2 CI.LRL CI.MPM CI.SLA CI.WBM CI.WNM CI.WRV2 CI.WVP2 BK.BRIB BK.CVS UW.SHW".split()
CONTRASTIVE = {"objective": "contrastive", "feature_penalty": 10.0, "quantizer": {
    "type": "gumbel", "codebook_size": 320, "num_codebooks": 2, "codevector_dim": 64}}  # fmt: skip
# arm -> changes of the model; keys with a dot belong to data or training.
ARMS: dict[str, dict] = {
    "span 1.2 s": {},
    "contrastive, Gumbel": CONTRASTIVE,
    "contrastive, Gumbel, unprotected": CONTRASTIVE | {"feature_penalty": 0.0, "feature_grad_mult": 1.0},
    "contrastive, EMA": CONTRASTIVE | {"quantizer": CONTRASTIVE["quantizer"] | {"type": "ema", "codevector_dim": 128}},
    "contrastive, random projection": {"objective": "contrastive", "feature_penalty": 10.0},
    "contrastive, random projection, span 0.4 s": {
        "objective": "contrastive", "feature_penalty": 10.0, "mask_span": 0.4},
    "no high-pass": {"data.highpass": 0.0},
    "high-pass 2 Hz": {"data.highpass": 2.0},
    "span 0.4 s": {"mask_span": 0.4},
    "span 0.8 s": {"mask_span": 0.8},
    "span 1.6 s": {"mask_span": 1.6},
    "stride 4": {"feature_encoder": {"conv_layers": [
        {"channels": 128, "kernel_size": k, "stride": s} for k, s in ((11, 2), (7, 2), (5, 1))]}},
    "stride 16": {"feature_encoder": {"conv_layers": [
        {"channels": 128, "kernel_size": k, "stride": s} for k, s in ((11, 4), (7, 2), (5, 2))]}},
    "lr 3e-4": {"train.lr": 3e-4},
    "lr 3e-3": {"train.lr": 3e-3},
    "encoder gradient 1": {"feature_grad_mult": 1.0},
    "contrastive, Gumbel, no penalty": CONTRASTIVE | {"feature_penalty": 0.0},
    "contrastive, random projection, no penalty": {"objective": "contrastive", "feature_penalty": 0.0},
    "whitened": {"data.whiten": True},
    "no metadata": {"data.metadata": "off"},
    "metadata shuffled": {"data.metadata": "shuffled"},
    "scale per component": {"data.scale": "component"},
    "no augmentation": {"data.augment": "off"},
    "spectra of 0.64 s": {"quantizer": {"spectral_window": 0.64}},
}  # fmt: skip


def merge(settings: dict, changes: dict) -> dict:
    "Settings with some changed, group by group."
    out = dict(settings)
    for name, value in changes.items():
        out[name] = merge(out[name], value) if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out


def labelled(data: Path, config: PreprocessingConfig):
    "Windows around the labelled P and S, and quiet ones, of stations that nothing is trained on."
    found = read_onsets(data / "labels", config).windows()
    name = (found.table.network + "." + found.table.station).to_numpy()
    keep = ~np.isin(name, TRAINED_ON)
    return LabelledWindows(found.waveforms[keep], found.table[keep].reset_index(drop=True), found.sampling_rate)


class Changed(torch.utils.data.Dataset):
    "Windows of a dataset, changed."

    def __init__(self, dataset, change):
        self.dataset, self.change = dataset, change

    def __getattr__(self, name):
        if name.startswith("__") or name in ("dataset", "change"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        return [self.change(sample) for sample in self.dataset.__getitems__(indices)]


def per_component(x: torch.Tensor) -> torch.Tensor:
    "Each component by its own scale, (…, C, N)."
    return x / x.std(-1, keepdim=True).clamp_min(1e-12)


def whiten(x: torch.Tensor, rate: float = 100.0, band: float = 1.0) -> torch.Tensor:
    "Spectra divided by their own mean amplitude over a band around every frequency (Hz), size kept, (…, C, N)."
    spectrum = torch.fft.rfft(x)
    wide = 2 * round(band * x.shape[-1] / rate / 2) + 1
    amplitude = spectrum.abs().reshape(-1, 1, spectrum.shape[-1])
    smooth = F.avg_pool1d(amplitude, wide, 1, wide // 2, count_include_pad=False).reshape(spectrum.shape)
    flat = torch.fft.irfft(spectrum / smooth.clamp_min(1e-12), x.shape[-1])
    return flat * (x.std((-2, -1), keepdim=True) / flat.std((-2, -1), keepdim=True).clamp_min(1e-12))


def unknown(metadata: dict) -> dict:
    "The metadata of a window of which nothing is known."
    nothing = {float: float("nan"), str: ""}
    return {
        name: torch.full_like(value, float("nan") if value.is_floating_point() else False)
        if isinstance(value, torch.Tensor)
        else nothing[type(value)]
        for name, value in metadata.items()
    }


def changed(dataset, changes: dict):
    "The dataset as an arm wants it."
    if changes.get("data.scale") == "component":
        dataset = Changed(dataset, lambda s: s | {"waveform": per_component(s["waveform"])})
    if changes.get("data.whiten"):
        dataset = Changed(dataset, lambda s: s | {"waveform": whiten(s["waveform"])})
    if changes.get("data.metadata") == "off":
        dataset = Changed(dataset, lambda s: s | {"metadata": unknown(s["metadata"])})
    if changes.get("data.metadata") == "shuffled":
        known = {}
        for i in range(0, len(dataset), 7):
            sample = dataset.__getitems__([i])[0]
            known[sample["id"]] = sample["metadata"]
        names = sorted(known)
        other = dict(zip(names, np.random.default_rng(0).permutation(np.array(names)), strict=True))
        dataset = Changed(dataset, lambda s: s | {"metadata": known[other.get(s["id"], names[0])]})
    return dataset


def fold_auc(scores: np.ndarray, positive: np.ndarray, folds: list, weight: np.ndarray) -> float:
    "Mean over folds of the AUC of their test rows, as the first arms were judged; one of a single class is left out."
    return float(np.nanmean([area_under_curve(scores[test], positive[test], weight[test]) for _, test in folds]))


def compare(arms: dict[str, np.ndarray], positive: np.ndarray, table: pd.DataFrame) -> dict[str, np.ndarray]:
    "AUC of each arm, averaged over ten splits by event and station: first of all windows, then of 200 draws of events."
    rng, event = np.random.default_rng(0), pd.factorize(table.event_id)[0]
    number = event.max() + 1
    draws = [np.ones(len(table))]
    draws += [np.bincount(rng.integers(number, size=number), minlength=number)[event] for _ in range(200)]
    found = {name: np.zeros(len(draws)) for name in arms}
    folds_of = [crossed_folds(table, split) for split in range(40)]
    both = [folds for folds in folds_of if all(0 < positive[rows].mean() < 1 for fold in folds for rows in fold)][:10]
    for folds in both:
        for name, features in arms.items():
            scores = out_of_fold_scores(features, positive, folds)
            found[name] += np.array([fold_auc(scores, positive, folds, draw) for draw in draws]) / len(both)
    return found


def questions(model, control, windows, change: Callable[[torch.Tensor], torch.Tensor] | None) -> list[dict]:
    "AUC and its gain over the untrained network, at three depths, for two questions; both see windows as changed."
    rows = []
    for task, labels, positive in (("P or S", ("P", "S"), "S"), ("event or noise", ("P", "noise"), "P")):
        subset = windows.only(*labels)
        x = subset.waveforms
        given = change(torch.from_numpy(x)).numpy() if change else x
        arms = {"handcrafted": handcrafted(x, subset.sampling_rate)}
        for layer in (0, 2, None):
            arms[f"untrained/{layer}"] = frozen_features(control, given, layer)
            arms[f"trained/{layer}"] = frozen_features(model, given, layer)
        found = compare(arms, (subset.table.label == positive).to_numpy(), subset.table)
        for name, auc in found.items():
            over = found[name.replace("trained", "untrained") if name.startswith("trained") else "untrained/0"]
            low, high = np.quantile(auc[1:], (0.025, 0.975))
            gain_low, gain_high = np.quantile((auc - over)[1:], (0.025, 0.975))
            row = {"task": task, "arm": name, "auc": auc[0], "low": low, "high": high, "gain": auc[0] - over[0]}
            rows.append(row | {"gain_low": gain_low, "gain_high": gain_high, "windows": len(subset)})
    return rows


def curve(folder: Path) -> dict[str, list[float]]:
    "Step, accuracy and perplexity while learning, forty points or so, each the mean of its neighbours."
    table = pd.read_csv(folder / "metrics.csv").dropna(subset="train_loss")
    means = table.groupby(np.arange(len(table)) * 40 // len(table))[
        ["step", "train_accuracy", "train_perplexity"]
    ].mean()
    return {name: means[name].round(4).tolist() for name in means}


def run(data: Path, output: Path, arm: str, seed: int, steps: int, batch: int) -> dict:
    "Train one arm and ask."
    changes = ARMS[arm]
    model = {k: v for k, v in changes.items() if not k.startswith(("data.", "train."))}
    settings = settings_to_dict(GP2VecConfig.preset("tiny", mask_span=1.2))
    config = settings_from_dict(GP2VecConfig, merge(settings, model), "model")
    highpass = changes.get("data.highpass", 1.0)
    train, val = recordings.write(data, output / f"highpass-{highpass:g}", highpass)
    windows = WindowData(changed(train, changes), changed(val, changes), batch)
    learning = TrainConfig(
        max_steps=steps, max_epochs=10_000, seed=seed, log_every=max(1, min(10, steps // 4)),
        checkpoint_every=steps, probe_every=0,
        optimizer=OptimizerConfig(lr=changes.get("train.lr", 1e-3)), lr_scheduler=SchedulerConfig(warmup_steps=60),
    )  # fmt: skip
    folder = output / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"
    how = TrainerConfig(accelerator="cpu", devices=1, precision="bf16-mixed")
    begin = time.perf_counter()
    augment = None if changes.get("data.augment") == "off" else AugmentConfig()
    task, metrics = pretrain(config, learning, windows, folder, augment, trainer=how, progress=False)
    seconds = time.perf_counter() - begin
    task.model.eval().save_pretrained(folder / "model")
    change = per_component if changes.get("data.scale") == "component" else None
    change = whiten if changes.get("data.whiten") else change
    answers = questions(task.model.eval(), untrained(config, seed).eval(), labelled(data, train.config), change)
    return {"arm": arm, "seed": seed, "steps": steps, "batch": batch, "seconds": round(seconds),
            "windows": train.count, "metrics": metrics, "curve": curve(folder), "answers": answers}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    table = options.output / "study.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in table.read_text().splitlines()] if table.exists() else []
    done = {(r["arm"], r["seed"]) for r in rows}
    for seed in range(options.seeds):
        for arm in options.arms:
            if (arm, seed) in done:
                continue
            try:
                row = run(options.data, options.output, arm, seed, options.steps, options.batch)
            except CollapsedCodes as error:
                row = {"arm": arm, "seed": seed, "steps": options.steps, "batch": options.batch, "ended": str(error)}
            with table.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if "ended" in row:
                print(f"{arm}, seed {seed}: {row['ended']}", flush=True)
                continue
            best = {a["arm"]: a["auc"] for a in row["answers"] if a["task"] == "P or S"}
            print(f"{arm}, seed {seed}: {row['seconds']} s, accuracy {row['metrics']['val_accuracy']:.3f}, P or S",
                  {k: round(v, 3) for k, v in best.items()}, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
