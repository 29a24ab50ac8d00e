"""Every method of the registry on every architecture of the table."""

import pytest

import infuse
from infuse.testing import CHECKS, TINY

# The tiny models are 32 wide: Compacter's n = 4 must divide the width, and two ReLU units can die together.
SMALL = {name: f"{name}:width=8" for name in ("compacter", "compacter++", "phm", "pfeiffer")}
VARIANTS = [name for cls in infuse.registry().values() for name in (cls.name, *cls.presets)]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_law(check, name, kind):
    check(infuse.make(SMALL.get(name, name)), kind)
