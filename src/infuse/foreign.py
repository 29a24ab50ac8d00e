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


def flag(config: Mapping[str, Any], option: str) -> bool:
    """An option that is on or off; one that is left open is off."""
    value = config.get(option)
    if value is not None and not isinstance(value, bool):
        raise InfuseError(f"The file's {option} is neither true nor false, but {value!r}.")
    return bool(value)


def number(value: Any, option: str) -> float:
    """The value of an option that is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InfuseError(f"The file's {option} is no number, but {value!r}.")
    return float(value)


_ATOM = r"(?:[\w /-]|\\[.\-/dDwW]|\[[\w. /-]+\]|\.)"
_TOKEN = re.compile(
    rf"(?P<many>{_ATOM}[*+])|(?P<times>{_ATOM}\{{(?P<low>\d{{1,2}})(?:,(?P<high>\d{{1,2}}))?\}})"
    rf"|(?P<maybe>{_ATOM}\?)|(?P<one>{_ATOM}|\^|\$)|(?P<choice>\|)|(?P<open>\((?:\?:)?)|(?P<shut>\)\??)",
    re.ASCII,
)
"""A piece of a pattern that can't take for ever: only single characters are repeated."""


class Patterns:
    """Settings per module: the first pattern that fits the end of a module's path counts (PEFT's ``rank_pattern``).

    A pattern is a regular expression out of a file, and may be one that takes for ever. Only those are run that can't
    (see ``_TOKEN``), and only as long as the ways in which they may fit a path are not too many in all.

    Args:
        patterns: pattern → value.
    Raises:
        InfuseError: a pattern of another kind; too much work.
    """

    def __init__(self, patterns: Mapping[str, Any]):
        self.values = list(patterns.values())
        self.paths: dict[tuple[int, frozenset[int]], dict[str, int]] = {}
        self.others: list[tuple[int, re.Pattern, int, int]] = []
        self.work = 0
        for number, pattern in enumerate(patterns):
            if re.fullmatch(r"[\w.-]+", pattern, re.ASCII):  # a path, whose dots stand for any character
                dots = frozenset(i for i, character in enumerate(pattern) if character == ".")
                self.paths.setdefault((len(pattern), dots), {}).setdefault(pattern, number)
            else:
                self.others.append((number, *_compiled(pattern)))

    def value(self, path: str, default: Any) -> Any:
        """The value for the module at ``path``."""
        first = min(self._fitting(path), default=len(self.values))
        for number, pattern, many, ways in self.others:
            if number > first:
                break
            self._count(ways * len(path) ** many * (1 + path.count(".")))
            if pattern.fullmatch(path):
                return self.values[number]
        return self.values[first] if first < len(self.values) else default

    def _fitting(self, path: str) -> list[int]:
        """Numbers of the paths that fit."""
        self._count(200 * len(self.paths))
        fitting = []
        for (length, dots), known in self.paths.items():
            if length > len(path) or f".{path}"[-length - 1] != ".":
                continue
            end = "".join("." if i in dots else character for i, character in enumerate(path[-length:]))
            fitting += [known[end]] if end in known else []
        return fitting

    def _count(self, work: int) -> None:
        self.work += work
        if self.work > 200_000_000:
            raise InfuseError("The file's patterns for modules ask for too much work; write the modules' paths out.")


def _compiled(pattern: str) -> tuple[re.Pattern, int, int]:
    """What to match with; how many of its parts repeat without bound; in how many ways the others may fit."""
    refusal = InfuseError(
        f"The file's pattern {pattern[:100]!r} for modules is none that Infuse runs; write the modules' paths out."
    )
    at, many, ways, choices = 0, 0, 1, [1]
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None or len(pattern) > 2000 or ways > 10_000:
            raise refusal
        at = token.end()
        many += token.lastgroup == "many"
        choices[-1] += token.lastgroup == "choice"
        if token["open"]:
            choices.append(1)
        if token["shut"]:
            ways *= choices.pop() * len(token[0])  # with or without, if a question mark follows
            choices = choices or [1]
        if token["maybe"]:
            ways *= 2
        if token["times"]:
            ways *= 1 + max(0, int(token["high"] or token["low"]) - int(token["low"]))
    try:
        return re.compile(rf"(.*\.)?({pattern})"), many, ways * choices[0]
    except (re.error, RecursionError):
        raise refusal from None


def pattern_value(patterns: "Patterns | Mapping[str, Any] | None", path: str, default: Any) -> Any:
    """The entry of a config's patterns for the module at ``path``."""
    patterns = patterns if isinstance(patterns, Patterns) else Patterns(patterns or {})
    return patterns.value(path, default)
