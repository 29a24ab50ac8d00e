"""Files that PEFT 0.21.2 wrote, read by Infuse: the outputs and every gradient are PEFT's."""

import golden
import pytest

import infuse


def run(case, vary):
    """Output and gradients, under PEFT's names, of the case's adapter as Infuse computes them."""
    model = golden.base(case)
    adapter = infuse.load(model, golden.GOLDEN / case / "adapter", name="task")
    vary(model)
    batch = golden.batch(case)
    out = model(**batch).last_hidden_state
    out[batch["attention_mask"].bool()].square().mean().backward()
    results = {"out": out.detach()}
    names = [n.removeprefix("grad.") for n in golden.tensors(case) if n.startswith("grad.")]
    for site in adapter.sites.values():
        delta = adapter.delta(site)
        for name in delta.names:
            suffix = delta.method.peft_keys[name].split(".")[0]
            [key] = [k for k in names if f"{site.path}.{suffix}." in k]
            results["grad." + key] = getattr(delta, name).grad
    return results


@pytest.mark.parametrize("case", golden.cases("peft"))
def test_outputs_and_gradients(case):
    golden.compare(case, run)
