"""Read labelled texts from a file, a folder, the bundled sample or the Hugging Face hub.

Files are read with ``csv`` and ``json`` from the standard library and with pyarrow, not with pandas: no
cell is guessed to be a number, a date or missing ("NA" and "null" are texts), and an error can name its line.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infuse.data.delimited import read_delimited, split_lines
from infuse.data.folder import SPLITS, NoSplitError, canonical, split_files
from infuse.data.rows import Rows
from infuse.errors import InfuseError, listed

SAMPLE = Path(__file__).parent / "sample"
HUB_NAMES = {"banking77": "PolyAI/banking77"}
# These sets are stored with a loading script, which no release of `datasets` since 4.0 runs.
HUB_REVISIONS = {"PolyAI/banking77": "refs/convert/parquet"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# What a default column may be called instead.
OTHER_NAMES = {
    "text": ("sentence", "utterance", "query", "question"),
    "label": ("intent", "category", "labels", "class", "label_text"),
}
# What the hub's clients say, and what that means.
REASONS = (
    ("offline", "offline mode is on: HF_HUB_OFFLINE is set"),
    ("couldn't reach", "the hub cannot be reached"),
    ("gated", "it is gated: accept its terms on its page and log in with `hf auth login`"),
    ("doesn't exist on the hub", "there is no such data set, or it is private"),
    ("scripts are no longer supported", "it needs a loading script, which is not run"),
)

Source = str | os.PathLike[str]


class Table(NamedTuple):
    """What a source holds; a column's cells are read when they are asked for."""

    name: str
    columns: list[str]
    cells: Callable[[str], list[Any]]


def read(
    source: Source,
    *,
    text: str = "text",
    label: str = "label",
    split: str = "train",
    labelled: bool = True,
    multi: bool = False,
) -> Rows:
    """Read the rows of one source.

    Arguments:
        source: a .csv, .tsv, .jsonl, .json or .parquet file; a folder with train.csv, validation.csv, …;
            ``"sample"`` (bundled); ``"banking77"``; or a hub data set, ``owner/name`` or ``owner/name:config``.
        text, label: the columns. If a default name is absent, a usual other name is taken (sentence, intent, …).
        split: which part of a folder, the sample or a hub set; a single file has only one part. ``dev.csv`` and the
            like are validation splits (see `infuse.data.folder`).
        labelled: whether to read labels at all.
        multi: split label cells at ``|``. Cells that are lists are multi-label without it.

    Raises:
        InfuseError: the source cannot be found, reached or read, or a column is missing.
    """
    parts = [_rows(table, text, label, labelled, multi) for table in _tables(source, split)]
    if len(parts) == 1:
        return parts[0]
    texts = tuple(text for part in parts for text in part.texts)
    return Rows(texts, tuple(label for part in parts for label in part.labels or ()) if labelled else None)  # type: ignore[arg-type]  # checked to be of one kind


def _rows(table: Table, text: str, label: str, labelled: bool, multi: bool) -> Rows:
    texts = _converted(table, _column(table, "text", text), _string)
    if not labelled:
        return Rows(tuple(texts))
    return Rows(tuple(texts), tuple(_labels(table, _column(table, "label", label), multi)))


def has_splits(source: Source) -> bool:
    """Whether ``source`` is something other than a single file."""
    return source in HUB_NAMES or not _is_file(_path(source))


def folder_of(source: Source) -> Path | None:
    """The folder whose files are the splits of ``source``, if there is one."""
    path = _path(source)
    return path if source not in HUB_NAMES and path.is_dir() else None


def _path(source: Source) -> Path:
    return SAMPLE if source == "sample" else Path(os.path.expanduser(source))  # ~nobody/x stays as it is


def _is_file(path: Path) -> bool:
    return path.is_file() or (path.suffix.lower() in READERS and not path.is_dir())


def files_of(source: Source, split: str) -> tuple[Path, ...]:
    """The files that `read` reads; none for a hub data set.

    Raises:
        InfuseError: a folder has no such split, or several files that could be it.
    """
    if (folder := folder_of(source)) is not None:
        return split_files(folder, split, READERS)
    path = _path(source)
    return (path,) if source not in HUB_NAMES and _is_file(path) else ()


def _tables(source: Source, split: str) -> list[Table]:
    if files := files_of(source, split):
        return [_file(path) for path in files]
    if isinstance(source, str) and (source in HUB_NAMES or HUB_ID.fullmatch(source)):
        return [_hub(source, split)]
    raise InfuseError(
        f"there is no file or folder {str(source)!r}: give a file ({listed(READERS)}), a folder with train.csv, "
        "'sample', 'banking77' or a hub data set as owner/name."
    )


def _file(path: Path) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InfuseError(f"{path} is of no type that can be read: save it as one of {listed(READERS)}.")
    try:
        return reader(path)
    except OSError as error:
        raise InfuseError(f"{path} cannot be read ({error.strerror}): check the path and permissions.") from error


def _csv(path: Path) -> Table:
    header, rows = read_delimited(_content(path), path)
    return Table(str(path), header, lambda column: [row[header.index(column)] for row in rows])


