"""A trained adapter folded into its base: a plain transformers model that needs nothing at inference."""

from pathlib import Path

from infuse.bases import load_base, write_plain
from infuse.checkpoint import save
from infuse.heads import Head, head_of
from infuse.merging import merge
from infuse.model import attach
from infuse.store import store_of
from infuse.training.folders import ADAPTER, MODEL, check_folder
from infuse.training.predictor import open_run


def merge_run(run: str | Path, out: Path, base: str | None = None) -> Path:
    """Write a run's merged model: ``out/model`` for transformers, ``out/adapter`` with the head alone.

    ``infuse predict`` and ``infuse evaluate`` take ``out`` as they take a run folder.
    """
    check_folder(out, ours=False)
    predictor = open_run(run, base, precision="fp32")
    model = predictor.base.model
    merge(model, predictor.adapter)
    write_plain(predictor.base, store_of(model)[predictor.adapter], out / MODEL)
    head = head_of(model, predictor.adapter)
    merged = load_base(str(out / MODEL), labels=len(head.labels) if head.kind == "hf" else None, pooling=head.pooling)
    bare = attach(merged.model, "head", ADAPTER, trained=())
    bare.head = Head.restore(head.settings(), head.state_dict())
    info = store_of(model)[predictor.adapter].info
    bare.info = info | {"run": info.get("run", {}) | {"precision": "fp32"}}
    save(merged.model, ADAPTER, out / ADAPTER)
    return out
