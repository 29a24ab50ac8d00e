"""Which base model an adapter was trained on."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from infuse.arch import Arch
from infuse.sites import model_type, stack_layers, transformer_in


@dataclass(frozen=True)
class Base:
    """What identifies a base model: its name, its architecture, and a digest of its layers' weights.

    The digest takes 32 evenly spaced values of every parameter in the stacks of layers, rounded to bfloat16, so that a
    trunk in float32 and the same trunk in bfloat16 are one base.
    """

    name: str
    type: str
    digest: str

    @staticmethod
    def of(model: nn.Module, arch: Arch) -> "Base":
        sha = hashlib.sha256()
        for stack in arch.stacks:
            for index, layer in enumerate(stack_layers(model, stack).values()):
                for name, value in layer.named_parameters():
                    flat = value.detach().reshape(-1)
                    if flat.is_meta:
                        continue
                    step = max(1, flat.numel() // 32)
                    sha.update(f"{stack.name}.{index}.{name}{tuple(value.shape)}".encode())
                    sha.update(flat[::step].bfloat16().view(torch.int16).cpu().numpy().tobytes())
        inner = transformer_in(model)
        name = getattr(inner, "name_or_path", "") or type(model).__name__
        return Base(name, model_type(inner), sha.hexdigest()[:32])
