"""The explorer as people meet it: JupyterLab and Voilà on loopback, and a real Chromium that types and points."""

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pandas as pd
import pytest
from pandas import DataFrame
from PIL import Image

import irra_core as irra

pytestmark = pytest.mark.notebook
ROOT = Path(__file__).parents[1]
WAIT = 60_000  # ms, for what needs a kernel
HOSTILE = '<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1"> a man'


@pytest.fixture(scope="module")
def browser():
    chromium = installed_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


def installed_browser() -> str:
    """Chromium's path. Where it or Playwright is missing the test is skipped, in continuous integration it fails."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    missing = [name for name, there in (("Chromium", chromium), ("Playwright", find_spec("playwright"))) if not there]
    if missing:
        message = f"{' and '.join(missing)} not installed: run `make browser`"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return chromium


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Six rendered people in two photos each, a model trained on just these, and one that has learnt nothing.

    What is tried is that the page shows what the library found, not how good a model is: the sentence that is typed is
    one whose person the trained model puts first.
    """
    base = tmp_path_factory.mktemp("by-heart")
    home = irra.make_synthetic(base / "data", people=40)
    records = DataFrame(json.loads((home / "annotations.json").read_text("utf-8"))).query("split == 'test'")
    annotations = home / "people.json"
    annotations.write_text(records.groupby("id").head(2).to_json(orient="records"), "utf-8")
    people = irra.load_annotations(annotations)
    table = pd.concat([people.assign(split=split) for split in ("train", "val", "test")], ignore_index=True)
    recipe = irra.recipe("synthetic", pretrained="none", losses="itc+mlm", lr=1e-3, batch_size=12, epochs=40,
                         evaluate_every=1000, erase_probability=0.0, crop_padding=0, adam_beta2=0.98)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRRA_CACHE", str(base / "irra_cache"))  # this fixture is made before each test's own folders
        *_, last = irra.train(recipe, table, base / "learnt")
    assert last["val_R1"] > 50  # chance is 17
    queries = pd.read_csv(base / "learnt" / "queries.csv")
    assert list(queries.image_id) == list(people.image_id)
    asked = queries[queries["rank"] == 1].AP.idxmax()
    (base / "before").mkdir()
    before = base / "before" / "weights.safetensors"
    irra.save_checkpoint(irra.build_model(recipe.replace(losses="itc"), 6), recipe.replace(losses="itc"), before)
    return {"base": base, "annotations": annotations, "people": people, "asked": people.loc[asked],
            "learnt": base / "learnt" / "weights.safetensors", "before": before}  # fmt: skip


@pytest.fixture(scope="module")
def folder(known):
    """A folder with the notebook, its parameters set as a user would set them."""
    folder = known["base"] / "served"
    folder.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "explorer.ipynb", 4)
    values = {"dataset": known["annotations"], "checkpoint": known["learnt"], "compare": known["before"]}
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        cell.source, changed = re.subn(rf'(?m)^({name}: str = )(None|"synthetic")', rf'\1"{value}"', cell.source)
        assert changed == 1, name
    nbformat.write(notebook, folder / "explorer.ipynb")
    return folder


def answer(url: str):
    """The JSON that a server gives, None while it does not answer."""
    with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)
    return None


def until(condition, what: str, seconds: float = 90):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.3)
    return found


