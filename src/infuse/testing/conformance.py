"""The conformance suite: what holds for every method on every architecture.

Each check takes a method and the name of an architecture (or a function that makes a model) and asserts one law.
Methods start at the identity or elsewhere; :func:`wake` moves their parameters away from the start, so that a check
sees a delta that does something.
"""

import asyncio
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import infuse
from infuse.attention import choose
from infuse.calls import residuals
from infuse.heads import run
from infuse.method import Method
from infuse.model import store_of
from infuse.sites import arch_of
from infuse.testing.tiny import inputs, tiny

Make = str | Callable[[], nn.Module]


def wake(model: nn.Module, name: str, seed: int = 0, size: float = 0.1) -> None:
    """Move an adapter's parameters by normal noise of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in store_of(model)[name].parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def output(model: nn.Module, batch: dict[str, Tensor], route: Any = ...) -> Tensor:
    """Last hidden state or logits; under ``route`` if one is given."""
    if route is ...:
        out = model(**batch)
    else:
        with infuse.route(model, route):
            out = model(**batch)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def starts_at_identity(method: Method, make: Make) -> None:
    """A fresh adapter leaves the outputs as they are (or moves them by no more than the method declares)."""
    model = _model(make)
    batch = inputs(model)
    before = output(model, batch)
    infuse.attach(model, method, "a")
    bound = 1e-4 if method.starts_at_identity else 0.5 * before.abs().max().item()
    torch.testing.assert_close(output(model, batch), before, rtol=0, atol=bound)


def every_delta_matters(method: Method, make: Make) -> None:
    """Moving the parameters at any one site changes the output."""
    model = _model(make)
    batch = inputs(model)
    adapter = infuse.attach(model, method, "a")
    wake(model, "a")
    awake = copy.deepcopy(adapter.state_dict())
    full = output(model, batch)
    for name, delta in adapter.deltas.items():
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter += 0.3
        assert not torch.equal(output(model, batch), full), f"the delta at {name} changes nothing"
        adapter.load_state_dict(awake)


def only_deltas_get_gradients(method: Method, make: Make) -> None:
    """After a backward pass the base has no gradient, and every parameter of the adapter has one."""
    model = _model(make)
    infuse.attach(model, method, "a")
    wake(model, "a")
    output(model, inputs(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("infuse.adapters.a."):
            assert parameter.grad is not None, f"{name} got no gradient"
            assert torch.isfinite(parameter.grad).all(), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, f"{name} of the base got a gradient"


def detach_restores(method: Method, make: Make) -> None:
    """After training, merging and detaching, weights, flags, module tree and outputs are those of before."""
    model = _model(make)
    batch = inputs(model)
    before = copy.deepcopy(model.state_dict())
    modules = [(n, type(m)) for n, m in model.named_modules()]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    out = output(model, batch)
    infuse.attach(model, method, "a")
    assert {n for n, _ in model.named_modules() if not n.startswith("infuse")} == {n for n, _ in modules}
    wake(model, "a")
    if method.mergeable:
        infuse.merge(model, "a")
    infuse.detach(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(output(model, batch), out)


def merge_equals_forward(method: Method, make: Make) -> None:
    """Merged outputs equal unmerged ones; unmerging restores them; what can't be merged says so."""
    model = _model(make)
    batch = inputs(model)
    infuse.attach(model, method, "a")
    wake(model, "a")
    if not method.mergeable:
        try:
            infuse.merge(model, "a")
        except infuse.InfuseError:
            return
        raise AssertionError("a method that is not mergeable was merged")
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before = output(model, batch)
    infuse.merge(model, "a")
    close(output(model, batch), before)
    infuse.unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(output(model, batch), before)


