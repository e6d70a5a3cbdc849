"""TensorBoard's page in a real browser: what stands on it, and the screenshots of the report.

    python tests/tensorboard_page.py --logdir runs --out docs

Needs Playwright (`pip install playwright`) and an installed Chromium (on Debian, `apt-get install
chromium`). Each `read_` function opens one tab and returns what a person would read there; the
tests compare that with the run's files.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: without it, the test skips itself
    from playwright.sync_api import Locator, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
FLAGS += " --disable-background-networking --disable-component-update"
LIMIT = 60  # seconds until TensorBoard or one element of its page has to be there

# Colours and values must be final in a screenshot: no fading, no blinking cursor, no spinner.
STILL = "*, *::before, *::after { transition: none !important; animation: none !important }"


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def missing() -> str:
    """Return why there can be no browser here, or an empty string."""
    if importlib.util.find_spec("playwright") is None:
        return "Playwright is not installed (pip install playwright)"
    return "" if find_chromium() else f"no browser found: none of {', '.join(CHROMIUM)}"


# ------------------------------------------------------------------------------ server, browser


@contextmanager
def serve(log_dir: Path) -> Iterator[str]:
    """Run TensorBoard on a free port until the block ends; yield its address.

    Raises
    ------
    RuntimeError
        If TensorBoard does not come up, or finds no run in `log_dir`.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    command += ["--host", "localhost", "--port", "0"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield wait_for_runs(process, output)
        finally:
            process.kill()
            process.wait()


def wait_for_runs(process: subprocess.Popen, output: tempfile.SpooledTemporaryFile) -> str:
    """Return TensorBoard's address as soon as it has read the log."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end, text = time.monotonic() + LIMIT, ""
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.1)
        output.seek(0)
        text = output.read()
        if address := re.search(r"http://localhost:\d+/", text):
            with opener.open(f"{address[0]}data/runs", timeout=LIMIT) as answer:
                if json.load(answer):
                    return address[0]
    raise RuntimeError(f"TensorBoard serves no run:\n{text}")


@contextmanager
def browse(width: int = 1600, height: int = 1000) -> Iterator[tuple["Page", list[str]]]:
    """Yield a page of a new browser, and the list that every error in it is added to.

    Errors are: messages of level "error" on the browser's console, uncaught exceptions, answers
    with status 400 or above. None is left out.
    """
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS.split())
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(LIMIT * 1000)
            page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on(
                "response",
                lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 else None,
            )
            yield page, errors
        finally:
            browser.close()


def open_tab(page: "Page", url: str, tab: str) -> None:
    """Open one of TensorBoard's tabs, by its name; the first time, load the page."""
    if not page.url.startswith(url):
        page.goto(f"{url}#{tab.lower().replace(' ', '_')}&_smoothingWeight=0")
        page.add_style_tag(content=STILL)
    page.get_by_role("tab", name=re.compile(rf"^\s*{tab}\s*$", re.IGNORECASE)).click()


# ------------------------------------------------------------------------------ the tabs


def read_tabs(page: "Page", url: str) -> list[str]:
    """Return the names of the tabs that have something to show."""
    open_tab(page, url, "Time Series")
    return [name.strip().upper() for name in page.get_by_role("tab").all_inner_texts()]


def read_runs(page: "Page", url: str) -> list[str]:
    """Return the names in the list of runs."""
    open_tab(page, url, "Time Series")
    names = page.locator("runs-data-table tb-data-table-content-row")
    names.first.wait_for()
    return [" ".join(name.split()) for name in names.all_inner_texts()]


def open_custom_scalars(page: "Page", url: str) -> list["Locator"]:
    """Open the custom scalars, with no point outside the axes; return the charts' cards."""
    open_tab(page, url, "Custom Scalars")
    ignore = page.locator("tf-custom-scalar-dashboard paper-checkbox").nth(1)
    if ignore.get_attribute("aria-checked") == "true":
        ignore.click()
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    for card in cards.all():
        card.locator(".match-list-entry").first.wait_for(state="attached")
    return cards.all()


def read_charts(page: "Page", url: str) -> dict[str, dict[str, tuple[int, float]]]:
    """Return every custom chart's curves: {chart: {tag: (last step, value there)}}.

    The values are those of the tooltip beside the mouse, at the right end of the chart: four
    significant digits.
    """
    charts = {}
    for card in open_custom_scalars(page, url):
        title = card.locator("tf-card-heading").evaluate("heading => heading.displayName")
        box = card.locator("vz-line-chart2").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 60, box["y"] + 90)
        page.mouse.move(box["x"] + box["width"] - 15, box["y"] + 90)
        tag = card.locator(".match-list-entry").first.text_content().split(maxsplit=1)[1].strip()
        tooltip = page.locator("vz-line-chart-tooltip").filter(has_text=tag)
        rows = tooltip.locator("tbody tr")
        rows.first.wait_for()
        # a coloured dot, name (run), smoothed, value, step, time, relative
        cells = [row.split("\t") for row in rows.all_inner_texts()]
        charts[title] = {
            cell[1].split(" (")[0]: (int(cell[4].replace(",", "")), float(cell[3].replace(",", "")))
            for cell in cells
        }
    return charts


