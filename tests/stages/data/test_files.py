"""Files that many short reads go to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.data.files import OPEN_FILES, kept_open


def test_the_last_files_stay_open_and_all_are_closed_in_the_end(tmp_path: Path) -> None:
    opened: list[int] = []

    def open_file(number: int) -> int:
        opened.append(number)
        path = tmp_path / str(number)
        path.write_text(str(number))
        return os.open(path, os.O_RDONLY)

    numbers = range(OPEN_FILES + 1)
    with kept_open(open_file) as files:
        handles = {number: files(number) for number in numbers}
        assert [os.pread(files(number), 9, 0).decode() for number in reversed(numbers[1:])] == [
            str(number) for number in reversed(numbers[1:])
        ]
        assert opened == list(numbers)  # none of the last ones a second time
        assert os.pread(files(0), 9, 0) == b"0" and opened == [*numbers, 0]  # the first had made room
        handles[0] = files(0)
    for handle in handles.values():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)
