"""Does AdapterFusion carry knowledge from other intent tasks to a task with ten examples a label?

    python bench/fusion_transfer.py --members clinc/train.csv snips/train.csv --target train_10shot.csv \
        --validation validation.csv [--json OUT]

Pfeiffer adapters are trained on the member tasks once, and on the target; then a fusion of all of them on the target.
Beside it: the target's adapter alone, and logistic regression on the features of the bare base, of each member alone,
and of the members' average. Reported is the best epoch on the validation rows; the members' parameters are compared
before and after, bit for bit.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from timing import machine, table, write

import infuse
from infuse.bases import BaseModel, load_base
from infuse.data import Rows, read
from infuse.model import activate, store_of
from infuse.texts import features, tokenize
from infuse.training.fit import fit
from infuse.training.settings import Settings


def probe(base: BaseModel, adapter: str | None, train: Rows, validation: Rows) -> float:
    """Accuracy of logistic regression on the features under an adapter, in percent."""

    def pooled(rows: Rows) -> np.ndarray:
        return features(base.model, tokenize(base.tokenizer, rows.texts, 128), 0, base.pooling, adapter).numpy()

    model = LogisticRegression(max_iter=2000).fit(pooled(train), train.labels)
    return 100 * model.score(pooled(validation), validation.labels)


def best(base: BaseModel, name: str, train: Rows, validation: Rows, settings: Settings, members: Any = ()) -> float:
    history = fit(base, train, validation, settings, name=name, members=members).history
    return 100 * max(h["eval_accuracy"] for h in history if "eval_accuracy" in h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", nargs="+", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--method", default="pfeiffer")
    parser.add_argument("--fusions", nargs="+", default=["5e-5", "1e-3"], help="learning rates of stage two")
    parser.add_argument("--member-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, validation = read(options.target), read(options.validation)
    base = load_base("minilm", precision="auto")
    scores: dict[str, list[float]] = {"logistic regression, bare base": [probe(base, None, train, validation)]}
    names = []
    for path in options.members:
        names.append(Path(path).resolve().parent.name)
        settings = Settings(method=options.method, epochs=options.member_epochs)
        fit(base, read(path), None, settings, name=names[-1])
        scores[f"logistic regression, {names[-1]} adapter"] = [probe(base, names[-1], train, validation)]
        print(names[-1], flush=True)
    infuse.average(base.model, names, "average")
    scores["logistic regression, average"] = [probe(base, "average", train, validation)]
    before = {n: copy.deepcopy(store_of(base.model)[n].state_dict()) for n in names}
    for seed in range(options.seeds):
        settings = Settings(method=options.method, epochs=options.epochs, seed=seed)
        scores.setdefault(f"{options.method} on the target", []).append(
            best(base, "target", train, validation, settings)
        )
        for rate in options.fusions:
            settings = Settings(method="fusion", learning_rate=float(rate), epochs=options.epochs, seed=seed)
            for label, chosen in (("members", names), ("members and target", [*names, "target"])):
                score = best(base, "fused", train, validation, settings, chosen)
                scores.setdefault(f"fusion of {label}, rate {rate}", []).append(score)
                infuse.detach(base.model, "fused")
        activate(base.model, None)
        infuse.detach(base.model, "target")
        print(f"seed {seed} done", flush=True)
    same = all(torch.equal(v, before[n][k]) for n in names for k, v in store_of(base.model)[n].state_dict().items())
    rows = {
        name: {
            "accuracy": f"{statistics.mean(values):.2f}"
            + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        }
        for name, values in scores.items()
    }
    table(f"{len(train)} target rows, {len(validation)} to validate on ({machine()['processor']})", rows)
    print(f"members unchanged, bit for bit: {same}")
    write(options.json, {"options": vars(options), "scores": scores, "members_unchanged": same})


if __name__ == "__main__":
    main()
