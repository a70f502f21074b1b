"""report.html in a real browser. Needs Chromium (Debian's package chromium)."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.run_folders import write_facts, write_run, write_samples, write_status

import train_lora

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
HOSTILE = "a </script><img src=x onerror=alert(1)> \"cat\" & 'dog'"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as api:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = api.chromium.launch(executable_path=BROWSER, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of 40 logs with three steps of samples, which trains."""
    folder = write_run(tmp_path / "run", num_rows=40)
    write_samples(folder, [0, 200, 400])
    write_facts(folder, [HOSTILE, "a dog"])
    (folder / "events.jsonl").write_text(
        '{"step": 0, "kind": "started", "time": 1, "text": ""}\n'
        '{"step": 100, "kind": "killed", "time": 1, "text": ""}\n'
        '{"step": 90, "kind": "resumed", "time": 1, "text": ""}\n'
    )
    write_status(folder)
    return folder


class Opened:
    """A page, with everything that it said and loaded."""

    def __init__(self, browser, path: Path, size=DESKTOP, scheme="light"):
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.messages.append("an alert"))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)

    def close(self) -> None:
        """Check that nothing went wrong, and nothing was loaded besides the page."""
        assert not self.messages
        others = {url for url in self.requests if not url.startswith("data:")}
        assert others == {self.url}
        self.page.close()


def report_of(folder: Path) -> Path:
    assert train_lora.main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_charts(browser, run_folder, size, scheme):
    opened = Opened(browser, report_of(run_folder), size, scheme)
    page = opened.page
    counts = page.evaluate(
        "report.charts.map((chart) => [chart.id, chart.plot.data[0].length, chart.plot.width])"
    )
    assert [entry[0] for entry in counts] == [
        "loss",
        "rate",
        "norm",
        "speed",
        "wait",
        "memory",
        "noise",
    ]
    assert [entry[1] for entry in counts] == [40] * 6 + [20]
    assert all(200 < width < size["width"] for _, _, width in counts)
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")
    drawn = page.evaluate(
        "report.charts.every(({plot}) => plot.ctx.getImageData(0, 0, plot.ctx.canvas.width, "
        "plot.ctx.canvas.height).data.some((value) => value > 0))"
    )
    assert drawn
    opened.close()


def test_the_slider_changes_the_pictures_by_mouse_and_keyboard(browser, run_folder):
    opened = Opened(browser, report_of(run_folder))
    page = opened.page
    image = page.locator("[data-prompt='1'] .now img")
    caption = page.locator("[data-prompt='1'] .now figcaption")
    last = image.get_attribute("src")
    assert caption.text_content().strip() == "step 400"
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert caption.text_content().strip() == "step 200"
    assert image.get_attribute("src") != last
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 200"
    link = page.locator("[data-prompt='1'] .now a").get_attribute("href")
    assert link == "./samples/lora-step00000200_01.png"
    page.keyboard.press("Home")
    assert caption.text_content().strip() == "step 0"
    # the step stays when the page loads itself again
    page.locator("#reload").click()
    page.wait_for_load_state()
    assert page.locator("#step-name").text_content() == "0"
    opened.close()


def test_texts_of_users_are_texts(browser, run_folder):
    opened = Opened(browser, report_of(run_folder))
    assert opened.page.locator("#samples h3").first.text_content() == HOSTILE
    opened.close()


def test_the_page_of_a_run_that_ended_stays_as_it_is(browser, run_folder):
    opened = Opened(browser, report_of(run_folder))
    assert opened.page.locator("#refresh").is_checked()
    opened.close()
    write_status(run_folder, state="finished")
    opened = Opened(browser, report_of(run_folder))
    assert opened.page.locator("#refresh").count() == 0
    assert opened.page.locator(".badge").text_content() == "finished"
    opened.close()


def test_every_control_can_be_reached_by_keyboard(browser, run_folder):
    opened = Opened(browser, report_of(run_folder))
    reached = set()
    for _ in range(80):
        opened.page.keyboard.press("Tab")
        reached.add(
            opened.page.evaluate("(document.activeElement.id || document.activeElement.tagName)")
        )
    assert {"step", "refresh", "reload", "A", "SUMMARY"} <= reached
    opened.close()


def test_a_large_report(browser, tmp_path):
    folder = write_run(tmp_path / "run", num_rows=100_000, log_every=1)
    write_samples(folder, [*range(0, 5000, 100)], num_prompts=4, side=256)
    opened = Opened(browser, report_of(folder))
    assert opened.page.evaluate("report.charts[0].plot.data[0].length") <= 1500
    assert opened.page.evaluate("report.data.samples[0].steps.length") == 50
    opened.close()


def test_the_comparison(browser, tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", num_rows=30)
    for folder in (first, second):
        write_samples(folder, [100, 200])
    out = tmp_path / "page.html"
    assert train_lora.main(["report", str(first), str(second), "--out", str(out)]) == 0
    opened = Opened(browser, out)
    page = opened.page
    assert page.evaluate("report.charts[0].plot.data.length") == 3
    assert page.locator(".now").count() == 4
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    captions = page.locator(".now figcaption").all_text_contents()
    assert [caption.strip() for caption in captions] == ["a, step 100", "b, step 100"] * 2
    opened.close()
