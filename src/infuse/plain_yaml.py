"""YAML as settings need it: plain values, of sizes that people write."""

from collections import Counter
from typing import Any

import yaml

LARGEST = 10_000
"""Values in a document, each alias counted as often as it is used: nested ones would fill any memory."""
LONGEST = 1_000
"""Characters of a number."""
_TAG = "tag:yaml.org,2002:"


def read_yaml(text: str) -> Any:
    """What a YAML document says; ``None`` if it is empty.

    Raises:
        ValueError: with one line that says why it can't be read: broken syntax, tags that ask for objects, aliases
            that stand for too much, a key given twice, an endless number.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # PyYAML raises KeyError and others for values that don't fit their tags
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _check(document: yaml.Node) -> None:
    sizes: dict[int, int | None] = {}  # None: of a node that is being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if (known := sizes[id(node)]) is None:
                raise ValueError("an alias stands for a value that it is itself a part of")
            return known
        sizes[id(node)] = None
        total = 1 + sum(map(size, _parts(node)))
        if total > LARGEST:
            raise ValueError(f"it holds more than {LARGEST:,} values, its aliases written out")
        sizes[id(node)] = total
        return total

    size(document)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes right below one, after a look at the node itself."""
    where = f"line {node.start_mark.line + 1}"
    if node.tag not in yaml.SafeLoader.yaml_constructors and node.tag != f"{_TAG}merge":
        raise ValueError(f"{where} asks for an object ({node.tag.replace(_TAG, '!!')}), and settings are plain values")
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > LONGEST:
            raise ValueError(f"the number in {where} has {len(node.value):,} characters")
        return []
    if isinstance(node, yaml.MappingNode):
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for (_, key), count in keys.most_common(1):
            if count > 1:
                raise ValueError(f"the mapping in {where} says {key!r} {count} times")
        return [part for pair in node.value for part in pair]
    return node.value
