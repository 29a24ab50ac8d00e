"""One contender in a process of its own: ``python worker.py SPECIFICATION.json`` (started by workers.py).

It speaks JSON, one line per message, and watches its training in one of three ways: ``time`` (seconds of so many steps,
whenever it is told), ``saved`` (bytes saved for backward), ``peak`` (growth of the process).
"""

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from contenders import train
from torch import Tensor, nn

Watch = Generator[None, tuple[Any, Any], None]
"""Resumed once when the base is loaded, and then before every step, with the model and its optimizer."""
Say = Callable[[Any], None]


def timed(spec: dict[str, Any], say: Say) -> Watch:
    yield  # the base is loaded
    model, _ = yield
    masks = _batches(model)
    say("ready")
    while line := sys.stdin.readline():
        masks.clear()
        seconds = []
        start = _now()
        for _ in range(json.loads(line)):
            yield
            end = _now()
            seconds.append(end - start)
            start = end
        say({"seconds": seconds, "tokens": _tokens(masks)})
    os._exit(0)


def saved(spec: dict[str, Any], say: Say) -> Watch:
    """Unique storages per step; the model's own, and those kept from step to step, are not counted."""
    yield
    model, optimizer = yield
    masks = _batches(model)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    steps, before, collected = [], {}, False
    for _ in range(1 + spec["measured"]):
        kept: dict[int, torch.UntypedStorage] = {}
        collected = False

        def keep(tensor: Any, kept: dict = kept) -> Any:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        def pack(tensor: Tensor, keep: Any = keep) -> Tensor:
            return tensor if torch._C._current_graph_task_id() != -1 else keep(tensor)  # not what backward recomputes

        def unpack(tensor: Tensor, keep: Any = keep) -> Tensor:
            nonlocal collected
            if not collected:  # backward begins: what custom functions keep beside their saved tensors
                collected = True
                for each in _attributes():
                    keep(each)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        steps.append(sum(s.nbytes() for p, s in kept.items() if p not in own and p not in before))
        before = kept
        if len(steps) == 1:  # what stays from step to step is known from now on
            masks.clear()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    say(
        {
            "saved": steps[1:],
            "tokens": _tokens(masks),
            "adapter": sum(p.nbytes for p in trained),
            "optimizer": sum(v.nbytes for v in state),
        }
    )
    os._exit(0)


def peak(spec: dict[str, Any], say: Say) -> Watch:
    """Peak of the process over the steps, less what it took when the base was loaded and the optimizer imported."""
    _rehearse()
    yield
    _trim()
    cuda = torch.cuda.is_available()
    start, allocated = _status("VmRSS"), torch.cuda.memory_allocated() if cuda else 0
    yield
    _trim()
    reset = _reset()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(spec["measured"]):
        yield
    result = {"rss": (_status("VmHWM") if reset else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) - start}
    if cuda:
        torch.cuda.synchronize()
        result["cuda"] = torch.cuda.max_memory_allocated() - allocated
    say(result)
    os._exit(0)


def _batches(model: nn.Module | None) -> list[Tensor]:
    """A list that every forward pass appends its batch's mask to."""
    masks: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        masks.append(torch.ones_like(kwargs["input_ids"]) if mask is None else mask)

    if model is not None:
        model.register_forward_pre_hook(see, with_kwargs=True)
    return masks


def _tokens(masks: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Per batch: real tokens, and tokens with padding."""
    return [(int(mask.sum()), mask.numel()) for mask in masks]


def _attributes() -> Iterable[Any]:
    """Tensors that live autograd functions written in Python hold as attributes."""
    for node in gc.get_objects():
        if issubclass(type(node), torch.autograd.function.BackwardCFunction):
            for value in vars(node).values():
                yield from value if isinstance(value, list | tuple) else (value,)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _rehearse() -> None:
    """Import what the first step of any optimizer imports, before memory is measured."""
    weight = torch.zeros(4, 4, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    (weight @ weight).sum().backward()
    nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()


def _trim() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    """Let the peak begin at the present size; False where the system refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    torch.set_num_threads(spec["threads"])

    def say(message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    watch = {"time": timed, "saved": saved, "peak": peak}[spec["watch"]](spec, say)
    next(watch)
    train(spec, lambda: watch.send((None, None)), lambda model, optimizer: watch.send((model, optimizer)))


if __name__ == "__main__":
    main()
