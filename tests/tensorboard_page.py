"""TensorBoard's page in a real browser: what stands on it, and the screenshots of the report.

python tests/tensorboard_page.py --logdir runs --out docs
"""

import argparse
import io
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright
from tensorboard import program

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
LIMIT = 60  # seconds until TensorBoard or one element of its page has to be there


@contextmanager
def browse(log_dir: Path) -> Iterator[tuple[Page, list[str]]]:
    """Yield a new browser's page of TensorBoard on that folder, and the list of its errors."""
    server, errors, end = program.TensorBoard(), [], time.monotonic() + LIMIT
    server.configure(logdir=str(log_dir), host="localhost", port=0)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=server.launch(), viewport={"width": 1500, "height": 1600})
        page.set_default_timeout(LIMIT * 1000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("response", lambda r: errors.append(f"{r.status} {r.url}") if not r.ok else None)
        runs = {path.parent for path in log_dir.rglob("events.*")}
        while not runs or len(page.request.get("data/runs").json()) < len(runs):
            assert time.monotonic() < end, f"{log_dir}: TensorBoard finds no run there"
            time.sleep(0.1)
        open_charts(page)
        yield page, errors
        browser.close()


def open_charts(page: Page, tags: Sequence[str] = ()) -> list[Locator]:
    """Load the page at its first tab, with these tags' charts (none: all); return their cards."""
    pattern = quote(f"^({'|'.join(map(re.escape, tags))})$" if tags else "")
    page.goto(f"/?smoothing=0&tagFilter={pattern}#timeseries")
    cards = [page.locator(f'scalar-card:has(.tag[title="{tag}"])').first for tag in tags]
    for card in cards:
        card.scroll_into_view_if_needed()  # which draws it
        card.locator("tb-data-table-content-row").first.wait_for()
    return cards


def open_tab(page: Page, tab: str) -> None:
    """Open one of TensorBoard's tabs, by its name."""
    page.get_by_role("tab", name=re.compile(rf"^\s*{tab}\s*$", re.IGNORECASE)).click()


def read_names(page: Page) -> tuple[list[str], list[str]]:
    """Return the names of the tabs that have something to show, and those of the runs."""
    runs = page.locator("runs-data-table tb-data-table-content-row")
    runs.first.wait_for()
    tabs = [text.strip().upper() for text in page.get_by_role("tab").all_inner_texts()]
    return tabs, [text.strip() for text in runs.all_inner_texts()]


def read_charts(page: Page, tags: Sequence[str]) -> dict[str, dict[str, tuple[int, float, str]]]:
    """Return last step, value and colour of the curves on at most twelve charts, by tag and run."""
    charts, colour = {}, "circles => circles.map(circle => circle.style.backgroundColor)"
    for tag, card in zip(tags, open_charts(page, tags), strict=True):
        rows, canvas = card.locator("tb-data-table-content-row"), card.locator("line-chart canvas")
        cells = [text.replace(",", "").split() for text in rows.all_inner_texts()]
        colours = rows.locator(".row-circle span").evaluate_all(colour)
        drawn, end = set(), time.monotonic() + 5
        while not drawn.issuperset(colours) and time.monotonic() < end:  # they are drawn in steps
            picture = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
            drawn = {f"rgb{rgb}" for count, rgb in picture.getcolors(1 << 24) if count > 50}
        curves = zip(cells, colours, strict=True)  # cells: run, value, step, time
        charts[tag] = {c[0]: (int(c[2]), float(c[1]), rgb) for c, rgb in curves if rgb in drawn}
    return charts


def read_graph(page: Page) -> list[str]:
    """Open the model's node in the graph; return the names of all nodes then drawn, it first."""
    open_tab(page, "Graphs")
    nodes = page.locator("g.node")
    page.locator('g.node[data-name="input"]').wait_for()
    names = nodes.evaluate_all("nodes => nodes.map(node => node.dataset.name)")
    model = next(name for name in names if name not in ("input", "output") and "~" not in name)
    page.locator(f'g.node[data-name="{model}"] rect').first.dblclick()
    page.locator(f'g.node[data-name^="{model}/"]').first.wait_for()
    return [model, *nodes.evaluate_all("nodes => nodes.map(node => node.dataset.name)")]


def filter_tags(page: Page, tab: str, pattern: str) -> Locator:
    """Open a tab, type into its tag filter, and return the section with the tags that match."""
    open_tab(page, tab)
    page.locator("tf-tag-filterer input:visible").fill(pattern)
    return page.locator("tf-category-paginated-view:visible").filter(has_text="Tags matching")


def read_image(page: Page, tag: str) -> tuple[int, int]:
    """Return width and height in pixels of the image that the page shows under a tag."""
    image = filter_tags(page, "Images", f"^{tag}$").locator("#main-image-container img")
    return tuple(image.evaluate("async i => (await i.decode(), [i.naturalWidth, i.naturalHeight])"))


def read_texts(page: Page, pattern: str) -> dict[str, list[list[str]]]:
    """Return the first table of every text whose tag matches: {tag: rows of cells}."""
    loaders = filter_tags(page, "Text", pattern).locator("tf-text-loader")
    loaders.first.wait_for()
    texts, cells = {}, "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    for loader in loaders.all():
        loader.scroll_into_view_if_needed()
        loader.locator("td td").first.wait_for()
        tag = loader.evaluate("loader => loader.tag").removesuffix("/text_summary")
        texts[tag] = loader.locator("td tr").evaluate_all(cells)
    return texts


def read_pr_curves(page: Page) -> list[str]:
    """Return the tags of the precision-recall charts that have a curve."""
    open_tab(page, "PR Curves")
    cards = page.locator("tf-pr-curve-card")
    cards.first.wait_for()
    for card in cards.all():
        card.locator("path.line").first.wait_for(state="attached")  # the curve
    return cards.evaluate_all("cards => cards.map(card => card.tag)")


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


def prepare(page: Page) -> Iterator[tuple[str, list[Locator]]]:
    """Bring one picture after the other onto the page; yield its name, and what has to be on it."""
    top = page.locator("app-header")
    cards = open_charts(page, ["Loss", "Accuracy"])
    page.get_by_text("Ignore outliers in chart scaling").click()  # all of every curve
    page.get_by_role("button", name="Settings").last.click()  # it closes
    yield "tb_scalars", [top, *cards]
    model, *names = read_graph(page)
    for stage in [name for name in names if "stage2" in name][:1]:  # a ResNet-18 has none
        page.wait_for_timeout(1500)  # the graph moves to its new place, and gives no sign of rest
        page.locator(f'g.node[data-name="{stage}"] rect').first.dblclick()
    page.wait_for_timeout(1500)
    page.locator("tf-graph-scene svg").first.click(position={"x": 5, "y": 300})  # select nothing
    page.get_by_text("Fit to screen").click()
    yield "tb_graph", [page.locator(f'g.node[data-name="{n}"]') for n in ("output", "input", model)]
    section = filter_tags(page, "Images", "^Confusion/val by epoch$")
    page.get_by_text("Show actual image size").click()
    yield "tb_images", [top, section]


def shoot(page: Page, path: Path, elements: Sequence[Locator]) -> None:
    """Save the part of the page that holds these elements, with a margin, as a PNG."""
    page.wait_for_timeout(1500)  # charts are drawn in steps, and give no sign of having ended
    boxes = [element.bounding_box() for element in elements]
    clip = {k: max(0, min(box[k] for box in boxes) - 20) for k in "xy"}
    for k, side in (("x", "width"), ("y", "height")):
        clip[side] = max(box[k] + box[side] for box in boxes) + 20 - clip[k]
    page.screenshot(path=path, clip=clip, animations="disabled")


def main() -> None:
    """Take every screenshot; say on stderr what went wrong on the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--logdir", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with browse(args.logdir) as (page, errors):
        for name, elements in prepare(page):
            shoot(page, args.out / f"{name}.png", elements)
    sys.exit("\n".join(errors) or 0)


if __name__ == "__main__":
    main()
