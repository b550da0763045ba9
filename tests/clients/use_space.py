"""The Space as the hub would run it, asked through its API, and used in a browser (Debian's chromium)."""

import os
import subprocess
import sys
import time

import gradio
import numpy as np
from gradio_client import Client, handle_file
from playwright.sync_api import sync_playwright

PORT = 7861
URL = f"http://127.0.0.1:{PORT}"
MAP = "svg[aria-label='Map of the nearest rows']"
vectors, expected = np.load("space/vectors.npy").astype(np.float32), np.load("expected.npy")


def started() -> Client:
    """A client of the app, once it answers."""
    for _ in range(60):
        try:
            return Client(URL, verbose=False)
        except Exception:  # whatever the client's HTTP library raises while the app loads
            time.sleep(2)
    raise SystemExit("the app does not answer")


environment = {**os.environ, "GRADIO_SERVER_PORT": str(PORT)}
app = subprocess.Popen([sys.executable, "space/app.py"], env=environment, stdout=subprocess.DEVNULL)
try:
    table, svg = started().predict(handle_file("a.jpg"), api_name="/search")
    found = np.array([float(row[1]) for row in table["data"]])
    difference = np.abs(found - np.sort(vectors @ expected[0])[::-1]).max()
    assert difference < 6e-5, difference  # printed with four digits
    assert svg.count("<text") >= 2, svg
    print(f"gradio {gradio.__version__}: cosines as printed, largest difference {difference:.1e}")
    asked = []
    with sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", rules])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(URL)
        page.wait_for_selector("input[type=file]", state="attached")
        page.set_input_files("input[type=file]", "a.jpg")
        page.wait_for_selector(MAP)
        page.get_by_text(f"{found[1]:.4f}").filter(visible=True).first.wait_for()
        page.screenshot(path="space.png", full_page=True)
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((URL, "data:", "blob:"))]
    assert asked, "nothing was asked"
    assert not elsewhere, elsewhere
    print(f"in the browser: a map, a table, {len(asked)} requests, all to this machine (space.png)")
finally:
    app.terminate()
