"""Reading other libraries' configuration: options that Infuse does not have, and settings per module."""

import re
from collections.abc import Mapping
from typing import Any

from infuse.errors import InfuseError

# Options of PEFT's LoRA that change the maths or the base weights, and the values that do not.
_OTHERS = """lora_bias use_qalora use_bdlora alora_invocation_tokens arrow_config velora_config kasa_config
    monteclora_config target_parameters trainable_token_indices layer_replication"""
LORA_VARIANTS: dict[str, tuple] = dict.fromkeys(_OTHERS.split(), ()) | {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


def refuse_options(config: Mapping[str, Any], allowed: Mapping[str, tuple], method: str) -> None:
    """Raise if an option is set to anything but the values that leave the maths as ``method`` has it."""
    for option, values in allowed.items():
        value = config.get(option)
        if value and value not in values:
            raise InfuseError(f"The file uses {option}={value!r}, which Infuse's {method} does not have.")


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The entry whose key, a regular expression, fits the end of a module's path (PEFT's ``rank_pattern``)."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default
