"""A route belongs to the calls of its block: pools, streams, tasks, nesting, and what has to be refused."""

import asyncio
import contextvars
import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.pool import ThreadPool

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import infuse
from infuse import InfuseError, scopes
from infuse.testing import inputs, tiny, wake
from infuse.testing.conformance import close, output


class Asked:
    """A model with two adapters, none of them active, that tells by its answers which of them they come from."""

    def __init__(self):
        self.model = tiny("bert").eval()
        self.batch = inputs(self.model)
        for seed, name in enumerate("ab"):
            infuse.attach(self.model, "lora:rank=2", name)
            wake(self.model, name, seed, 0.3)
        infuse.activate(self.model, None)
        self.expected = {name: self.answer(route=name) for name in ("a", "b", None)}

    @torch.no_grad()
    def answer(self, model=None, **route):
        return output(self.model if model is None else model, {**self.batch, **route})

    def __call__(self, model=None, **route):
        out = self.answer(model, **route)
        return next(name for name, expected in self.expected.items() if torch.allclose(out, expected, atol=1e-5))


@pytest.fixture(scope="module")
def asked():
    return Asked()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not (scopes._GENERATORS or scopes._ENTRIES.get() or scopes._TRACED.stack or scopes._TRACED.open[0])


def test_tasks_of_pools_keep_the_route_of_their_block_and_no_longer(asked):
    with ThreadPoolExecutor(1) as older, ThreadPoolExecutor(1) as newer, ThreadPool(1) as threads:
        older.submit(int).result()  # its thread is there before the block
        with infuse.route(asked.model, "a"):
            assert [older.submit(asked).result(), newer.submit(asked).result()] == ["a", "a"]
            assert [
                threads.apply(asked),
                *threads.map(lambda _: asked(), [0]),
                next(threads.imap(lambda _: asked(), [0])),
            ] == ["a"] * 3
            with ThreadPool(1) as inner:
                assert inner.apply(asked) == "a"
        assert [older.submit(asked).result(), newer.submit(asked).result(), threads.apply(asked)] == [None] * 3


def test_a_thread_keeps_the_route_in_which_it_was_started(asked):
    ended, answers = threading.Event(), []
    with infuse.route(asked.model, "a"):
        thread = threading.Thread(target=lambda: (ended.wait(), answers.append(asked())))
        thread.start()
    ended.set()
    thread.join()
    assert answers == ["a"]


def test_a_mixed_route_runs_in_several_threads_at_once(asked):
    names = ["a", "b", None]
    expected = torch.stack([asked.expected[name][row] for row, name in enumerate(names)])
    with infuse.route(asked.model, names), ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(asked.answer) for _ in range(16)]:
            close(future.result(), expected)


def test_every_step_of_a_stream_may_run_in_another_thread_and_context(asked):
    def stream(name):
        with infuse.route(asked.model, name):
            for _ in range(3):
                yield asked()

    streams = [stream("a"), stream("b")]
    with ThreadPoolExecutor(2) as pool:
        steps = [pool.submit(contextvars.copy_context().run, next, s).result() for _ in range(3) for s in streams]
    assert steps == ["a", "b"] * 3 and asked() is None
    for each in streams:
        each.close()


def test_streams_end_in_any_order_or_not_at_all(asked):
    def stream(name):
        with infuse.route(asked.model, name):
            yield asked()
            yield asked()

    first, second, third = stream("a"), stream("b"), stream("a")
    assert [next(first), next(second), next(third), asked()] == ["a", "b", "a", None]
    assert list(first) == ["a"] and asked() is None and list(second) == ["b"] and asked() is None
    del third  # nobody reads it to its end
    assert asked() is None


def test_asynchronous_streams_tasks_and_threads_of_an_event_loop(asked):
    async def stream(name):
        with infuse.route(asked.model, name):
            for _ in range(2):
                await asyncio.sleep(0)
                yield asked()

    async def later():
        await asyncio.sleep(0)
        return asked()

    async def run():
        streams = [stream("a"), stream("b")]
        for _ in range(2):
            assert [await anext(streams[0]), await anext(streams[1]), asked()] == ["a", "b", None]
        for each in streams:
            await each.aclose()
        loop = asyncio.get_running_loop()
        with infuse.route(asked.model, "a"):
            task = asyncio.create_task(later())
            assert await asyncio.gather(later(), later()) == ["a", "a"]
            assert [await asyncio.to_thread(asked), await loop.run_in_executor(None, asked)] == ["a", "a"]
        assert await task == "a" and asked() is None

    asyncio.run(run())


def test_a_task_that_a_stream_starts_is_told_that_its_route_is_unknown(asked):
    async def later():
        return asked()

    async def stream():
        with infuse.route(asked.model, "a"):
            with pytest.raises(InfuseError, match=r"use infuse\.route within the task"):
                await asyncio.gather(later())
            yield

    async def run():
        async for _ in stream():
            pass

    asyncio.run(run())


