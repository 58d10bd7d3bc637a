"""Parquet files of images as Hugging Face writes them: `image` struct{bytes, path} (or plain bytes), `label`.

Image bytes lie inside compressed pages, so a single image cannot be read by offset: row groups are read
whole, page by page, and the rows that are not wanted are dropped.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import DataInvalid

_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
MAX_LABEL = 999_999  # the list of classes reaches to the largest label; ImageNet-21K has 21,841
_BATCH_BYTES, _BATCH_ROWS = 2 << 20, 16  # of images decoded at once: what ImageNet's 110 KB amount to


def list_rows(uri: str, name: str) -> tuple[list[str], array, array, array, array, list[str] | None]:
    """Keys (as paths), rows, mean sizes, row groups, labels of all rows, and the class names if stated.

    Raises DataInvalid when the file is no Parquet, lacks a column, or a row has no label.
    """
    stem = name.rpartition("/")[2].removesuffix(".parquet").replace(".", "_")
    paths: list[str] = []
    rows, sizes, groups, labels = array("q"), array("q"), array("q"), array("i")
    with _open(uri) as file:
        image, label, has_path = _columns(file.schema_arrow, uri)
        for group in range(file.metadata.num_row_groups):
            columns = [label, f"{image}.path"] if has_path else [label]
            table = file.read_row_group(group, columns=columns)
            values = table[label]
            if values.null_count or (len(values) and min(values.to_pylist()) < 0):
                raise DataInvalid(
                    f"{uri} has rows without a label (null or negative), in row group {group}",
                    expected="a class number in every row",
                    remedy="remove the rows, or leave the file out: test sets often have no labels",
                )
            if len(values) and (largest := max(values.to_pylist())) > MAX_LABEL:
                raise DataInvalid(
                    f"{uri} has a label that is no class number, in row group {group}",
                    expected=f"at most {MAX_LABEL}",
                    found=largest,
                    remedy="number the classes from 0 on",
                )
            named = (
                table[image].combine_chunks().field("path").to_pylist() if has_path else [None] * len(table)
            )
            mean = _image_bytes(file.metadata.row_group(group), image) // max(len(table), 1)
            for path, value in zip(named, values.to_pylist(), strict=True):
                plain = path and path.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
                paths.append(f"{plain or f'{stem}/{len(paths):08d}'}.jpg")
                labels.append(value)
                sizes.append(mean)
                groups.append(group)
        rows.extend(range(len(paths)))
        return paths, rows, sizes, groups, labels, _class_names(file.schema_arrow, label)


def read_rows(uri: str, wanted: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
    """(position in `wanted`, image bytes or None for null) in the file's order, some pages in memory at once."""
    order = np.argsort(wanted, kind="stable")
    ordered = wanted[order]
    with _open(uri) as file:
        image, _, _ = _columns(file.schema_arrow, uri)
        nested = pa.types.is_struct(file.schema_arrow.field(image).type)
        begin = at = 0
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            end = begin + facts.num_rows
            if at < len(ordered) and ordered[at] < end:
                column = f"{image}.bytes" if nested else image
                fit = _BATCH_BYTES * facts.num_rows // max(_image_bytes(facts, image), 1)
                for batch in file.iter_batches(
                    max(1, min(fit, _BATCH_ROWS)), row_groups=[group], columns=[column]
                ):
                    values = batch.column(0).field("bytes") if nested else batch.column(0)
                    while at < len(ordered) and ordered[at] < begin + len(values):
                        yield int(order[at]), values[int(ordered[at]) - begin].as_py()
                        at += 1
                    begin += len(values)
            begin = end
    if at < len(ordered):
        raise DataInvalid(
            f"{uri} changed while it was read",
            expected=f"more than {int(ordered[-1])} rows",
            found=f"{begin}",
            remedy="leave the source alone while it is sharded, then run again",
        )


def _open(uri: str) -> pq.ParquetFile:
    try:
        # Buffered, not pre-buffered: memory stays at some pages, however large the row groups are.
        return pq.ParquetFile(storage.open_read(uri), buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataInvalid(
            f"{uri} is not a readable Parquet file: {error}", remedy="check that the file was copied whole"
        ) from None


def _columns(schema: pa.Schema, uri: str) -> tuple[str, str, bool]:
    """Names of the image and the label column, and whether the images have a path."""
    image = next((name for name in _IMAGES if name in schema.names), None)
    label = next((name for name in _LABELS if name in schema.names), None)
    kind = schema.field(image).type if image else pa.null()
    leaves = (
        {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        if pa.types.is_struct(kind)
        else {}
    )
    content = leaves.get("bytes", kind)
    binary = pa.types.is_binary(content) or pa.types.is_large_binary(content)
    if not binary or not label or not pa.types.is_integer(schema.field(label).type):
        raise DataInvalid(
            f"{uri} has no images with labels",
            expected="`image`: struct{bytes, path} or binary, and `label`: integer",
            found=", ".join(f"{item.name}: {item.type}" for item in schema),
            remedy="rename or convert the columns; files that name images elsewhere hold no images",
        )
    assert image is not None
    return image, label, "path" in leaves and pa.types.is_string(leaves["path"])


def _image_bytes(group: pq.RowGroupMetaData, image: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in (image, f"{image}.bytes"))


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Names of the ClassLabel feature that Hugging Face stores in the schema's metadata."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        return [str(item) for item in feature["names"]]
    except (TypeError, KeyError, ValueError):
        return None
