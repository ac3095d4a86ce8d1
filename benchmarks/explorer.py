"""100,000 photos in a gallery → milliseconds from a key press to the new grid, measured in Chromium: one JSON line.

The features are random, the model the small CLIP with random weights, the photos 24 rendered people's, over and over:
speed depends on none of these. JupyterLab's widget runs in Voilà here, on loopback.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
from pandas import DataFrame
from playwright.sync_api import Page, sync_playwright

import irra_core as irra
from irra_core.search.nearest import Memory

PHOTOS, PRESSES = 100_000, 50
TYPED = "a man in a red coat and white trousers with a black bag and a hat"
SERVED = "import sys\nsys.path.insert(0, {folder!r})\nfrom explorer import page\npage({data!r})"
WATCH = """() => {
  window.took = [];
  let pressed = null;
  const root = document.querySelector(".irra");
  root.querySelector("textarea").addEventListener("keydown", () => { pressed = performance.now(); }, true);
  new MutationObserver(() => requestAnimationFrame(() => {  // the frame that shows the grid
    if (pressed !== null) window.took.push(performance.now() - pressed);
    pressed = null;
  })).observe(root.querySelector(".irra-strips"), { childList: true });
}"""


def page(data: str) -> irra.QueryExplorer:
    """The explorer over 100,000 photos."""
    recipe = irra.recipe("synthetic", pretrained="none")
    photos = irra.load_annotations("synthetic", data).drop_duplicates("path")
    rows = photos.iloc[np.arange(PHOTOS) % len(photos)][["path"]].reset_index(drop=True)
    rows = DataFrame({"image_id": np.arange(PHOTOS), "path": rows.path.astype("str")})
    rows["pid"] = (rows.image_id // 4).astype("Int64")
    model = irra.build_model(recipe, 2)
    width = model.encode_text(irra.tokenize(["a man"])).shape[1]
    features = np.random.default_rng(0).standard_normal((PHOTOS, width)).astype(np.float32)
    store = Memory(width, "exact")
    store.extend([(rows, features / np.linalg.norm(features, axis=1, keepdims=True))])
    return irra.QueryExplorer(irra.Gallery(model, store), query="a man")


@contextlib.contextmanager
def served(folder: Path):
    """The page's address while Voilà serves it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    notebook = nbformat.v4.new_notebook()
    code = SERVED.format(folder=str(Path(__file__).parent), data=str(folder / "data"))
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    nbformat.write(notebook, folder / "page.ipynb")
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "voila", str(folder / "page.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1",
               f"--port={port}", f"--Voila.token={token}"]  # fmt: skip
    with open(folder / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(300):
                with socket.socket() as trial:
                    if trial.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/?token={token}"
        finally:
            server.terminate()
            server.wait(20)


def milliseconds(page: Page) -> list[float]:
    """From each of the key presses to the frame that shows its grid."""
    box = page.locator(".irra textarea")
    page.locator(".irra .irra-card").first.wait_for()
    box.click()
    page.keyboard.press("End")
    page.evaluate(WATCH)
    for number in range(PRESSES):
        page.keyboard.type((" " + TYPED)[number % (len(TYPED) + 1)])
        page.wait_for_function("seen => window.took.length > seen", arg=number, timeout=30_000)
        time.sleep(0.1)
    return page.evaluate("window.took")


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("Chromium is not installed: run `make browser`")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        irra.make_synthetic(folder / "data", people=24)
        with served(folder) as address:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1360, "height": 1000})
            page.goto(address, timeout=120_000)
            took = milliseconds(page)
            browser.close()
    found = {"benchmark": "explorer: key press to grid", "photos": PHOTOS, "presses": len(took)}
    found |= {"median_ms": round(float(np.median(took))), "p90_ms": round(float(np.quantile(took, 0.9)))}
    print(json.dumps(found | {"cores": os.cpu_count(), "load_average": round(psutil.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