@contextlib.contextmanager
def served(command: list[str], base: Path, port: int):
    """A server of its own settings, reports and cache, stopped at the end."""
    own = {name: str(base / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR",
           "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "IRRA_REPORTS", "IRRA_CACHE")}  # fmt: skip
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    with open(base / f"server-{port}.log", "w+", encoding="utf-8") as log:
        server = subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=log, stderr=log)
        try:
            until(lambda: server.poll() is None and reachable(port), f"{command[0]} on port {port}, see {log.name}")
            yield Path(log.name)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def reachable(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def watched(browser, folder: Path):
    """A page whose requests stay on this machine, which opens no dialog and shows no traceback."""
    page = browser.new_page(viewport={"width": 1360, "height": 1300})
    requests, dialogs = [], []
    page.on("request", lambda request: requests.append(request))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.set_default_timeout(WAIT)
    try:
        yield page
    except BaseException:
        page.screenshot(path=folder / "failed.png")
        raise
    # Voilà links icon fonts of a CDN: the policy that `irra explore` sends keeps the browser from asking for them
    assert [each.url for each in requests if leaves(each.url) and each.failure != "csp"] == []
    assert dialogs == []
    assert page.evaluate("window.hacked") is None
    assert "Traceback" not in page.inner_text("body")
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').count() == 0
    page.close()


def leaves(url: str) -> bool:
    return urlsplit(url).scheme in ("http", "https", "ws", "wss") and urlsplit(url).hostname != "127.0.0.1"


def finds_the_right_person_first(explorer, asked) -> None:
    """A sentence whose person the library ranks first is so in the page, and higher than before the model learnt."""
    explorer.locator("textarea").fill(asked.caption)
    explorer.locator(".irra-truth").wait_for()
    assert explorer.locator(".irra-truth .irra-pid").inner_text() == f"id {asked.pid}"
    strips = explorer.locator(".irra-strip")
    assert strips.count() == 2
    best = strips.first.locator(".irra-card").first
    assert best.get_attribute("aria-label").startswith("rank 1, right, score ")
    assert best.locator(".irra-pid").inner_text() == f"id {asked.pid}"
    assert "first right photo at rank 1" in strips.first.locator("h4").inner_text()
    precision = [int(re.search(r"(\d+) %", strips.nth(i).locator("h4").inner_text())[1]) for i in (0, 1)]
    assert precision[0] > precision[1]


def test_in_jupyterlab_a_sentence_finds_its_person_and_the_page_says_why(browser, known, folder):
    port, token = free_port(), secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    settings = known["base"] / "jupyterlab_settings_dir" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)  # every cell is in the page, also where nobody has scrolled yet
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with served(command, known["base"], port), watched(browser, known["base"]) as page:
        page.goto(f"{address}/lab/tree/explorer.ipynb?token={token}&reset")
        page.locator(".jp-Notebook").wait_for()
        until(lambda: idle(answer(f"{address}/api/kernels?token={token}")), "an idle kernel with a connection")
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        explorer = page.locator(".irra").first
        explorer.wait_for(state="attached")
        explorer.scroll_into_view_if_needed()
        finds_the_right_person_first(explorer, known["asked"])
        explains_itself(page, explorer)
        fills_in_a_mask(explorer)
        starts_from_a_picture(explorer, known["people"])
        bears_any_text(explorer)


def idle(kernels) -> bool:
    return bool(kernels) and all(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels)


def explains_itself(page, explorer) -> None:
    """Pointing at a word lights up every photo of the model with attention; pointing at a photo weighs every word."""
    strip = explorer.locator(".irra-strip").first
    explorer.locator(".irra-word").nth(1).hover()
    strip.locator("canvas").first.wait_for()
    assert strip.locator("canvas").count() == strip.locator(".irra-card").count() == 10
    strip.locator(".irra-card").first.hover()
    explorer.locator(".irra-word small:not(:empty)").first.wait_for()
    weights = explorer.locator(".irra-word small").all_inner_texts()
    assert all(re.fullmatch(r"[+−]\d+", weight) for weight in weights)
    assert len(set(weights)) > 1
    page.mouse.move(0, 0)


def fills_in_a_mask(explorer) -> None:
    explorer.locator("textarea").fill("a [MASK] wearing a [MASK] coat")
    first = explorer.locator(".irra-strip").first.locator(".irra-card").first
    first.locator(".irra-guesses").nth(1).wait_for()
    assert first.locator(".irra-guesses").count() == 2
    assert first.locator(".irra-guesses").first.locator("small").count() == 5
    shares = [
        int(text.rstrip(" %")) for text in first.locator(".irra-guesses").first.locator("small").all_inner_texts()
    ]
    assert shares == sorted(shares, reverse=True)
    assert "without MLM" in explorer.locator(".irra-strip").nth(1).inner_text()


def starts_from_a_picture(explorer, people) -> None:
    """A click on a photo shows what was written of it; a click on that sentence searches with it."""
    card = explorer.locator(".irra-strip").first.locator(".irra-card").first
    image_id = int(card.get_attribute("data-image-id"))
    card.click()
    explorer.locator(".irra-caption").first.wait_for()
    written = list(people.caption[people.image_id == image_id])
    assert explorer.locator(".irra-caption").all_inner_texts() == written
    assert explorer.locator(".irra-picture .irra-card").count() == 10
    explorer.locator(".irra-caption").first.click()
    explorer.locator(".irra-truth").wait_for()
    assert explorer.locator("textarea").input_value() == written[0]
    explorer.locator(".irra-picture .irra-button").click()
    explorer.locator(".irra-picture").wait_for(state="hidden")


def bears_any_text(explorer) -> None:
    explorer.locator("textarea").fill(HOSTILE)
    explorer.locator(".irra-word", has_text="script").first.wait_for()
    assert explorer.locator("script, img[src='x']").count() == 0
    explorer.locator("textarea").fill("امرأة ترتدي معطفا أحمر")
    explorer.locator(".irra-word", has_text="script").first.wait_for(state="detached")
    assert explorer.locator(".irra-strip").first.locator(".irra-card").count() == 10
    assert explorer.locator("textarea").evaluate("box => getComputedStyle(box).direction") == "rtl"
    explorer.locator("textarea").fill("coat " * 500)
    explorer.locator(".irra-note", has_text="longer than the model can read").wait_for()
    explorer.locator("textarea").fill("")
    explorer.locator(".irra-note", has_text="Describe a person").wait_for()
    assert explorer.locator(".irra-card").count() == 0


def opens_a_photo_where_the_eye_is(page, explorer) -> None:
    """By keyboard alone: Enter opens a photo below its row, it follows the query, Escape closes it."""
    second = explorer.locator(".irra-strip").first.locator(".irra-card").nth(1)
    second.focus()
    page.keyboard.press("Enter")
    opened = explorer.locator(".irra-picture")
    opened.locator(".irra-caption").first.wait_for()
    assert "rank 2 for this description" in opened.locator(".irra-place").inner_text()
    assert opened.evaluate("(panel) => panel.parentElement.classList.contains('irra-grid')")
    box, card = opened.bounding_box(), second.bounding_box()
    assert 0 <= box["y"] - (card["y"] + card["height"]) < 60
    assert page.evaluate("document.activeElement.textContent") == "Close"
    written = explorer.locator("textarea").input_value()
    explorer.locator("textarea").fill("nobody at all")
    second.focus()  # before the new ranking comes
    explorer.locator(".irra-word", has_text="nobody").wait_for()
    assert page.evaluate("document.activeElement.className").startswith("irra-card")
    assert "for this description" in opened.locator(".irra-place").inner_text()
    explorer.locator("textarea").fill(written)
    explorer.locator(".irra-word", has_text="nobody").wait_for(state="detached")  # the ranking is drawn again
    explorer.locator(".irra-place", has_text="rank 2 for this description").wait_for()
    opened.locator("button", has_text="Close").focus()
    page.keyboard.press("Escape")
    opened.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.className").startswith("irra-card")


def is_for_everybody(page, explorer) -> None:
    """No fault that axe-core finds by WCAG's levels A and AA: a ranking, a word's maps, an open photo; two widths."""
    from axe_playwright_python.sync_playwright import Axe

    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}

    def faults(state: str) -> list[str]:
        found = []
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for fault in Axe().run(page, options=rules).response["violations"]:
                found.append(f"{state}, {width}, {scheme}: {fault['id']} in {fault['nodes'][0]['html'][:200]}")
        return found

    explorer.locator(".irra-word").nth(1).click()
    explorer.locator("canvas").first.wait_for()
    assert explorer.locator(".irra-word").nth(1).get_attribute("aria-pressed") == "true"
    found = faults("a word")
    columns = "(grid) => getComputedStyle(grid).gridTemplateColumns.split(' ').length"
    assert explorer.locator(".irra-grid").first.evaluate(columns) == 3  # at 390 pixels
    page.keyboard.press("Escape")
    explorer.locator("canvas").first.wait_for(state="detached")
    explorer.locator(".irra-card").nth(2).click()
    explorer.locator(".irra-picture .irra-card").first.wait_for()
    found += faults("a photo")
    page.keyboard.press("Escape")
    explorer.locator(".irra-picture").wait_for(state="hidden")
    assert [*found, *faults("a ranking")] == []
    page.set_viewport_size({"width": 1360, "height": 1300})


