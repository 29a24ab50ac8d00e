"""Infuse: parameter-efficient fine-tuning beyond LoRA, under one core.

The public names stand in ``__init__.pyi`` and are imported on first use: nothing waits for what it does not need.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _names if "Client" not in name]  # pyright: ignore[reportUnsupportedDunderAll]  # an extra's
