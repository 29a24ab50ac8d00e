"""Serving: every adapter of a folder over one frozen base, rows of all tasks in one batch."""

from infuse.serving.server import serve as serve
from infuse.serving.settings import ServeConfig as ServeConfig

__all__ = ["ServeConfig", "serve"]
