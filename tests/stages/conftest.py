"""Small real data sets for the tests of the stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.artifacts import DatasetRef
from tests.stages.images import shard_folder, write_image_folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 10 train and 4 val images each, 64 x 48 pixels."""
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def tiny_dataset(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    """`image_folder` in shards of at most 8 images."""
    return shard_folder(image_folder, tmp_path_factory.mktemp("shards"), shard_samples=8)
