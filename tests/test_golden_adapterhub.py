"""Files that ``adapters`` 1.3.0 wrote, read by Infuse: the outputs and every gradient are the library's."""

import golden
import pytest

import infuse
from infuse.formats import adapterhub


def run(case, vary):
    """Output and gradients, under the library's names, of the case's adapter or fusion as Infuse computes them."""
    model = golden.base(case)
    folder = golden.GOLDEN / case
    for member in sorted(folder.glob("adapter*")):
        adapter = infuse.load(model, member)
    if (folder / "fusion").is_dir():
        adapter = infuse.load(model, folder / "fusion")
    vary(model)
    batch = golden.batch(case)
    out = model(**batch).last_hidden_state
    out[batch["attention_mask"].bool()].square().mean().backward()
    gradients = adapterhub.gathered(model, adapter, lambda tensor: tensor.grad)
    names = [n.removeprefix("grad.") for n in golden.tensors(case) if n.startswith("grad.")]
    ours = {name: next(n for n in names if n == name or n.endswith("." + name)) for name in gradients}
    return {"out": out.detach()} | {f"grad.{ours[name]}": value for name, value in gradients.items()}


@pytest.mark.parametrize("case", golden.cases("adapters"))
def test_outputs_and_gradients(case):
    golden.compare(case, run)
