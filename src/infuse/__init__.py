"""Infuse: parameter-efficient fine-tuning beyond LoRA, under one core.

The public names stand in ``__init__.pyi`` and are imported on first use: nothing waits for what it does not need.
"""

from importlib.util import find_spec
from threading import RLock
from typing import Any

import lazy_loader

__version__ = "0.1.0"
_import, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _names if "Client" not in name or find_spec("httpx")]  # pyright: ignore[reportUnsupportedDunderAll]
_importing = RLock()


def __getattr__(name: str) -> Any:
    if name not in _names:  # such as modules that others import, which must not wait for the lock below
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _importing:  # by two threads at once, transformers is imported with names missing
        return _import(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
