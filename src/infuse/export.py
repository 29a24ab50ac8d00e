"""A trained adapter folded into its base: a plain transformers model that needs nothing at inference."""

from dataclasses import replace
from pathlib import Path

from infuse import storage
from infuse.bases import load_base, write_plain
from infuse.checkpoint import files_of, header
from infuse.errors import InfuseError
from infuse.formats.bundle import write_files
from infuse.heads import Head, head_of
from infuse.merging import merge
from infuse.model import attach
from infuse.store import store_of
from infuse.training.folders import ADAPTER, MODEL, check_folder
from infuse.training.predictor import Predictor, open_run


def merge_run(run: str | Path, out: Path, base: str | None = None) -> Path:
    """Write a run's merged model: ``out/model`` for transformers, ``out/adapter`` with the head alone.

    ``infuse predict`` and ``infuse evaluate`` take ``out`` as they take a run folder. If it holds the merged model of
    the same run already, that is replaced.
    """
    check_folder(out, _is_merged(run, out))  # before it is made
    with storage.writing(out):
        check_folder(out, _is_merged(run, out))
        predictor = open_run(run, base, precision="fp32")
        merge(predictor.base.model, predictor.adapter)
        with storage.replacing(out, (ADAPTER, MODEL)) as new:
            with storage.reported(new / MODEL):
                write_plain(predictor.base, store_of(predictor.base.model)[predictor.adapter], new / MODEL)
            write_files(new / ADAPTER, _head_files(predictor, run, new / MODEL, out / MODEL))
    return out


def _head_files(predictor: Predictor, run: str | Path, model: Path, place: Path) -> dict[str, bytes]:
    """The files of an adapter that is a head alone, on the merged model."""
    head = head_of(predictor.base.model, predictor.adapter)
    merged = load_base(str(model), labels=len(head.labels) if head.kind == "hf" else None, pooling=head.pooling)
    bare = attach(merged.model, "head", ADAPTER, trained=())
    store = store_of(merged.model)
    store.base = replace(store.base, name=str(place))
    bare.head = Head.restore(head.settings(), head.state_dict())
    info = store_of(predictor.base.model)[predictor.adapter].info
    bare.info = info | {"run": info.get("run", {}) | {"precision": "fp32"}, "merged": str(run)}
    return files_of(merged.model, ADAPTER)


def _is_merged(run: str | Path, out: Path) -> bool:
    """Whether a folder holds what :func:`merge_run` makes of the run."""
    try:
        return header(storage.current(out) / ADAPTER)["info"].get("merged") == str(run)
    except InfuseError:
        return False
