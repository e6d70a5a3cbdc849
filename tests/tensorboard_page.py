"""TensorBoard's page in a real browser: what stands on it, and the screenshots of the report.

python tests/tensorboard_page.py --logdir runs --out docs
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from tensorboard import program

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WINDOW = {"width": 1400, "height": 1000}
LIMIT = 60  # seconds until TensorBoard or one element of its page has to be there


@contextmanager
def browse(log_dir: Path) -> Iterator[tuple[Page, list[str]]]:
    """Yield TensorBoard's page as it opens for that folder, and the list of its errors."""
    server = program.TensorBoard()
    server.configure(logdir=str(log_dir), host="localhost", port=0)
    errors = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=server.launch(), viewport=WINDOW)
        page.set_default_timeout(LIMIT * 1000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("response", lambda r: errors.append(f"{r.status} {r.url}") if not r.ok else None)
        wait_for_runs(page, log_dir)
        page.goto("/")
        page.locator("line-chart").first.wait_for()
        yield page, errors
        browser.close()


def wait_for_runs(page: Page, log_dir: Path) -> None:
    """Wait until TensorBoard has found every run in the folder."""
    runs = {path.parent for path in log_dir.rglob("events.*")}
    end = time.monotonic() + LIMIT
    while not runs or len(page.request.get("data/runs").json()) < len(runs):
        assert time.monotonic() < end, f"{log_dir}: TensorBoard finds no run there"
        time.sleep(0.1)


def read_charts(page: Page) -> dict[str, dict[str, tuple[int, float, str]]]:
    """Return the last step, value and colour of each curve, by tag and run, on the charts that are
    open on the page."""
    charts = {}
    for card in page.locator("card-view").all():
        card.scroll_into_view_if_needed()  # which draws it
        rows = card.locator("tb-data-table-content-row")
        rows.first.wait_for()
        curves = {}
        for row in rows.all():
            run, _smoothed, value, step = row.inner_text().split()[:4]
            colour = row.locator(".row-circle span").get_attribute("style")
            curves[run] = (int(step), float(value), colour)
        charts[card.locator(".tag").get_attribute("title")] = curves
    return charts


def open_tab(page: Page, tab: str) -> None:
    """Open one of TensorBoard's tabs, by its name."""
    page.get_by_role("tab", name=re.compile(rf"^\s*{tab}\s*$", re.IGNORECASE)).click()


def open_graph(page: Page) -> list[str]:
    """Open the model's node in the graph; return its name and those of the nodes in it."""
    open_tab(page, "Graphs")
    page.locator('g.node[data-name="input"]').wait_for()
    names = "nodes => nodes.map(node => node.dataset.name)"
    parts = page.locator("g.node").evaluate_all(names)
    (model,) = [name for name in parts if name not in ("input", "output") and "~" not in name]
    open_node(page, model)
    inside = page.locator(f'g.node[data-name^="{model}/"]')
    inside.first.wait_for()
    return [model, *inside.evaluate_all(names)]


def open_node(page: Page, name: str) -> None:
    """Open a node of the graph."""
    page.locator(f'g.node[data-name="{name}"] rect').first.dblclick()
    page.wait_for_timeout(1500)  # the graph moves to its new place and gives no sign of rest


def read_texts(page: Page) -> dict[str, list[list[str]]]:
    """Return the first table of every text: {tag: rows of cells}."""
    open_tab(page, "Text")
    page.locator("tf-tag-filterer input:visible").fill(".*")  # opens a section with every tag
    section = page.locator("tf-category-paginated-view:visible").filter(has_text="Tags matching")
    loaders = section.locator("tf-text-loader")
    loaders.first.wait_for()
    cells = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    texts = {}
    for loader in loaders.all():
        loader.scroll_into_view_if_needed()
        loader.locator("td td").first.wait_for()
        tag = loader.evaluate("loader => loader.tag").removesuffix("/text_summary")
        texts[tag] = loader.locator("td tr").evaluate_all(cells)
    return texts


def read_hparams(page: Page) -> list[dict[str, str]]:
    """Return the rows of the HParams table: {column: text}."""
    open_tab(page, "HParams")
    page.locator("vaadin-grid tbody tr:visible").first.wait_for()
    rows = page.locator("vaadin-grid :is(thead, tbody) tr:visible").evaluate_all(
        "rows => rows.map(row => [...row.cells].filter(cell => !cell.hidden).map(cell => "
        "cell.querySelector('slot').assignedElements()[0].innerText.trim()))"
    )
    header, *rows = filter(any, rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def main() -> None:
    """Take the screenshots: the first page, with all values as they are, and the graph. The page's
    errors go to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with browse(args.logdir) as (page, errors):
        page.set_viewport_size({"width": 1400, "height": 1250})  # the third chart and its table
        page.get_by_text("Ignore outliers in chart scaling").click()
        page.locator(".scalars-smoothing input[type=number]").fill("0")
        page.wait_for_timeout(3000)  # charts are drawn in steps and give no sign of having ended
        page.screenshot(path=args.out / "tb_scalars.png")
        page.set_viewport_size({"width": 1400, "height": 1600})  # the graph is tall
        for name in open_graph(page):
            if "stage2" in name:  # shows its skip connection; a ResNet-18 has none
                open_node(page, name)
        page.locator("tf-graph-scene svg").first.click(position={"x": 5, "y": 300})  # selects none
        page.get_by_text("Fit to screen").click()
        page.wait_for_timeout(1500)
        page.locator("tf-graph-scene #root").screenshot(path=args.out / "tb_graph.png")
    sys.exit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
