"""The report in a real browser: it draws, sorts, links, fits a phone, asks the network for nothing, stays live."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import storage
from cluster.errors import StorageUnavailable
from pipeline.registry import Registry
from pipeline.report import LiveReport, build, make_server
from pipeline.step import Step
from tests.pipeline import reported

WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESK = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reported")
    return build(reported.make(str(made / "root")), made / "report").parent


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        reason = "no chromium and chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("ITPN_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update",
        "disable-background-networking", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(driver))
    yield made
    made.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """A clean browser; fails the test when a page complained on its console."""
    chromium.get("about:blank")
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    _screen(chromium, DESK)
    yield chromium
    complaints = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert complaints == []


def _screen(browser: Any, screen: dict[str, Any], scheme: str = "light") -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def _column(browser: Any, table: str, number: int) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.textContent.trim())",
        f"#{table} tbody tr > :nth-child({number})",
    )


def _text(browser: Any, selector: str) -> str:
    """In one stroke: a live page may replace an element between finding and reading it."""
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def _until(browser: Any, holds: Callable[[], bool]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 60, poll_frequency=0.1).until(lambda _: holds())


def test_every_page_draws_fits_a_phone_fetches_nothing_and_runs_nothing_of_others(
    folder: Path, browser: Any
) -> None:
    _screen(browser, PHONE)
    pages = sorted(folder.rglob("*.html"))
    drawn = {}
    for page in pages:
        browser.get(page.as_uri())
        assert browser.execute_script(WIDE) <= 0, f"{page.name} scrolls sideways"
        assert browser.find_element("css selector", "h1").text
        plots = browser.find_elements("css selector", "figure.chart")
        drawn[page.name] = len(plots)
        for plot in plots:
            assert plot.find_elements("css selector", ".main-svg .scatterlayer .trace"), page.name
        assert not browser.find_elements("css selector", ".modebar")
        broken = "return [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)"
        assert browser.execute_script(broken) == []
        assert browser.title != "broken"
        made = "script:not([src]):not([type='application/json']), main b, main img:not([src$='.png'])"
        assert browser.find_elements("css selector", made) == [], page.name
    assert drawn["finetune--a--v1.html"] == 7 and drawn["index.html"] == 2 and drawn["runs.html"] == 0
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > len(pages)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_text_of_others_stays_text(folder: Path, browser: Any) -> None:
    browser.get((folder / "steps" / "finetune--a--v1.html").as_uri())
    assert reported.EVIL in browser.find_element("css selector", ".notes").text
    titles = [found.text for found in browser.find_elements("css selector", "figcaption")]
    assert reported.EVIL in titles
    browser.get((folder / "index.html").as_uri())
    assert f"finetune/{reported.EVIL_NAME}/v1" in _column(browser, "leaderboard", 1)


def test_a_script_that_got_into_a_page_would_not_run(folder: Path, tmp_path: Path, browser: Any) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    page = tmp_path / "copy" / "index.html"
    page.write_text(page.read_text().replace("<h1>", "<script>document.title = 'broken'</script><h1>"))
    browser.get(page.as_uri())
    assert browser.title != "broken"
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refused) == 1 and "Content Security Policy" in refused[0]


def test_tables_sort_by_number_and_by_text_and_filter(folder: Path, browser: Any) -> None:
    browser.get((folder / "index.html").as_uri())
    heading = browser.find_elements("css selector", "#leaderboard thead button")[2]
    assert heading.text.startswith("loss")
    found = []
    for _ in range(2):
        heading.click()
        found.append([float(text) for text in _column(browser, "leaderboard", 3)])
    assert found == [[2.0, 1.0], [1.0, 2.0]]
    browser.get((folder / "runs.html").as_uri())
    browser.find_element("css selector", "#runs thead button").click()
    steps = _column(browser, "runs", 1)
    assert len(steps) == 10 and browser.execute_script(
        "return arguments[0].every((s, i, all) => !i || all[i - 1].localeCompare(s, 'en', {numeric: true}) <= 0)",
        steps,
    )
    browser.find_element("css selector", ".tools input").send_keys("interr")
    assert _column(browser, "runs", 1) == ["finetune/cut/v1"]


def test_links_lead_from_the_leaderboard_to_the_data(folder: Path, browser: Any) -> None:
    browser.get((folder / "index.html").as_uri())
    browser.find_element("link text", "finetune/a/v1").click()
    assert browser.find_element("css selector", "h1").text.startswith("finetune/a/v1")
    box = browser.find_element("css selector", ".graph a[href$='pretrain--base--v1.html'] rect")
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", box)
    _until(browser, lambda: "pretrain/base/v1" in browser.title)
    browser.find_element("css selector", "#origins a[href$='shard--toys--v1.html']").click()
    _until(browser, lambda: "shard/toys/v1" in browser.title)
    browser.find_element("link text", "Checkpoints").click()
    assert "production" in browser.find_element("css selector", "#checkpoints").text


def test_a_point_of_the_plot_opens_its_checkpoint(folder: Path, browser: Any) -> None:
    browser.get((folder / "index.html").as_uri())
    click = "document.querySelector('#speed-1 .plot').emit('plotly_click', {points: [{customdata: arguments[0]}]})"
    data = json.loads(browser.execute_script("return document.querySelector('#speed-1 script').textContent"))
    assert [trace["name"] for trace in data["traces"]] == ["batch 1", "batch 64"]
    browser.execute_script(click, data["traces"][0]["href"][0])
    _until(browser, lambda: browser.title.startswith("finetune/"))


def test_colours_follow_the_system(folder: Path, browser: Any) -> None:
    browser.get((folder / "steps" / "finetune--a--v1.html").as_uri())
    look = """return [getComputedStyle(document.body).backgroundColor,
        document.querySelector('.chart .xtick text').style.fill]"""
    light = browser.execute_script(look)
    _screen(browser, DESK, "dark")
    _until(browser, lambda: browser.execute_script(look)[1] != light[1])
    dark = browser.execute_script(look)
    assert _brightness(light[0]) > 200 > 100 > _brightness(dark[0])
    assert _brightness(light[1]) < 100 < 200 < _brightness(dark[1])


def _brightness(colour: str) -> float:
    return sum(int(part) for part in colour[4:-1].split(",")) / 3


def test_many_rows_are_paged(tmp_path: Path, browser: Any) -> None:
    site = build(reported.many(str(tmp_path / "root"), 120), tmp_path / "report")
    browser.get(site.as_uri())
    assert len(_column(browser, "leaderboard", 1)) == 50
    for _ in range(2):
        browser.find_element("css selector", "[aria-label='Next rows']").click()
    assert len(_column(browser, "leaderboard", 1)) == 20
    assert browser.find_element("css selector", ".pager span").text == "101–120 of 120"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(root, URL of a live report of it)."""
    root = reported.make(str(tmp_path / "root"))
    server = make_server(LiveReport(root, every_s=1), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield root, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_live_pages_show_news_and_keep_what_the_reader_chose(served: tuple[str, str], browser: Any) -> None:
    root, url = served
    browser.get(url + "runs.html")
    browser.find_element("css selector", "#runs thead button").click()
    browser.find_element("css selector", ".tools input").send_keys("cut")
    assert _column(browser, "runs", 1) == ["finetune/cut/v1"]
    shard = Step(kind="shard", name="toys", fn=reported.shard, config=reported.MadeConfig())
    reported.unfinished(root, "acut", shard)
    _until(browser, lambda: _column(browser, "runs", 1) == ["finetune/acut/v1", "finetune/cut/v1"])
    order = "return document.querySelector('#runs th').getAttribute('aria-sort')"
    assert browser.execute_script(order) == "ascending"
    browser.get(url + "steps/finetune--acut--v1.html")
    before = browser.find_element("css selector", "#curve-1 .main-svg")
    progress = storage.join(root, "finetune/acut/v1/progress.json")
    storage.overwrite(progress, storage.canonical_json({"done": 60, "total": 80, "unit": "steps"}))
    _until(browser, lambda: "60 of 80" in _text(browser, "main"))
    assert browser.find_element("css selector", "#curve-1 .main-svg") == before, "the drawing was kept"
    assert _text(browser, "#live").startswith("live, ")


def _get(url: str, **headers: str) -> tuple[int, bytes, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_server_knows_only_the_reports_files_and_its_own_name(served: tuple[str, str]) -> None:
    _, url = served
    status, data, headers = _get(url)
    assert status == 200 and b"Leaderboard" in data and headers["X-Content-Type-Options"] == "nosniff"
    assert _get(url, **{"If-None-Match": headers["ETag"]})[0] == 304
    for path in ("../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "steps/none.html"):
        assert _get(url + path)[0] == 404
    assert _get(url, Host="evil.example")[0] == 403


def test_a_root_that_stops_answering_leaves_the_last_pages_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveReport(reported.many(str(tmp_path / "root"), 3), every_s=0)
    assert b"cannot be read" not in (live.read("index.html") or b"")
    began = time.monotonic()

    def page_with(says: bool) -> bytes:  # the root is looked at again when it has rested
        while (b"cannot be read" in (page := live.read("index.html") or b"")) != says:
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        return page

    def away(self: Registry, folder: str, uris: list[str] | None = None) -> list[Any]:
        raise StorageUnavailable("the store is <away>")

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "read", away)
        page = page_with(True)
        assert b"&lt;away&gt;" in page and b"top1" in page
    assert b"top1" in page_with(False)
