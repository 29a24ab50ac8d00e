"""Every method of the registry on every architecture of the table."""

import pytest

import infuse
from infuse.testing import CHECKS, TINY

# The tiny models are 32 wide: a bottleneck needs a width that Compacter's n = 4 divides.
SMALL = {"compacter": "compacter:width=8", "compacter++": "compacter++:width=8", "phm": "phm:width=8"}
VARIANTS = [name for cls in infuse.registry().values() for name in (cls.name, *cls.presets)]


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_law(check, name, kind):
    check(infuse.make(SMALL.get(name, name)), kind)
