"""What proves a method or an architecture: tiny random models, and the conformance suite that runs over them.

A method or an architecture of your own passes the suite like this::

    from infuse.testing import CHECKS, tiny

    @pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
    def test_my_method(check):
        check(MyMethod(), "bert")
"""

from infuse.testing.conformance import CHECKS as CHECKS
from infuse.testing.conformance import wake as wake
from infuse.testing.tiny import TINY as TINY
from infuse.testing.tiny import inputs as inputs
from infuse.testing.tiny import tiny as tiny
