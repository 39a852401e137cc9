"""Rows of Parquet files of others: what a group may hold is looked at first, and a few rows are read at a time.

A file of kilobytes can hold a cell of gigabytes, or millions of rows in one group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from .report import BadSample

# Of one row group, in the columns that are read.
GROUP_BYTES, GROUP_VALUES = 2**30, 20_000_000


def check_groups(metadata: Any, columns: Collection[str], name: str, most_rows: int = GROUP_VALUES) -> None:
    """Refuse a file whose row groups hold too much.

    Args:
        metadata: ``pyarrow.parquet.FileMetaData``.
        columns: those that will be read.
        name: of the file, for the message.
        most_rows: of a group.

    Raises:
        BadSample: rows, bytes or values of a group are beyond the limits.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(i) for i in range(group.num_columns)]
        read = [part for part in parts if part.path_in_schema.split(".")[0] in columns]
        for what, found, limit in (
            ("rows", group.num_rows, most_rows),
            ("bytes", sum(part.total_uncompressed_size for part in read), GROUP_BYTES),
            ("values", max((part.num_values for part in read), default=0), GROUP_VALUES),
        ):
            if found > limit:
                raise BadSample(
                    f"row group of more than {limit:,} {what}",
                    name,
                    f"{found:,}; write it with a smaller row_group_size",
                )


def read_rows(file: Any, columns: list[str], start: int, stop: int, batch: int) -> Iterator[dict[str, Any]]:
    """Rows ``start:stop`` of a ``pyarrow.parquet.ParquetFile``, decoded ``batch`` at a time.

    A whole group would not do: one of a thousand documents is gigabytes as Python objects.
    """
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(start, first) - first, min(stop, first + count) - first
        first += count
        if low >= high:
            continue
        seen = 0
        for part in file.iter_batches(batch, row_groups=[group], columns=columns):
            here = part.slice(max(0, low - seen), max(0, min(high, seen + len(part)) - max(low, seen)))
            seen += len(part)
            if len(here):
                yield from here.to_pylist()
            if seen >= high:
                break
