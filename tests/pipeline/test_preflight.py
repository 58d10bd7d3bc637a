"""What a recipe asks for before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import PreflightError
from pipeline import preflight

CLIP = Path(__file__).parents[2] / "assets" / "clip-micro"


def test_preflight_takes_a_name_of_the_hub_for_a_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def answer(_: object, name: str, timeout: float) -> None:
        if name != "some-org/clip-tiny":
            raise ConnectionError("404")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    assert preflight.teacher("some-org/clip-tiny", "").check() == "some-org/clip-tiny of the Hugging Face hub"
    with pytest.raises(PreflightError, match="no path some-org/clip-huge, and no repository"):
        preflight.teacher("some-org/clip-huge", "another").check()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert preflight.teacher("hf://some-org/clip-huge", "").check().startswith("some-org/clip-huge")
    assert preflight.teacher(str(CLIP), "").check() == str(CLIP)
    for absent in ("", str(tmp_path / "nothing.pt")):
        with pytest.raises(PreflightError):
            preflight.teacher(absent, "give one").check()