def save_then_load(method: Method, make: Make) -> None:
    """A loaded adapter gives the outputs of the saved one, under another name and beside it."""
    model = _model(make)
    batch = inputs(model)
    infuse.attach(model, method, "a")
    wake(model, "a")
    before = output(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        infuse.save(model, "a", Path(folder) / "adapter")
        infuse.load(model, Path(folder) / "adapter", name="b")
        assert torch.equal(output(model, batch, "b"), before)
        fresh = _model(make)
        infuse.load(fresh, Path(folder) / "adapter", name="c")
        assert torch.equal(output(fresh, batch), before)
        assert store_of(fresh)["c"].method == method


def mixed_equals_one_by_one(method: Method, make: Make) -> None:
    """A batch whose rows use different adapters, or none, gives each row what it gets alone."""
    model = _model(make)
    batch = inputs(model, rows=6)
    for seed, name in enumerate("abc"):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    rows = ["b", None, "a", "c", "b", "a"]
    beside = [[None, "a", "a", "b", "c", None], ["a", "b", None, None, None, None], [None, None, "a", None, None, None]]

    def alone(names: Sequence[str | None]) -> Tensor:
        each = {name: output(model, batch, name) for name in dict.fromkeys(names)}
        return torch.stack([each[name][row] for row, name in enumerate(names)])

    for names in (rows, *beside, ["a", "b", "c", "c", "b", "a"], ["a"] * 6):
        expected = alone(names)
        close(output(model, batch, names), expected)
        with torch.no_grad():
            close(output(model, batch, names), expected)
    for seed, name in enumerate("ab", 8):  # what inference has prepared must not outlive a change
        wake(model, name, seed)
    for names in (rows, ["a"] * 6):
        with torch.no_grad():
            close(output(model, batch, names), alone(names))
    output(model, batch, rows).square().mean().backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone(rows).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(together[name], parameter.grad, 1e-4)


def packed_equals_padded(method: Method, make: Make) -> None:
    """Texts of all lengths, with several adapters or none, give the same hidden states without padding."""
    model = _model(make)
    if not arch_of(model).packs:
        return
    choose(model)
    batch = inputs(model, rows=8, length=40)
    for row, length in enumerate((40, 3, 17, 33, 1, 16, 9, 2)):
        batch["attention_mask"][row, length:] = 0
    batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, model.config.pad_token_id or 0)
    for seed, name in enumerate("abc"):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    for names in (["a", "a", "b", "b", "b", "c", "a", None], ["a"] * 8, [None] * 8):
        with torch.no_grad():
            packed = run(model, batch, names)
            padded = run(model, batch, names, packs=False)["last_hidden_state"]
        assert type(packed) is dict, "the batch was not packed"
        real = batch["attention_mask"].bool()
        close(packed["last_hidden_state"][real], padded[real])


def overfits(method: Method, make: Make) -> None:
    """A few hundred steps pull the outputs of a batch most of the way towards outputs of another adapter."""
    model = _model(make)
    batch = inputs(model)
    infuse.attach(model, method, "goal")
    wake(model, "goal", seed=7)
    target = output(model, batch).detach()
    adapter = infuse.attach(model, method, "a")
    wake(model, "a", size=0.01)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses: list[float] = []
    for _ in range(300):
        loss = (output(model, batch) - target).square().mean()
        losses.append(loss.item())
        if losses[-1] < 0.1 * losses[0]:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the loss fell only from {losses[0]:.2e} to {losses[-1]:.2e}")


def survives_deepcopy(method: Method, make: Make) -> None:
    """A deep copy of an adapted model works on its own."""
    model = _model(make)
    batch = inputs(model)
    infuse.attach(model, method, "a")
    wake(model, "a")
    before = output(model, batch)
    twin = copy.deepcopy(model)
    wake(twin, "a", seed=1)
    assert torch.equal(output(model, batch), before)
    assert not torch.equal(output(twin, batch), before)
    infuse.detach(twin)
    assert torch.equal(output(model, batch), before)


