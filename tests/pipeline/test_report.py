"""The report: what it shows, that nothing in it is markup of others, and that it works in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from cluster.errors import ConfigError
from pipeline.registry import Registry
from pipeline.registry.events import RunRow
from pipeline.report import build
from pipeline.report.build import charts
from pipeline.runner import Runner
from stages.artifacts import FileInfo
from tests.pipeline import toys

EVIL = '<script>document.title = "broken"</script>\'"&'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A toy chain whose trainings have metrics, a name that is markup, and a step that failed."""
    train = toys.train

    def with_metrics(config: Any, inputs: dict, context: Any) -> Any:
        outcome = train(config, inputs, context)
        lines = [
            {"step": s, "loss": 1 / s, "loss_pyramid": 2 / s, "lr": 0.1, "images_per_s": 9.0}
            for s in (1, 2, 3)
        ]
        data = "".join(
            json.dumps(line) + "\n" for line in [*lines, {"event": "rollback", "step": 3}]
        ).encode()
        uri = storage.join(context.files, "metrics.jsonl")
        storage.write_exclusive(uri, data)
        info = FileInfo(
            path=uri.removeprefix(context.out + "/"), bytes=len(data), sha256=storage.sha256_bytes(data)
        )
        return outcome.model_copy(update={"files": [*outcome.files, info], "notes": [EVIL]})

    with_metrics.__module__, with_metrics.__qualname__ = train.__module__, train.__qualname__
    monkeypatch.setattr(toys, "train", with_metrics)
    uri = str(tmp_path / "root")
    Runner(uri, EVIL, toys.chain(), open_session=toys.ThreadSession).run()
    failed = RunRow(
        run=EVIL, step="finetune/c/v1", code_version="v", created_at="2026-01-01T00:00:00", fingerprint="0",
        outcome="failed", error=EVIL, exit_code=1, host="h",
    )  # fmt: skip
    Registry(uri).publish_run(failed)
    return uri


def test_report_has_every_step_and_escapes_every_value(root: str, tmp_path: Path) -> None:
    index = build(root, tmp_path / "report")
    pages = [index, *(tmp_path / "report" / "runs").glob("*.html")]
    assert len(pages) == 5
    for page in pages:
        text = page.read_text()
        assert "<script>document" not in text and "http://" not in text and "https://" not in text
    assert "finetune/c/v1" in index.read_text()
    build(root, tmp_path / "report")  # over the older one


def test_report_does_not_write_over_a_folder_of_others(root: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        build(root, tmp_path / "mine")


def test_charts_leave_gaps_where_values_are_not_finite() -> None:
    found = charts([{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"event": "skip", "step": 2}])
    assert found == [{"title": "loss", "curves": [{"name": "loss", "x": [1], "y": [1.0]}]}]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip(
            "chromium and chromium-driver are not installed (apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    yield made
    made.quit()


@pytest.mark.slow
def test_pages_work_in_a_browser(root: str, tmp_path: Path, browser: Any) -> None:
    index = build(root, tmp_path / "report")
    browser.set_window_size(390, 844)  # a phone
    browser.get(index.as_uri())
    assert browser.title.startswith("Report of")
    rows = "#results tbody tr"

    def values() -> list[float]:
        cells = browser.find_elements("css selector", f"{rows} td:nth-child(3)")
        return [float(cell.get_attribute("data-value")) for cell in cells]

    heading = browser.find_element("css selector", "#results th:nth-child(3)")
    browser.execute_script("arguments[0].click()", heading)
    assert values() == [-3.0, -1.0, 1.0, 3.0]
    browser.execute_script("arguments[0].click()", heading)
    assert values() == [3.0, 1.0, -1.0, -3.0]
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(wide) <= 0, "the page itself does not scroll sideways"
    links = browser.find_elements("css selector", "main a")
    for link in {link.get_attribute("href") for link in links}:
        browser.get(link)
        assert browser.title.count("/") == 2
        charts_ = browser.find_elements("css selector", ".chart .main-svg")
        assert bool(charts_) == ("finetune" in link)
        assert browser.execute_script(wide) <= 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