def _json_lines(path: Path) -> Table:
    records = []
    for number, line in enumerate(split_lines(_content(path)), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InfuseError(
                f"line {number} of {path} is not valid JSON ({error.msg}): mend or remove that line."
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
            raise InfuseError(f"line {number} of {path} can't be read ({error}): mend or remove that line.") from error
    return _records(path, records)


def _json(path: Path) -> Table:
    content = _content(path)
    try:
        data = json.loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object per line, as many hub files are despite their name
            return _json_lines(path)
        raise InfuseError(f"line {error.lineno} of {path} is not valid JSON ({error.msg}): mend it there.") from error
    except (ValueError, RecursionError) as error:
        raise InfuseError(f"{path} can't be read ({error}): mend or remove what is too long or too deep.") from error
    return _records(path, data)


def _records(path: Path, records: Any) -> Table:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InfuseError(f'{path} is not a list of records: write one {{"text": …, "label": …}} for each text.')
    columns = list(dict.fromkeys(name for record in records for name in record))
    if not columns:
        raise InfuseError(f"{path} is empty: give it records with a text and a label.")
    return Table(str(path), columns, lambda column: [record.get(column) for record in records])


def _parquet(path: Path) -> Table:
    from pyarrow import ArrowException, parquet

    data = io.BytesIO(path.read_bytes())  # so that an OSError below means the content, not the file
    try:
        table = parquet.ParquetFile(data).read()
    except (ArrowException, OSError) as error:
        reason = str(error).split(". ")[0].split(": ")[-1].rstrip(".")
        raise InfuseError(f"{path} is not a whole Parquet file ({reason}): write or copy it again.") from error

    def cells(column: str) -> list[Any]:
        try:
            return table[column].to_pylist()
        except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, times beyond Python's
            raise InfuseError(
                f"Column {column!r} of {path} can't be read ({error}): write it as UTF-8 text."
            ) from error

    return Table(str(path), table.column_names, cells)


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def _content(path: Path) -> str:
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InfuseError(f"{path} is not UTF-8 text (line {line}): save it again with the encoding UTF-8.") from None
    content = content.rstrip("\x1a")  # which ends files of DOS
    if (at := content.find("\0")) >= 0:  # as every other byte of UTF-16 is
        line = content.count("\n", 0, at) + 1
        raise InfuseError(f"line {line} of {path} holds zero bytes: save the file again with the encoding UTF-8.")
    if not content.strip():
        raise InfuseError(f"{path} is empty: give it a text and a label for each row.")
    return content


def _hub(source: str, split: str) -> Table:
    repository, _, config = source.partition(":")
    repository = HUB_NAMES.get(repository, repository)
    options = {"name": config, "revision": HUB_REVISIONS.get(repository), "split": split}
    try:
        import datasets

        data: Any = datasets.load_dataset(repository, **{key: value for key, value in options.items() if value})
    except Exception as error:  # its clients, cache and file readers raise dozens of kinds
        message = " ".join(str(error).split()).rstrip(".")
        if message.startswith("Unknown split"):
            there = message.partition("one of ")[2]
            names = SPLITS.get(canonical(split), ())
            also = [name for name in re.findall(r"'([^']+)'", there) if name in names and name != split]
            if len(also) == 1:
                return _hub(source, also[0])
            if also:
                raise InfuseError(
                    f"{source} has several splits that could be {split!r} ({listed(also)}): ask for one by its name."
                ) from error
            raise NoSplitError(f"{source} has no split {split!r} (it has {there}): ask for one of those.") from error
        reason = next((why for said, why in REASONS if said in message.casefold()), message[:300])
        raise InfuseError(
            f"data set {repository!r}, split {split!r}, cannot be loaded from the Hugging Face hub ({reason}), and "
            "there is no local file or folder of that name: check both, or use a local CSV file, which works too."
        ) from error

    def cells(column: str) -> list[Any]:
        feature = data.features[column]
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return list(data[column]) if names is None else [_named(cell, names) for cell in data[column]]

    return Table(source, list(data.column_names), cells)


def _named(cell: Any, names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [_named(item, names) for item in cell]
    return names[cell] if cell is not None and 0 <= cell < len(names) else None  # -1: a label that is kept secret


def _column(table: Table, role: str, wanted: str) -> str:
    candidates = (wanted, *(OTHER_NAMES[role] if wanted == role else ()))
    found = next((name for name in candidates if name in table.columns), None)
    if found is None:
        raise InfuseError(
            f"{table.name} has no column {wanted!r} (its columns: {listed(table.columns)}): "
            f"say with the option {role!r} which one holds the {role}s."
        )
    if table.columns.count(found) > 1:
        raise InfuseError(f"{table.name} has {table.columns.count(found)} columns {found!r}: rename all but one.")
    return found


def _converted(table: Table, column: str, convert: Callable[[Any], Any]) -> list[Any]:
    result = []
    for number, cell in enumerate(table.cells(column), 1):
        try:
            result.append(convert(cell))
        except TypeError:
            kind = type(cell).__name__
            raise InfuseError(
                f"row {number} of column {column!r} in {table.name} holds a {kind}: use plain text there."
            ) from None
    return result


def _labels(table: Table, column: str, multi: bool) -> list[Any]:
    def convert(cell: Any) -> str | tuple[str, ...]:
        if isinstance(cell, list):
            return tuple(dict.fromkeys(_string(item).strip() for item in cell))
        name = _string(cell).strip()
        return tuple(dict.fromkeys(part for part in map(str.strip, name.split("|")) if part)) if multi else name

    labels = _converted(table, column, convert)
    if any(isinstance(label, tuple) for label in labels):  # among lists, a missing cell is one missing label
        return [label or ("",) if isinstance(label, str) else label for label in labels]
    return labels


def _string(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # whole numbers become floats where a column also has missing cells
    if isinstance(cell, str | int | float):
        return str(cell)
    raise TypeError
