"""Takes the README's pictures of the page: python -m tests.page.screenshots MODEL writes .github/page*.webp.

Needs Chromium, playwright and the sample photos' packages. Prints seconds from click to result, what the page loads,
and the hosts that the browser asked.
"""

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.page.conftest import start

PHOTO, REFERENCE = 2, 5  # of the samples: coffee, coffee cup
OUT = Path(__file__).parents[2] / ".github"


def take(model: str, photo: int, reference: int) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = start(Path(folder), "--model", model)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1180})
        hosts, sizes = set[str](), list[int]()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
        page.on("requestfinished", lambda request: sizes.append(request.sizes()["responseBodySize"]))
        began = time.perf_counter()
        page.goto(server.url)
        page.wait_for_selector("#edit")
        page.wait_for_load_state("load")
        print(f"page: {time.perf_counter() - began:.1f} s, {sum(sizes) / 1e6:.1f} MB")
        page.locator("#sample-photos .grid-container button").nth(photo).click()
        canvas = page.locator("#brush canvas")
        canvas.wait_for()
        page.locator("#brush input[type=range]").fill("90")
        frame = canvas.bounding_box()
        assert frame is not None
        xs, ys = [0.42, 0.5, 0.58, 0.6, 0.52, 0.43, 0.42, 0.5], [0.25, 0.22, 0.28, 0.4, 0.46, 0.4, 0.28, 0.35]
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"], steps=4)
            if not k:
                page.mouse.down()
        page.mouse.up()
        page.locator("#sample-references .grid-container button").nth(reference).click()
        page.locator("#status", has_text="Reference of").wait_for()
        page.locator("#scale input[type=number]").fill("3")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(1500)
        _save(page.screenshot(), "page.webp")
        for count in ("1", "4"):
            page.locator("#count input[type=number]").fill(count)
            page.keyboard.press("Tab")
            began = time.perf_counter()
            page.locator("#edit").click()
            page.locator("#status", has_text="ready").wait_for(timeout=120_000)
            print(f"n = {count}: {time.perf_counter() - began:.1f} s from click to result")
            page.locator("#reference img").first.wait_for()
            page.locator("#sample-references .grid-container button").nth(reference).click()
            page.locator("#status", has_text="Reference of").wait_for()
        page.wait_for_timeout(2000)
        page.locator("#results").scroll_into_view_if_needed()
        page.wait_for_timeout(1500)
        _save(page.locator("#results").screenshot(), "page-result.webp")
        print("hosts:", *sorted(hosts))
        browser.close()
        server.end()


def _save(png: bytes, name: str) -> None:
    Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB").save(OUT / name, quality=80, method=6)
    print(f"{name}: {(OUT / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    take(sys.argv[1], PHOTO, REFERENCE)
