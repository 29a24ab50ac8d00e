"""DistributedDataParallel: two processes with half of the batch each have the gradients of one with the whole."""

import sys

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import infuse
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close

METHODS = ["ia3", "lora", "lora:dora=true", "houlsby", "pfeiffer", "parallel", "compacter:width=8", "fusion"]


def adapted(method):
    """A model in float64 that trains one adapter, or a fusion of two."""
    torch.manual_seed(0)
    model = tiny("bert").eval()
    if method == "fusion":
        for seed, name in enumerate("pq"):
            infuse.attach(model, "pfeiffer", name)
            wake(model, name, seed)
        infuse.fuse(model, ["p", "q"], name="a")
    else:
        infuse.attach(model, method, "a")
    wake(model, "a")
    return model.double()


def gradients(model, wrapped, rows):
    """Parameter → its gradient, of a loss that is a mean over rows, as DDP averages."""
    batch = {name: value[rows] for name, value in inputs(model, rows=4).items()}
    out = wrapped(**batch).last_hidden_state
    (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).square().sum((1, 2)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for method in METHODS:
        model = adapted(method)
        found[method] = gradients(model, DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2))
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Method → gradients, of either process."""
    if not distributed.is_available() or sys.platform == "win32":
        pytest.skip("torch was built without distributed training over gloo")
    folder = tmp_path_factory.mktemp("distributed")
    multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_two_processes_equal_those_of_one(method, of_two):
    model = adapted(method)
    one = gradients(model, model, slice(None))
    assert one and all(grad is not None for grad in one.values())
    largest = max(grad.abs().max() for grad in one.values())
    for two in of_two:
        assert two[method].keys() == one.keys()
        for name, grad in one.items():  # against the largest, as that of a fusion's key bias is exactly zero
            close(two[method][name] / largest, grad / largest, 1e-10)