def read_graph(page: "Page", url: str) -> list[str]:
    """Open the model's node in the graph; return the names of all nodes then drawn."""
    open_tab(page, url, "Graphs")
    nodes = page.locator("g.node")
    page.locator('g.node[data-name="input"]').wait_for()
    names = nodes.evaluate_all("nodes => nodes.map(node => node.dataset.name)")
    model = next(name for name in names if name not in ("input", "output") and "~" not in name)
    page.locator(f'g.node[data-name="{model}"] rect').first.dblclick()
    page.locator(f'g.node[data-name^="{model}/"]').first.wait_for()
    return nodes.evaluate_all("nodes => nodes.map(node => node.dataset.name)")


def filter_tags(page: "Page", url: str, tab: str, pattern: str) -> "Locator":
    """Open a tab, type into its tag filter, and return the section with the tags that match."""
    open_tab(page, url, tab)
    page.locator("tf-tag-filterer input:visible").fill(pattern)
    return page.locator("tf-category-paginated-view:visible").filter(has_text="Tags matching")


def find_image(page: "Page", url: str, tag: str) -> "Locator":
    """Filter the images by a tag; return the image, which may still be loading."""
    section = filter_tags(page, url, "Images", f"^{tag}$")
    return section.locator("#main-image-container img")


def read_image(page: "Page", url: str, tag: str) -> tuple[int, int]:
    """Return width and height in pixels of the image that the page shows under a tag."""
    image = find_image(page, url, tag)
    return tuple(image.evaluate("async i => (await i.decode(), [i.naturalWidth, i.naturalHeight])"))


