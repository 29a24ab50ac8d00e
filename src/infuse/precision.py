"""Which number format the frozen trunk computes in."""

import time
from functools import cache
from typing import Literal

import torch

from infuse.errors import InfuseError

Precision = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a setting; ``auto`` is bfloat16 where a short probe on this machine shows that it is faster."""
    if precision == "auto":
        return torch.bfloat16 if bf16_pays() else torch.float32
    if precision not in DTYPES:
        raise InfuseError(f"Unknown precision {precision!r}; choose from auto, fp32, bf16.")
    return DTYPES[precision]


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each == dtype)


@cache
def bf16_pays(gain: float = 1.3) -> bool:
    """Whether a matrix product of a small encoder's size is ``gain`` times faster in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _seconds(torch.float32) > gain * _seconds(torch.bfloat16)


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
