"""Shards as files: Parquet, or a tar of WebDataset; the same samples give the same bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .. import pictures
from ..errors import BackendUnavailable
from ..typed import to_plain
from .order import Order

F64 = npt.NDArray[np.float64]
INDEX, CLASS, PROMPT = "index", "class_label", "prompt"
IMAGE, SAMPLE = "image", "sample"
GROUP_BYTES = 16 << 20
"""Of samples in a row group of Parquet, which are held in memory until it is written."""


@dataclass(frozen=True)
class Rows:
    """Samples of a batch, with what they were made of; x is (N, C, H, W)."""

    indices: range
    x: F64
    labels: list[int] | None
    prompts: list[str] | None


def write_shard(file: BinaryIO, order: Order, batches: Iterable[Rows]) -> None:
    """Write a shard, batch by batch, so that memory holds few of them.

    Raises:
        BackendUnavailable: pyarrow is not installed.
        ModelError, RecipeError: samples are no pictures.
    """
    if order.format == "webdataset":
        _write_tar(file, order, batches)
    else:
        _write_parquet(file, order, batches)


def _encoded(order: Order, rows: Rows) -> list[bytes]:
    """The file of each sample."""
    if order.content == "png":
        return list(pictures.encode_images(rows.x).values())
    return [pictures.encode_array(x) for x in rows.x]


def _write_tar(file: BinaryIO, order: Order, batches: Iterable[Rows]) -> None:
    """Per sample KEY.png or KEY.npy, KEY.cls (its class) and KEY.txt (its prompt); KEY is its index."""
    suffix = "png" if order.content == "png" else "npy"
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for rows in batches:
            for n, (index, data) in enumerate(zip(rows.indices, _encoded(order, rows), strict=True)):
                members = {suffix: data}
                if rows.labels is not None:
                    members["cls"] = str(rows.labels[n]).encode()
                if rows.prompts is not None:
                    members["txt"] = rows.prompts[n].encode()
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{index:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def _write_parquet(file: BinaryIO, order: Order, batches: Iterable[Rows]) -> None:
    """Columns index, class_label, prompt, and image (a PNG file) or sample (float32, C * H * W).

    The order stands in the schema's metadata, as JSON under "ptqd-export".
    """
    pa, pq = pyarrow("a Parquet file")
    writer: Any = None
    held: list[Any] = []
    try:
        for rows in batches:
            table = _table(pa, order, rows)
            if writer is None:
                # Pictures are compressed already.
                compression = "none" if order.content == "png" else "zstd"
                writer = pq.ParquetWriter(file, table.schema, compression=compression)
            held.append(table)
            if sum(part.nbytes for part in held) >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(held), row_group_size=1 << 30)
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=1 << 30)
    finally:
        if writer is not None:
            writer.close()


def _table(pa: Any, order: Order, rows: Rows) -> Any:
    columns = {INDEX: pa.array(rows.indices, pa.int64())}
    if rows.labels is not None:
        columns[CLASS] = pa.array(rows.labels, pa.int64())
    if rows.prompts is not None:
        columns[PROMPT] = pa.array(rows.prompts, pa.string())
    if order.content == "png":
        columns[IMAGE] = pa.array(_encoded(order, rows), pa.binary())
    else:
        values = np.asarray(rows.x, np.float32)
        columns[SAMPLE] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values[0].size)
    about = json.dumps(to_plain(order) | {"prompts": len(order.prompts)})
    return pa.table(columns).replace_schema_metadata({"ptqd-export": about})


def pyarrow(what: str) -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet.

    Args:
        what: it is needed for.
    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BackendUnavailable(
            f"{what} needs pyarrow ({error}): pip install '.[ray]' in a checkout"
        ) from error
    return pa, pq