def read_texts(page: "Page", url: str) -> dict[str, list[list[str]]]:
    """Return the first table of every text: {tag: rows of cells}."""
    open_tab(page, url, "Text")
    page.locator("tf-text-loader").first.wait_for()
    for button in page.locator("tf-text-dashboard button.heading").all():
        if button.get_attribute("open-button") is None:
            button.click()
    texts = {}
    for loader in page.locator("tf-text-loader").all():
        loader.scroll_into_view_if_needed()
        loader.locator("td td").first.wait_for()
        rows = loader.locator("td tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        texts[loader.evaluate("loader => loader.tag").removesuffix("/text_summary")] = rows
    return texts


def read_pr_curves(page: "Page", url: str) -> list[str]:
    """Return the tags of the precision-recall charts that have a curve."""
    open_tab(page, url, "PR Curves")
    curves = page.locator("tf-pr-curve-card")
    curves.first.locator("path.line, canvas, svg path").first.wait_for(state="attached")
    return curves.evaluate_all("cards => cards.map(card => card.tag)")


def read_hparams(page: "Page", url: str) -> list[dict[str, str]]:
    """Return the rows of the HParams table: {column: text}."""
    open_tab(page, url, "HParams")
    page.locator("vaadin-grid").get_by_text("Trial ID").wait_for()
    page.locator("vaadin-grid tbody tr:visible").first.wait_for()
    rows = page.locator("vaadin-grid thead tr:visible, vaadin-grid tbody tr:visible").evaluate_all(
        "rows => rows.map(row => [...row.cells].filter(cell => !cell.hidden).map(cell => "
        "cell.querySelector('slot').assignedElements()[0].innerText.trim()))"
    )
    header, *rows = [row for row in rows if any(row)]
    return [dict(zip(header, row, strict=True)) for row in rows]


# ------------------------------------------------------------------------------ screenshots


def crop(
    page: "Page",
    path: Path,
    bottom: float,
    top: float = 0,
    left: float = 0,
    right: float | None = None,
) -> None:
    """Save a part of the page, given in pixels, as a PNG; without `right`, up to its edge."""
    size = page.viewport_size
    width = (size["width"] if right is None else right) - left
    height = min(bottom, size["height"]) - top
    page.screenshot(path=path, clip={"x": left, "y": top, "width": width, "height": height})


def bottom(element: "Locator", margin: int = 20) -> float:
    """Return where an element ends, in pixels from the page's upper edge."""
    box = element.bounding_box()
    return box["y"] + box["height"] + margin


def shoot_scalars(page: "Page", url: str, path: Path) -> None:
    """Loss and accuracy as wide as the page, with their legends."""
    page.set_viewport_size({"width": 1400, "height": 1500})
    cards = open_custom_scalars(page, url)[:2]
    for card in cards:
        card.locator("paper-icon-button").first.click()
        card.locator(".toggle-matches-button").click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # the charts redraw in steps and give no sign of having ended
    crop(page, path, bottom(cards[-1].locator("#matches-container")))


def shoot_graph(page: "Page", url: str, path: Path) -> None:
    """The model's node opened to its stages, and the second stage to its layers."""
    page.set_viewport_size({"width": 1400, "height": 1600})
    names = read_graph(page, url)
    model = next(name for name in names if "/" in name).split("/")[0]
    page.wait_for_timeout(1500)  # the graph moves to its new place, and gives no sign of rest
    stage = next((name for name in names if "stage2" in name), None)  # a ResNet-18 has none
    if stage:
        page.locator(f'g.node[data-name="{stage}"] rect').first.dblclick()
        page.wait_for_timeout(1500)
    page.locator("tf-graph-scene svg").first.click(position={"x": 5, "y": 300})  # select nothing
    page.get_by_text("Fit to screen").click()
    page.wait_for_timeout(1500)
    names = ("output", model, "input")
    nodes = [page.locator(f'g.node[data-name="{name}"]').bounding_box() for name in names]
    left = min(box["x"] for box in nodes) - 20
    right = max(box["x"] + box["width"] for box in nodes) + 20
    last = page.locator('g.node[data-name="input"]')
    crop(page, path, bottom(last), nodes[0]["y"] - 20, left, right)


def shoot_images(page: "Page", url: str, path: Path) -> None:
    """The confusion matrix of the test split at its own size."""
    page.set_viewport_size({"width": 1460, "height": 1500})
    image = find_image(page, url, "Results/confusion_test")
    page.get_by_text("Show actual image size").click()
    page.wait_for_timeout(800)
    crop(page, path, bottom(image))


def shoot_text(page: "Page", url: str, path: Path) -> None:
    """The texts: configuration, dataset card, results."""
    page.set_viewport_size({"width": 1400, "height": 1600})
    texts = filter_tags(page, url, "Text", "config|dataset|results")
    for text in texts.locator("tf-text-loader").all():
        text.locator("td td").first.wait_for()
    page.wait_for_timeout(500)
    crop(page, path, bottom(texts, 0))


def shoot_pr_curves(page: "Page", url: str, path: Path) -> None:
    """The precision-recall curves, on test, of the four classes that are most often confused."""
    page.set_viewport_size({"width": 1500, "height": 1200})
    read_pr_curves(page, url)
    section = filter_tags(page, url, "PR Curves", "test/(MUS|NORM|STR|TUM)")
    page.wait_for_timeout(1500)
    crop(page, path, bottom(section.locator("tf-pr-curve-card").nth(3)))


def main() -> int:
    """Take every screenshot; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="default: %(default)s")
    args = parser.parse_args()
    reason = missing()
    if not any(args.logdir.rglob("events.out.tfevents.*")):
        reason = f"{args.logdir}: no TensorBoard log in that folder; train first"
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    with serve(args.logdir) as url, browse() as (page, errors):
        for shoot in (
            shoot_scalars,
            shoot_graph,
            shoot_images,
            shoot_text,
            shoot_pr_curves,
        ):
            path = args.out / f"{shoot.__name__.replace('shoot', 'tb')}.png"
            page.goto("about:blank")  # no filter is left over from the picture before
            shoot(page, url, path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    for error in errors:
        print(f"error on the page: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
