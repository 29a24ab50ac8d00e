"""Every method of the registry on every architecture of the table."""

import pytest

import infuse
from infuse.testing import CHECKS, TINY


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("name", infuse.registry())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_law(check, name, kind):
    check(infuse.make(name), kind)
