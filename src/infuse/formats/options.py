"""Reading other libraries' configuration: options that Infuse does not have, and settings per module."""

import re
from collections.abc import Mapping
from typing import Any

from infuse.errors import InfuseError


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
