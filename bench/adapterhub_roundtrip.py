"""Do files that Infuse writes load in the ``adapters`` library, with the same outputs?

    python bench/adapterhub_roundtrip.py [--python python3] [--json OUT]

Makes a virtual environment with ``adapters`` in a temporary folder, writes an adapter of every method on tiny random
models as AdapterHub files, loads them there, and compares the last hidden states.
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
from infuse.testing import inputs, tiny, wake

METHODS = ["houlsby", "pfeiffer", "parallel", "compacter:width=8", "compacter++:width=8", "phm:width=8", "lora:rank=3"]
KINDS = ["bert", "roberta", "distilbert", "bart", "gpt2", "electra"]
THEIRS = """
import json, sys, torch, adapters, transformers
from safetensors.torch import load_file, save_file
for folder in json.load(open(sys.argv[1])):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder + "/base", attn_implementation="eager")
    adapters.init(model)
    model.load_adapter(folder + "/adapter", set_active=True, use_safetensors=True, load_head=False)
    batch = load_file(folder + "/batch.safetensors")
    with torch.no_grad():
        out = model.eval().base_model(**batch).last_hidden_state
    save_file({"out": out.contiguous()}, folder + "/theirs.safetensors")
print(adapters.__version__, transformers.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        subprocess.run([options.python, "-m", "venv", root / "venv"], check=True)
        pip = [root / "venv/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={torch.__version__.split('+')[0]}"], check=True)
        subprocess.run([*pip, "adapters==1.3.0", "sentencepiece"], check=True)
        folders = {}
        for kind in KINDS:
            for method in METHODS:
                folders[f"{kind} {method}"] = prepare(root / f"{kind}-{len(folders)}", kind, method)
        (root / "folders.json").write_text(json.dumps([str(f) for f in folders.values()]))
        command = [root / "venv/bin/python", "-c", THEIRS, root / "folders.json"]
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


def prepare(folder: Path, kind: str, method: str) -> Path:
    """A base, an adapter in AdapterHub's format, a batch, and our output."""
    from transformers import AutoModelForSequenceClassification

    model = tiny(kind, AutoModelForSequenceClassification)
    model.save_pretrained(folder / "base")
    infuse.attach(model, method, "task", trained=())
    wake(model, "task")
    batch = inputs(model)
    with torch.no_grad():
        out = model.base_model(**batch).last_hidden_state
    infuse.save(model, "task", folder / "adapter", format="adapterhub")
    save_file(batch, folder / "batch.safetensors")
    save_file({"out": out.contiguous()}, folder / "ours.safetensors")
    return folder


if __name__ == "__main__":
    main()
