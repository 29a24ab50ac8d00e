"""Do files that Infuse writes load in the ``adapters`` library, with the same outputs?

    python bench/adapterhub_roundtrip.py [--python python3 | --adapters PYTHON] [--json OUT]

Makes a virtual environment with ``adapters`` in a temporary folder (or takes an interpreter that has it), writes
adapters of every method and fusions of them on tiny random models as AdapterHub files, loads them there, and compares
the last hidden states.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timing import table, write

import infuse
from infuse.adapter import Adapter, build, key
from infuse.model import attach_at
from infuse.sites import find_sites, select
from infuse.testing import inputs, tiny, wake

METHODS = [
    "houlsby", "pfeiffer", "parallel", "compacter:width=8", "compacter++:width=8", "phm:width=8", "lora:rank=3",
    "lora:rank=3,rslora=true",
]  # fmt: skip
KINDS = ["bert", "roberta", "distilbert", "bart", "gpt2", "electra"]
_TWICE = "fusion:adds=residual"
FUSIONS = [
    ("pfeiffer", "pfeiffer", "fusion"),
    ("parallel", "parallel", _TWICE),
    ("pfeiffer", "parallel:reduction=4", _TWICE),
    ("parallel", "compacter++:width=8", _TWICE),
]
# What the library computes at ALBERT's attention, where it exchanges output and residual.
_AFTER, _BESIDE = "houlsby:roles=attention_output,reads=residual", "houlsby:roles=attention_output"
_HOULSBY = f"{_AFTER} & houlsby:roles=ffn_output"
ALBERT = [
    ("pfeiffer",),
    ("parallel",),
    ("lora:rank=3,rslora=true",),
    (_BESIDE,),
    (_HOULSBY,),
    (f"{_BESIDE} & houlsby:roles=ffn_output,reads=residual",),
    ("pfeiffer", "parallel", _TWICE),
    (_AFTER, _AFTER, "fusion"),
    (_BESIDE, _BESIDE, "fusion:adds=output"),
    (_HOULSBY, _HOULSBY, "fusion"),
]
CASES = [(kind, case) for kind in KINDS for case in (*((m,) for m in METHODS), *FUSIONS)]
CASES += [("albert", case) for case in ALBERT]
THEIRS = """
import json, pathlib, sys, torch, adapters, transformers
from safetensors.torch import load_file, save_file
for folder in json.load(open(sys.argv[1])):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder + "/base", attn_implementation="eager", trust_remote_code=False)
    adapters.init(model)
    member = None
    for member in sorted(pathlib.Path(folder).glob("adapter/members/*")):
        model.load_adapter(str(member), use_safetensors=True, with_head=False)
    if member:
        model.load_adapter_fusion(folder + "/adapter", set_active=True, use_safetensors=True, with_head=False)
    else:
        model.load_adapter(folder + "/adapter", set_active=True, use_safetensors=True, with_head=False)
    batch = load_file(folder + "/batch.safetensors")
    with torch.no_grad():
        out = model.eval().base_model(**batch).last_hidden_state
    save_file({"out": out.contiguous()}, folder + "/theirs.safetensors")
print(adapters.__version__, transformers.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--adapters")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        python = options.adapters or installed(root / "venv", options.python)
        folders = {
            f"{kind} {', '.join(case)}": prepare(root / f"{i}", kind, *case) for i, (kind, case) in enumerate(CASES)
        }
        (root / "folders.json").write_text(json.dumps([str(f) for f in folders.values()]))
        command = [python, "-c", THEIRS, root / "folders.json"]
        versions = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
        rows = {}
        for name, folder in folders.items():
            ours = load_file(folder / "ours.safetensors")["out"]
            theirs = load_file(folder / "theirs.safetensors")["out"]
            rows[name] = {
                "largest difference": (ours - theirs).abs().max().item(),
                "largest value": ours.abs().max().item(),
            }
    table(f"adapters {versions[0]} on transformers {versions[1]} reads files of Infuse {infuse.__version__}", rows)
    write(options.json, {"versions": versions, "rows": rows})


def installed(place: Path, python: str) -> Path:
    """The interpreter of a new environment that has the library."""
    subprocess.run([python, "-m", "venv", place], check=True)
    pip = [place / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
    subprocess.run([*pip, "adapters==1.3.0", "sentencepiece"], check=True)
    return place / "bin/python"


def prepare(folder: Path, kind: str, *methods: str) -> Path:
    """A base, an adapter (or members, and last their mixer) in AdapterHub's format, a batch, and our output."""
    from transformers import AutoModelForSequenceClassification

    model = tiny(kind, AutoModelForSequenceClassification)
    model.save_pretrained(folder / "base")
    members, mixer = (methods[:-1], methods[-1]) if methods[1:] else (methods, None)
    for i, method in enumerate(members):
        attach(model, method, f"task{i}")
        wake(model, f"task{i}", i)
    name = "task0"
    if mixer:
        name = infuse.fuse(model, [f"task{i}" for i in range(len(members))], mixer).name
        wake(model, name)
    batch = inputs(model)
    with torch.no_grad():
        out = model.base_model(**batch).last_hidden_state
    infuse.save(model, name, folder / "adapter", format="adapterhub")
    save_file(batch, folder / "batch.safetensors")
    save_file({"out": out.contiguous()}, folder / "ours.safetensors")
    return folder


def attach(model: torch.nn.Module, methods: str, name: str) -> None:
    """An adapter of one method, or of several that are joined by `` & ``, each at its own roles."""
    sites = find_sites(model)
    parts = [build(name, method, select(sites, method.roles)) for method in map(infuse.make, methods.split(" & "))]
    deltas = {site: part.deltas[key(site)] for part in parts for site in part.sites}
    places = [site for part in parts for site in part.sites.values()]
    attach_at(model, Adapter(name, parts[0].method, places, deltas, parts[0].shared), trained=())


if __name__ == "__main__":
    main()