def checkpointing_changes_nothing(method: Method, make: Make) -> None:
    """Gradients under gradient checkpointing equal plain ones, also with a route that ended before the backward.

    They still do on a model whose adapters were detached and attached again, and nothing is left behind by either.
    """
    model = _model(make).train()
    batch = inputs(model)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return
    no_dropout(model)

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)  # both times the same adapters
        for seed, name in enumerate("ab"):
            infuse.attach(model, method, name)
            wake(model, name, seed)
        output(model, batch, ["a", "b", "a"]).square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert not residuals(store_of(model)), "activations have outlived the backward pass"
        infuse.detach(model)
        return found

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = _checkpointing(model)
    for _ in range(2):
        checkpointed = gradients()
        assert checkpointed.keys() == plain.keys()
        for name, gradient in checkpointed.items():
            close(gradient, plain[name])
        assert _checkpointing(model) == functions, "detached, the model still checkpoints for the adapters"


def route_belongs_to_the_call(method: Method, make: Make) -> None:
    """Coroutines, generators, threads, one call with an argument, and recomputation run under their own routes."""
    model = _model(make).eval()
    batch = inputs(model)
    for seed, name in enumerate("ab"):
        infuse.attach(model, method, name)
        wake(model, name, seed)
    infuse.activate(model, None)
    with torch.no_grad():
        expected = {name: output(model, batch, name) for name in ("a", "b", None)}

    @torch.no_grad()
    def check(name: str | None, **route: Any) -> None:
        assert torch.equal(output(model, {**batch, **route}), expected[name]), f"not under {name}"

    async def coroutine(name: str) -> None:
        with infuse.route(model, name):
            for _ in range(2):
                await asyncio.sleep(0)
                check(name)

    async def both() -> None:
        await asyncio.gather(coroutine("a"), coroutine("b"))

    def generator(name: str) -> Iterator[None]:
        with infuse.route(model, name):
            for _ in range(2):
                yield check(name)

    asyncio.run(both())
    streams = [generator("a"), generator("b")]
    for _ in range(2):
        for stream in streams:
            next(stream)
            check(None)
    with infuse.route(model, "a"), ThreadPoolExecutor(1) as pool:
        pool.submit(check, "a").result()
        check("b", route="b")
    check(None)
    _recomputes(model, batch)


def _recomputes(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Gradients through a checkpoint of one's own are those of the route of its forward pass."""
    parameters = list(store_of(model)["a"].parameters())
    found = []
    for reentrant in (None, False, True):
        infuse.activate(model, "b")
        start = torch.zeros((), requires_grad=True)
        with infuse.route(model, "a"):
            whole = lambda zero: output(model, batch) + zero  # noqa: E731  # as one writes it there
            out = whole(start) if reentrant is None else checkpoint(whole, start, use_reentrant=reentrant)
        out.square().mean().backward()
        found.append([p.grad for p in parameters])
        model.zero_grad()
    for plain, *others in zip(*found, strict=True):
        for other in others:
            close(other, plain)


CHECKS: list[Callable[[Method, Make], None]] = [
    starts_at_identity,
    every_delta_matters,
    only_deltas_get_gradients,
    detach_restores,
    merge_equals_forward,
    save_then_load,
    mixed_equals_one_by_one,
    packed_equals_padded,
    overfits,
    survives_deepcopy,
    checkpointing_changes_nothing,
    route_belongs_to_the_call,
]
"""The laws, each a function of a method and an architecture."""


def close(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Largest absolute difference ≤ bound × max(1, largest |expected|)."""
    limit = bound * max(1.0, expected.abs().max().item())
    worst = (actual - expected).abs().max().item()
    assert worst <= limit, f"off by {worst:.2e}, more than {limit:.2e}"


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _checkpointing(model: nn.Module) -> dict[str, Any]:
    functions = {n: getattr(m, "_gradient_checkpointing_func", None) for n, m in model.named_modules()}
    return {n: function for n, function in functions.items() if function is not None}


def _model(make: Make) -> Any:
    torch.manual_seed(0)  # of what the check draws next: the adapter's start
    return tiny(make) if isinstance(make, str) else make()
