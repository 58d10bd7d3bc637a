"""A view of the events as Delta tables, for DuckDB, Polars, Spark and Trino (readers only).

    {root}/registry/delta/results, …/checkpoints, …/runs

`sync` appends the events that a table lacks; `rebuild` writes it anew from all events, to the same content.
The schema is created once, with the first (empty) version. One sync at a time, by a lease. deltalake is an
optional dependency: `pip install itpn-pipeline[delta]`.
"""

from __future__ import annotations

import logging
import os
import random
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.errors import DataInvalid, PreflightError, StorageUnavailable
from cluster.lease import Lease
from pipeline.registry.rows import SCHEMAS, Rows
from pipeline.registry.store import Registry

log = logging.getLogger(__name__)

TRIES = 6


def sync(root: str, *, rebuild: bool = False) -> dict[str, int]:
    """Bring the view up to date; returns how many rows each table got. Events are never changed.

    Raises PreflightError without deltalake, LeaseHeld while another sync runs for longer than a minute, DataInvalid for
    a view that cannot be read; `rebuild` makes a new one in its place.
    """
    deltalake = _deltalake()
    registry = Registry(root)
    registry.check_store()
    added = {}
    with Lease.acquire(storage.join(registry.uri, "delta-lease"), wait_s=60.0) as lease:
        for folder, schema in SCHEMAS.items():
            uri = table_uri(root, folder)
            options = _options(uri)
            try:
                table = _create(deltalake, uri, folder, options)
                # A table with the columns of another version is written anew; it is only a view.
                anew = rebuild or _columns(table) != schema.names
                known = set() if anew else set(_arrow(table, ["id"])["id"].to_pylist())
            except Exception as error:
                if not rebuild:
                    raise DataInvalid(
                        f"the view {uri} cannot be read",
                        found=str(error).splitlines()[0],
                        remedy=f"itpn registry sync --rebuild --root {root}",
                    ) from error
                storage.delete_tree(uri)
                _create(deltalake, uri, folder, options)
                anew, known = True, set()
            events = registry.ids(folder)
            fresh = [event_uri for id_, event_uri in events.items() if id_ not in known]
            rows = Rows(registry.read(folder, fresh), folder).to_arrow()
            rows = rows.sort_by([("created_at", "ascending"), ("step", "ascending"), ("id", "ascending")])
            if rows.num_rows or anew:
                lease.check()
                how = {"mode": "overwrite", "schema_mode": "overwrite"} if anew else {"mode": "append"}
                _write(deltalake, uri, rows, how, options)
            added[folder] = rows.num_rows
    return added


def read(root: str, folder: str) -> pa.Table:
    """A table of the view as of its last sync. Raises PreflightError when there is none yet."""
    deltalake = _deltalake()
    uri = table_uri(root, folder)
    if not deltalake.DeltaTable.is_deltatable(uri, storage_options=_options(uri)):
        raise PreflightError(f"there is no view under {root}", remedy=f"itpn registry sync --root {root}")
    table = deltalake.DeltaTable(uri, storage_options=_options(uri))
    if _columns(table) != SCHEMAS[folder].names:
        raise PreflightError(
            f"the view under {root} was made by another version", remedy=f"itpn registry sync --root {root}"
        )
    return _arrow(table)


def current(root: str, folder: str) -> pa.Table:
    """Every event of a folder, in no order: rows of the view where there is one, and the events that it lacks.

    The names of all events are listed, which tells what the view lacks; only that is read. So it is as right as
    reading every event, and with many of them far quicker.
    """
    registry = Registry(root)
    view = SCHEMAS[folder].empty_table()
    if storage.list_files(table_uri(root, folder), most=1):
        try:
            view = read(root, folder)
        except PreflightError as error:  # deltalake is not installed, or another version made the view
            log.info("the view is not used: %s", error.message)
        except Exception as error:  # only a view: whatever ails it, the events are there
            log.warning("the view of %s is not used, `registry sync --rebuild` mends it: %s", folder, error)
    events = registry.ids(folder)
    view = view.filter(pc.is_in(view["id"], pa.array(events, pa.string())))  # the events are the truth
    known = set(view["id"].to_pylist())
    lacking = [uri for id_, uri in events.items() if id_ not in known]
    return pa.concat_tables([view, Rows(registry.read(folder, lacking), folder).to_arrow()])


def table_uri(root: str, folder: str) -> str:
    """Where a table of the view lies."""
    return storage.join(root, "registry", "delta", folder)


def _create(deltalake: Any, uri: str, folder: str, options: dict[str, str]) -> Any:
    """The table; made, empty, where there is none."""
    return deltalake.DeltaTable.create(
        uri, schema=SCHEMAS[folder], mode="ignore", name=folder, storage_options=options
    )


def _arrow(table: Any, columns: list[str] | None = None) -> pa.Table:
    # Not `to_pyarrow_table`: its reading threads call back into Python, and abort a process that ends soon after.
    engine = _deltalake().QueryBuilder().register("events", table)
    names = ", ".join(f'"{name}"' for name in columns or _columns(table))
    found = pa.table(engine.execute(f"SELECT {names} FROM events"))
    schema = SCHEMAS[table.metadata().name]
    return found.cast(schema if columns is None else pa.schema([schema.field(c) for c in columns]))


def _columns(table: Any) -> list[str]:
    return [field.name for field in table.schema().fields]


def _write(deltalake: Any, uri: str, rows: pa.Table, how: dict[str, str], options: dict[str, str]) -> None:
    """One commit; a store that is busy, or another writer's commit, is met with another try.

    A try whose answer was lost may have arrived, so only rows that are not there are appended again.
    """
    for attempt in range(TRIES):
        try:
            if attempt and how["mode"] == "append":
                there = _arrow(deltalake.DeltaTable(uri, storage_options=options), ["id"])["id"]
                rows = rows.filter(pc.invert(pc.is_in(rows["id"], there.combine_chunks())))
                if not rows.num_rows:
                    return
            deltalake.write_deltalake(uri, rows, storage_options=options, **how)
            return
        except (deltalake.exceptions.CommitFailedError, OSError) as error:
            if attempt == TRIES - 1:
                raise StorageUnavailable(
                    f"cannot write the view {uri}",
                    found=str(error).splitlines()[0],
                    remedy="sync again later",
                ) from error
            time.sleep(random.uniform(0.1, 0.2) * 2**attempt)


def _options(uri: str) -> dict[str, str]:
    """What delta's own S3 client needs beside the standard AWS_* variables; never `allow_unsafe_rename`.

    Raises PreflightError for a path that deltalake cannot take.
    """
    if "[" in uri or "]" in uri:  # it panics half-way
        raise PreflightError(
            "deltalake cannot keep tables under a path with brackets",
            found=uri,
            remedy="choose another root for a registry with a view; everything else works in this one",
        )
    if not uri.startswith("s3://"):
        return {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options = {"aws_conditional_put": "etag"}
    if endpoint:
        options["aws_endpoint"] = endpoint
        options["aws_allow_http"] = str(endpoint.startswith("http://")).lower()
    return options


def _deltalake() -> Any:
    try:
        import deltalake
        import deltalake.exceptions
    except ImportError:
        raise PreflightError(
            "the Delta view needs deltalake",
            found="it is not installed",
            remedy="pip install 'itpn-pipeline[delta]'",
        ) from None
    return deltalake
