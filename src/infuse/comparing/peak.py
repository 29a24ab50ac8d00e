"""Peak memory of training, in a process of its own: a specification as JSON on standard input, bytes on its output."""

import json
import sys

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infuse.bases import load_base
from infuse.data import Rows
from infuse.memory import Peak
from infuse.model import detach
from infuse.training.fit import fit
from infuse.training.settings import Settings


class _Begin(TrainerCallback):
    """Lets the peak begin with the first step."""

    def __init__(self, peak: Peak):
        self.peak = peak

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == 0:
            self.peak.begin()


def main() -> None:
    spec = json.load(sys.stdin)
    torch.set_num_threads(spec["threads"])
    settings = Settings(**spec["settings"])
    labels = [tuple(label) if isinstance(label, list) else label for label in spec["labels"]]
    rows = Rows(tuple(spec["texts"]), tuple(labels))
    base = load_base(spec["base"], pooling=spec["pooling"], precision=settings.trunk_precision)
    base.model.to("cuda" if torch.cuda.is_available() else "cpu")
    fit(base, rows, None, settings)  # a rehearsal: libraries load modules, and keep kernels for every shape of batch
    detach(base.model)
    peak = Peak()
    fit(base, rows, None, settings, callbacks=[_Begin(peak)])
    print(peak.bytes())


if __name__ == "__main__":
    main()
