"""Hooks, wrapper modules, or replaced ``forward``: how should a delta reach a frozen module?

    python bench/hooks_or_wrappers.py [--json OUT]

One (IA)³-like scale at 18 sites of a MiniLM-shaped BERT with random weights, put there in three ways. Measured: a
training step, eager and compiled; graph breaks; gradients under checkpointing against plain ones; two
DistributedDataParallel processes against one; whether the base's module names stay.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import interleaved, machine, ratios, table, write
from torch import Tensor, nn
from transformers import BertConfig, BertModel

PATHS = ("attention.self.key", "attention.self.value", "output.dense")


def base() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).requires_grad_(False)


def sites(model: BertModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    found = []
    for layer in model.encoder.layer:
        for path in PATHS:
            parent, _, name = path.rpartition(".")
            found.append((layer.get_submodule(parent), name, layer.get_submodule(path)))
    return found


def scales(model: nn.Module) -> nn.ParameterList:
    model.scales = nn.ParameterList([nn.Parameter(torch.ones(m.out_features)) for _, _, m in sites(model)])
    return model.scales


class Hook:
    def __init__(self, scale: Tensor):
        self.scale = scale

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * self.scale


def hooked(model: BertModel) -> BertModel:
    for scale, (_, _, module) in zip(scales(model), sites(model), strict=True):
        module.register_forward_hook(Hook(scale))
    return model


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Linear, scale: nn.Parameter):
        super().__init__()
        self.inner = inner
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def wrapped(model: BertModel) -> BertModel:
    for scale, (parent, name, module) in zip(scales(model), sites(model), strict=True):
        setattr(parent, name, Wrapper(module, scale))
    return model


class Forward:
    def __init__(self, inner: Callable[[Tensor], Tensor], scale: Tensor):
        self.inner = inner
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def replaced(model: BertModel) -> BertModel:
    for scale, (_, _, module) in zip(scales(model), sites(model), strict=True):
        module.forward = Forward(module.forward, scale)
    return model


WAYS = {"hooks": hooked, "wrappers": wrapped, "replaced forward": replaced}


def batch(rows: int = 8, length: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30_000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs).last_hidden_state.square().mean().backward()


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    step(model, inputs)
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return grads


def checkpointing(make: Callable) -> float:
    model, inputs = make(base()).train(), batch()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return max((a - b).abs().max().item() for a, b in zip(plain, gradients(model, inputs), strict=True))


def worker(rank: int, way: str, port: str, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    inputs = {k: v[4 * rank : 4 * rank + 4] for k, v in batch().items()}
    model = nn.parallel.DistributedDataParallel(WAYS[way](base()))
    grads = gradients(model, inputs)
    if rank == 0:
        torch.save(grads, path)
    dist.destroy_process_group()


def distributed(way: str, port: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/grads.pt"
        mp.spawn(worker, (way, str(port), path), nprocs=2)
        together = torch.load(path)
    alone = gradients(WAYS[way](base()), batch())
    return max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json")
    options = parser.parse_args()
    inputs = batch()
    names = {n for n, _ in base().named_modules()}
    models = {way: make(base()) for way, make in WAYS.items()}
    eager = {way: (lambda m=m: step(m, inputs)) for way, m in models.items()}
    eager_times = ratios(interleaved(eager, options.rounds), "hooks")
    compiled = {}
    breaks = {}
    for way, make in WAYS.items():
        breaks[way] = torch._dynamo.explain(copy.deepcopy(models[way]))(**inputs).graph_break_count
        torch._dynamo.reset()
        compiled[way] = torch.compile(make(base()))
    compiled_times = ratios(
        interleaved({w: (lambda m=m: step(m, inputs)) for w, m in compiled.items()}, options.rounds), "hooks"
    )
    rows = {
        way: {
            "eager ms": eager_times[way]["ms"],
            "eager ratio": eager_times[way]["ratio"],
            "compiled ms": compiled_times[way]["ms"],
            "compiled ratio": compiled_times[way]["ratio"],
            "graph breaks": breaks[way],
            "checkpointing differs by": checkpointing(make),
            "DDP differs by": distributed(way, 29_500 + i),
            "module names kept": names <= {n for n, _ in models[way].named_modules()},
        }
        for i, (way, make) in enumerate(WAYS.items())
    }
    table(f"18 scales in a MiniLM-shaped BERT, 8 rows of 16 tokens ({machine()['processor']})", rows)
    write(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
