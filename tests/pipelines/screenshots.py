"""Takes the README's picture of runs side by side: python -m tests.pipelines.screenshots.

Writes .github/mlflow-compare.webp. Run it after `make repro`: it opens the newest view that evaluate saved in
MLFLOW_TRACKING_URI, a SQLite file. Needs Chromium and playwright.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from pbe import track
from pbe.places import tracking_uri

OUT = Path(__file__).parents[2] / ".github" / "mlflow-compare.webp"
PORT = 5127
HIDDEN = ("baseline-hole_kept", "baseline-poisson")  # the picture is of four rows
CLOSED = ("mlflow.assistant.chat_panel.close", "mlflow.experiment_page.shared_view.dismiss")
SIDEBAR = "mlflow_header.toggle_sidebar_button"
EMPTY_PX = 260  # of the card, below one row of pictures


def take() -> None:
    from mlflow import MlflowClient

    experiment = MlflowClient(tracking_uri()).get_experiment_by_name(track.EXPERIMENT)
    assert experiment is not None
    views = {key: json.loads(value) for key, value in experiment.tags.items() if key.startswith(f"{track.VIEW}table-")}
    newest = max(views, key=lambda key: views[key]["createdAt"]).removeprefix(track.VIEW)
    path = f"#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={newest}&compareRunsMode=CHART"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
    command += ["--backend-store-uri", tracking_uri()]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as server, sync_playwright() as playwright:
        try:
            _wait_for_server()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1640, "height": 1060})
            page.goto(f"http://127.0.0.1:{PORT}/{path}")
            _arrange(page)
            shown = Image.open(io.BytesIO(page.screenshot()), formats=["PNG"]).convert("RGB")
            browser.close()
        finally:
            os.killpg(server.pid, 15)
    shown.save(OUT, quality=80, method=6)
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


def _arrange(page: Page) -> None:
    page.locator("img[src*='get-artifact']").first.wait_for(timeout=120_000)
    for name in (SIDEBAR, *CLOSED):
        button = page.locator(f"button[data-component-id='{name}']")
        if button.count():
            button.click()
    for name in HIDDEN:
        page.get_by_role("row").filter(has_text=name).locator("label").filter(has_text="Hide run").click()
    number = page.get_by_role("spinbutton").bounding_box()
    assert number is not None
    x, y = number["x"] + number["width"] + 6, number["y"] + number["height"] + 3  # the card's handle
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - EMPTY_PX, steps=5)
    page.mouse.up()
    page.wait_for_timeout(5000)


def _wait_for_server() -> None:
    for _ in range(120):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError("mlflow server does not answer")


if __name__ == "__main__":
    take()
