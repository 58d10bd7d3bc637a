"""`itpn shard verify` reads a data set again and names what differs from its manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import DataInvalid
from pipeline.cli import app
from stages.artifacts import DatasetRef
from stages.shard.verify import manifest_of, verify
from tests.stages.images import shard_folder


@pytest.fixture
def dataset(image_folder: Path, tmp_path: Path) -> DatasetRef:
    return shard_folder(image_folder, tmp_path / "out", shard_samples=8)


def _invoke(*arguments: str) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["shard", "verify", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout.splitlines()[-1])


def test_a_sound_data_set_is_found_sound(dataset: DatasetRef) -> None:
    code, found = _invoke(dataset.manifest)
    assert code == 0 and found["ok"] and found["shards"] == found["read"] == 6 and found["differences"] == []
    assert verify(dataset.manifest, sample=2).read == 2


def test_every_differing_shard_is_named(dataset: DatasetRef) -> None:
    folder = Path(dataset.manifest).parent
    flipped = bytearray((folder / "train-000001.tar").read_bytes())
    flipped[3000] ^= 1
    (folder / "train-000001.tar").write_bytes(flipped)
    (folder / "val-000000.tar").write_bytes(b"short")
    (folder / "train-000002.tar").unlink()
    (folder / "val.index.parquet").write_bytes(b"x")
    code, found = _invoke(str(folder))
    assert code == 5
    assert {Path(item["file"]).name: item["reason"].split(" ")[0] for item in found["differences"]} == {
        "train-000001": "sha256",
        "train-000002": "missing",
        "val-000000": "5",
        "val.index.parquet": "1",
    }


def test_a_sample_still_compares_every_size(dataset: DatasetRef) -> None:
    folder = Path(dataset.manifest).parent
    for shard in ("train-000000", "train-000003"):
        (folder / f"{shard}.tar").write_bytes(b"short")
    found = verify(dataset.manifest, sample=1)
    assert [item.file for item in found.differences] == ["train-000000", "train-000003"]


def test_a_manifest_that_contradicts_itself_is_refused(dataset: DatasetRef) -> None:
    path = Path(dataset.manifest)
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataInvalid, match="contradicts itself"):
        verify(dataset.manifest)


def test_a_place_without_a_data_set_is_named(tmp_path: Path) -> None:
    code, found = _invoke(str(tmp_path))
    assert code == 5 and "no data set at" in found["error"]


def test_the_manifest_is_found_through_the_record_of_the_step(dataset: DatasetRef, tmp_path: Path) -> None:
    record = {"artifact": dataset.model_dump(mode="json")}
    (tmp_path / "out/artifact.json").write_text(json.dumps(record))
    assert manifest_of(str(tmp_path / "out")) == dataset.manifest
    path = Path(dataset.manifest)
    path.write_text(path.read_text().replace('"seed":0', '"seed":1'))
    with pytest.raises(DataInvalid, match="is not the one that"):
        manifest_of(str(tmp_path / "out"))
