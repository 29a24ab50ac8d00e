"""Infuse: parameter-efficient fine-tuning beyond LoRA, under one core."""

from typing import TYPE_CHECKING, Any

from infuse.arch import Arch as Arch
from infuse.arch import Part as Part
from infuse.arch import Residual as Residual
from infuse.arch import Stack as Stack
from infuse.checkpoint import load as load
from infuse.checkpoint import save as save
from infuse.classifier import Classifier as Classifier
from infuse.combine import add as add
from infuse.combine import average as average
from infuse.combine import stack as stack
from infuse.errors import InfuseError as InfuseError
from infuse.method import Method as Method
from infuse.method import make as make
from infuse.method import register as register
from infuse.method import registry as registry
from infuse.methods.bottleneck import Bottleneck as Bottleneck
from infuse.methods.compacter import Compacter as Compacter
from infuse.methods.fusion import Fusion as Fusion
from infuse.methods.ia3 import IA3 as IA3
from infuse.methods.lora import LoRA as LoRA
from infuse.model import activate as activate
from infuse.model import attach as attach
from infuse.model import detach as detach
from infuse.model import fuse as fuse
from infuse.model import merge as merge
from infuse.model import route as route
from infuse.model import summary as summary
from infuse.model import unmerge as unmerge
from infuse.recommending import RecommendConfig as RecommendConfig
from infuse.recommending import recommend as recommend

if TYPE_CHECKING:
    from infuse.client import AsyncClient as AsyncClient
    from infuse.client import Client as Client

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Client", "AsyncClient"):  # on first use: they need httpx, which nothing else does
        from infuse import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