def test_context_managers_of_ones_own(asked):
    @contextmanager
    def generator(name):
        with infuse.route(asked.model, name):
            yield

    class Block:
        def __init__(self, name):
            self.name, self.stack = name, ExitStack()

        def __enter__(self):
            self.stack.enter_context(infuse.route(asked.model, self.name))

        def __exit__(self, *_):
            self.stack.close()

    def stream(kind):
        with kind("a"):
            yield asked()
            with infuse.route(asked.model, "b"):
                yield asked()
            yield asked()

    for kind in (generator, Block):
        with kind("b"):
            assert asked() == "b"
            assert [(answer, asked()) for answer in stream(kind)] == [("a", "b"), ("b", "b"), ("a", "b")]
        assert asked() is None
    outer, inner = infuse.route(asked.model, "a"), infuse.route(asked.model, "b")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert asked() == "b"
    inner.__exit__(None, None, None)
    assert asked() is None


def test_a_block_may_end_in_another_thread_or_task(asked):
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        block = infuse.route(asked.model, "a")
        first.submit(block.__enter__).result()
        assert first.submit(asked).result() == "a" and asked() is None
        second.submit(block.__exit__, None, None, None).result()
        assert first.submit(asked).result() is None

    async def run():
        with ExitStack() as stack:
            stack.enter_context(infuse.route(asked.model, "a"))

            async def close():
                stack.close()

            await asyncio.create_task(close())
            assert asked() is None

    asyncio.run(run())


def test_an_interrupted_call_leaves_no_route(asked):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = asked.model.encoder.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        asked(route="a")
    handle.remove()
    assert asked() is None


def test_the_route_is_an_argument_of_copies_and_wrappers_too(asked):
    twin = copy.deepcopy(asked.model)
    buffer = io.BytesIO()
    torch.save(asked.model, buffer)
    buffer.seek(0)
    for model in (twin, pickle.loads(pickle.dumps(asked.model)), torch.load(buffer, weights_only=False)):
        assert model.forward.store is model.infuse
        assert [asked(model, route=name) for name in ("a", None)] == ["a", None]
        with infuse.route(asked.model, "b"):
            assert asked(model) is None
    with pytest.raises(InfuseError, match="Unknown adapter 'c'"):
        asked(route="c")
    infuse.detach(twin)
    assert not {"forward", "generate"} & vars(twin).keys()


def test_compiled_models_follow_coroutines(asked):
    torch.compiler.reset()
    compiled = torch.compile(asked.model, backend="eager")

    async def request(name):
        with infuse.route(asked.model, name):
            await asyncio.sleep(0)
            return asked(compiled)

    async def run():
        return await asyncio.gather(request("a"), request("b"), request("a"))

    assert asked(compiled) is None
    assert asyncio.run(run()) == ["a", "b", "a"]
    assert asked(compiled, route="b") == "b" and asked(compiled) is None


def test_residuals_that_a_recomputed_part_lacks_are_an_error():
    model = tiny("bert").eval()
    infuse.attach(model, "pfeiffer:width=4", "a")
    wake(model, "a")
    module = model.encoder.layer[0].output
    hidden, residual = torch.randn(2, 3, 48), torch.randn(2, 3, 32, requires_grad=True)
    with pytest.raises(InfuseError, match="checkpoint, whole layers"):
        checkpoint(module, hidden, residual, use_reentrant=False)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
def test_beams_and_samples_have_the_route_of_their_prompt(kind):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both = {"t5": {"decoder_start_token_id": 0}, "bart": {"decoder_start_token_id": 2, "forced_eos_token_id": None}}
    model = tiny(kind, AutoModelForSeq2SeqLM if kind in both else AutoModelForCausalLM, **both.get(kind, {})).eval()
    for seed, (name, method) in enumerate({"lora": "lora:rank=2", "ia3": "ia3", "bottle": "houlsby:width=4"}.items()):
        infuse.attach(model, method, name)
        wake(model, name, seed, 0.4)
    names, prompts = ["lora", "ia3", None, "bottle"], torch.tensor([[5, 6, 7], [9, 8, 7], [11, 12, 13], [20, 21, 22]])
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}

    def generate(rows, route, **more):
        return model.generate(
            prompts[rows], attention_mask=torch.ones_like(prompts[rows]), route=route, **given, **more
        )

    for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        together = generate(slice(None), names, **more)
        alone = [generate(slice(row, row + 1), name, **more) for row, name in enumerate(names)]
        assert torch.equal(together, torch.cat(alone)), more
    for wrong in ({}, {"num_beams": 2}):
        with pytest.raises(InfuseError, match="The route has 3 entries"):
            generate(slice(None), names[:3], **wrong)
    if kind not in both:
        with pytest.raises(InfuseError, match="beams or samples of one prompt would have different"):
            generate(slice(None), [*names, *names], num_beams=2)
