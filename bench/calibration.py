"""What `infuse calibrate` does to rows that it has not seen, and to texts that no label fits.

    python bench/calibration.py RUN --data validation.csv --out-of-scope oos_validation.csv

Neither file may have been trained or chosen on. Both are halved at random, again and again: temperature and threshold
are fitted to one half and measured on the other. The halvings share one trained run and their rows, so that their
deviation is no standard error.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from timing import table, write

from infuse.calibrating.calibrate import calibration_error, choose_threshold, fit_temperature, log_loss
from infuse.data import read
from infuse.texts import logits, tokenize
from infuse.training.predictor import open_run


def measure(z: torch.Tensor, targets: torch.Tensor, beyond: torch.Tensor, seed: int) -> dict[str, float]:
    """One halving: figures of the halves that nothing was fitted to, in percent but for the likelihoods."""
    draw = np.random.default_rng(seed)
    fitted, held = np.array_split(draw.permutation(len(z)), 2)
    some, others = np.array_split(draw.permutation(len(beyond)), 2)
    temperature = fit_temperature(z[fitted], targets[fitted])

    def confidence(rows: torch.Tensor, t: float) -> np.ndarray:
        return (rows.double() / t).softmax(-1).max(-1).values.numpy()

    right = (z[held].argmax(-1) == targets[held]).numpy()
    found = {
        "temperature": temperature,
        "NLL before": log_loss(z[held], targets[held]),
        "NLL after": log_loss(z[held] / temperature, targets[held]),
        "ECE before": 100 * calibration_error(confidence(z[held], 1.0), right),
        "ECE after": 100 * calibration_error(confidence(z[held], temperature), right),
        "accuracy": 100 * right.mean(),
    }
    inside, outside = confidence(z[held], temperature), confidence(beyond[others], temperature)
    known = confidence(z[fitted], temperature)
    for rule, threshold in (
        ("keep 0.95", choose_threshold(known)),
        ("examples", choose_threshold(known, confidence(beyond[some], temperature))),
    ):
        found |= {
            f"{rule}: threshold": threshold,
            f"{rule}: kept": 100 * (inside >= threshold).mean(),
            f"{rule}: refused": 100 * (outside < threshold).mean(),
            f"{rule}: accuracy of those kept": 100 * right[inside >= threshold].mean(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out-of-scope", required=True)
    parser.add_argument("--halvings", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    predictor = open_run(options.run)
    base, rows = predictor.base, read(options.data)
    encoded = predictor.encoded(rows)
    texts = read(options.out_of_scope, labelled=False).texts
    tokens = tokenize(base.tokenizer, texts, predictor.max_length)
    z, beyond = (logits(base.model, each, base.pad_id, predictor.adapter).clone() for each in (encoded.tokens, tokens))
    each = [measure(z, encoded.targets, beyond, seed) for seed in range(options.halvings)]
    found = {name: [one[name] for one in each] for name in each[0]}
    shown = {n: {"mean": statistics.mean(v), "deviation": statistics.stdev(v)} for n, v in found.items()}
    table(f"{len(rows)} rows, {len(texts)} texts out of scope, {options.halvings} halvings", shown)
    write(options.json, {"rows": len(rows), "out_of_scope": len(texts), "halvings": found})


if __name__ == "__main__":
    main()