def downloads_its_figure(page, explorer, caption: str) -> None:
    with page.expect_download() as download:
        explorer.locator("button", has_text="Save").click()
    with Image.open(download.value.path()) as figure:
        assert figure.format == "PNG"
        assert figure.info["Description"] == caption
    assert download.value.suggested_filename.endswith(".png")


@contextlib.contextmanager
def explore(known, *words):
    """`irra explore` with its port and log; gives the address with the token."""
    port = free_port()
    command = ["irra_core.command", "explore", *map(str, words), "--port", str(port), "--no-browser"]
    with served(command, known["base"], port) as log:
        yield until(lambda: re.search(r"http://127.0.0.1:\d+/\?token=\w+", log.read_text()), "an address")[0], log


def test_irra_explore_serves_one_page_without_code_to_who_has_the_token(browser, known):
    compared = ("--compare", known["learnt"], known["before"])
    with explore(known, known["annotations"], *compared) as (address, log), watched(browser, known["base"]) as page:
        with urllib.request.urlopen(address.partition("?")[0], timeout=10) as reply:
            assert urlsplit(reply.url).path == "/login"  # without the token
        page.goto(address)
        explorer = page.locator(".irra")
        explorer.wait_for()
        assert page.title() == page.locator("h1").inner_text() == "Find a person by a description"
        (kernel,) = re.findall(r"Kernel started: (\S+)", log.read_text())
        assert page.locator("textarea").count() == 1
        finds_the_right_person_first(explorer, known["asked"])
        explains_itself(page, explorer)
        opens_a_photo_where_the_eye_is(page, explorer)
        is_for_everybody(page, explorer)
        downloads_its_figure(page, explorer, known["asked"].caption)
        bears_any_text(explorer)
        said = page.inner_text("body")
        assert "import" not in said
        assert str(known["base"]) not in said
        assert page.locator(".jp-CodeMirrorEditor, .jp-InputArea-editor:visible").count() == 0
        page.goto("about:blank")
        until(lambda: f"Kernel shutdown: {kernel}" in log.read_text(), "the end of the closed page's kernel")


def test_without_a_browser_the_test_is_skipped_with_the_command_that_installs_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="run `make browser`"):
        installed_browser()


def test_without_a_browser_continuous_integration_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="run `make browser`"):
        installed_browser()
