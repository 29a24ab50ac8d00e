"""A short run of bench/serve_mix.py: answers under mixing and changing equal those of offline prediction."""

import pytest
from serve_mix import every_method, mix, settings, sound

NARROW = {name: f"{name}:width=4" for name in ("compacter", "compacter++", "phm")}
"""Compacter's products need a width that a tiny base doesn't give by itself."""


@pytest.mark.parametrize("workers", [1, 2])
def test_mixed_and_changing_adapters_answer_as_offline(tmp_path, tiny_base, workers):
    methods = [NARROW.get(each, each.replace("train_norms", "width=4,train_norms")) for each in every_method()]
    flags = (
        f"--adapters 14 --resident 6 --clients 16 --changers 2 --texts 24 --seconds 3 --threads 1 --workers {workers}"
    )
    options = settings(["--base", str(tiny_base), *flags.split(), "--methods", *methods])
    result = mix(tmp_path, options, "fp32")
    assert sound(result), result["examples"] or result
    assert result["adapters of a pass"] > 1
    assert sum(result["changes"].values()) > 1
