"""Small data files, and what every error message must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infuse.errors import InfuseError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(rows: list[tuple[str, str]], header: str = "text,label") -> str:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return "\n".join([header, *quoted]) + "\n"


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@contextmanager
def fails(*parts: str) -> Iterator[None]:
    """Expect one line that holds ``parts``, says after a colon how to mend it, and ends in a full stop."""
    with pytest.raises(InfuseError) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ":" in message, message
    assert all(part in message for part in parts), message
