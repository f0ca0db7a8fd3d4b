"""Read parquet and Arrow files one row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from .parquet_places import Places, binary_columns, placed

Record = tuple[str, dict[str, Any]]
BATCH = 64  # rows read at once; each may contain the bytes of images


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a parquet file; the bytes of its images know their place in it where they can be read without their row group.

    Raises UserError for a damaged file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = binary_columns(file)
            number = 0
            for group in range(file.num_row_groups):
                places = {name: Places(path, file, group, leaf) for name, leaf in columns.items()}
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
                    for record in batch.to_pylist():
                        number += 1
                        for name, at in places.items():
                            record[name] = placed(record[name], at, f"{name}-{number}")
                        yield f"{path.name}:{number}", record
    except pa.ArrowException as error:
        raise UserError(f"{path}: is not a parquet file: {' '.join(str(error).split())}") from None


def read_arrow(path: Path) -> Iterator[Record]:
    """The rows of an Arrow file or stream. Raises UserError for a damaged file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            try:
                batches = iter(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            number = 0
            for batch in batches:
                # corrupt offsets would crash the process instead of raising
                batch.validate(full=True)
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", record
        except pa.ArrowException as error:
            raise UserError(f"{path}: is not an Arrow file: {' '.join(str(error).split())}") from None
