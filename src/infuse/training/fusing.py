"""Stage two of AdapterFusion over saved runs, and averages of them."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from infuse import storage
from infuse.checkpoint import files_of, header
from infuse.combine import average
from infuse.errors import InfuseError
from infuse.formats.bundle import FILES, write_files
from infuse.heads import Head
from infuse.method import Mixer, make
from infuse.model import store_of
from infuse.training.config import AverageConfig, FuseConfig, TrainConfig
from infuse.training.folders import AVERAGE, check_folder
from infuse.training.members import load_members
from infuse.training.predictor import open_run
from infuse.training.run import Run, Say, train


def fuse_runs(config: FuseConfig, *, say: Say = lambda _: None, callbacks: Sequence = ()) -> Run:
    """Train members where asked, then a fusion over all of them; the run folder also gets the heat maps.

    Members that an interrupted command has finished are taken as they are.
    """
    config.check()  # before members are trained
    if not isinstance(make(config.method), Mixer):
        raise InfuseError(f"{config.method} mixes no adapters: infuse fuse takes fusion and its settings as --method.")
    members = [*config.members, *config.runs]  # a fusion's own config.yaml tells all of them as members
    out = config.folder()
    plain = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    targets = ("head", "validation", "test", "learning_rate", "members")  # not the members': a head hf fits its labels
    usual = {f.name: f.default for f in fields(TrainConfig) if f.name in targets}
    for source in config.member_data:
        folder = out.parent / f"{out.name}-{Path(source).stem}"
        say(f"member {folder.name}: {config.member_method} on {source}")
        own = TrainConfig(
            **{**plain, **usual, "method": config.member_method, "data": source, "out": folder, "baseline": False}
        )
        members.append(train(own, say=say, callbacks=callbacks, keep=True).folder)
    if len(members) < 2:
        raise InfuseError("Fusion needs two or more members: give run folders, or --member-data to train some.")
    return train(TrainConfig(**{**plain, "members": tuple(members), "out": out}), say=say, callbacks=callbacks)


def average_runs(config: AverageConfig, *, say: Say = lambda _: None) -> Path:
    """Write the average of several runs' adapters; its head is the average too where all have the same labels."""
    if len(config.runs) < 2:
        raise InfuseError("Averaging needs two or more run folders.")
    check_folder(config.out, _is_average(config.out))  # before it is made
    with storage.writing(config.out):
        check_folder(config.out, _is_average(config.out))
        files = _average(config, say)
        with storage.replacing(config.out, FILES) as new:
            write_files(new, files)
    return config.out


def _average(config: AverageConfig, say: Say) -> dict[str, bytes]:
    """The files of the average."""
    predictor = open_run(config.runs[0])
    model = predictor.base.model
    names = load_members(model, config.runs)
    soup = average(model, names, AVERAGE, list(config.weights) or None)
    heads = [store_of(model)[name].head for name in names]
    # Confidences are calibrated per adapter: what fits each run does not fit their average, which starts anew.
    fresh = [h.settings() | {"temperature": 1.0, "threshold": 0.0} for h in heads if isinstance(h, Head)]
    if len(fresh) == len(heads) and all(each == fresh[0] for each in fresh):
        share = [w / sum(config.weights) for w in config.weights] or [1 / len(names)] * len(names)
        states = [head.state_dict() for head in heads if head is not None]
        mean = {n: sum((w * s[n] for w, s in zip(share, states, strict=True)), torch.zeros(())) for n in states[0]}
        soup.head = Head.restore(fresh[0], mean)
    else:
        say("the average has no head, since the runs' labels or heads differ: it serves to train on, not to predict")
    known = store_of(model)[names[0]].info  # of which the data, the metrics and the calibration are the run's alone
    soup.info = {name: known[name] for name in ("run", "label_type", "label_columns") if name in known}
    soup.info["average"] = [str(run) for run in config.runs]
    return files_of(model, soup.name)


def _is_average(folder: Path) -> bool:
    try:
        return "average" in header(folder)["info"]
    except InfuseError:
        return False
