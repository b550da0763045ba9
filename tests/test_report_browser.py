"""report.html in a browser: Debian's chromium, headless. Skipped where there is none (but not in CI).

The page stands in a frame as wide as a screen or a phone; the page around it measures, and has the answer as its
title. What the page asks the network for stands in the browser's own log (no name resolves, so nothing gets out).
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
import small_merge

from common import config, files, provenance
from train import evaluate
from train.fitting import history

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="needs Debian's chromium (.ci/system-packages)"
)
MEASURE = """
const enlarged = (box, page) => {  // what a click on a picture, and another there, make of it
  if (!box) return null;
  const width = () => Math.round(box.nextElementSibling.getBoundingClientRect().width), before = width();
  box.scrollIntoView();
  const {left, top} = box.getBoundingClientRect();
  page.document.elementFromPoint(left + 20, top + 20).click();
  const open = width(), over = page.document.elementFromPoint(3, 3) === box;
  page.document.elementFromPoint(page.innerWidth / 2, page.innerHeight / 2).click();
  return {before, open, over, after: width()};
};
onload = () => {
  const page = document.getElementById("page").contentWindow, root = page.document.documentElement;
  const all = what => [...root.querySelectorAll(what)];
  page.document.querySelectorAll("details").forEach(one => { one.open = true });
  document.title = JSON.stringify({
    wider_by: root.scrollWidth - root.clientWidth,
    headings: all("h2").map(one => one.textContent),
    tables: all("table").map(one => [one.rows.length, one.querySelectorAll("th[scope=col]").length]),
    figures: all("figure > svg").map(one => [one.getAttribute("aria-label"), one.getBoundingClientRect().width]),
    pictures: all("img").map(one => [one.alt, one.complete ? one.naturalWidth : 0]),
    hints: all(".hint").map(one => one.getBoundingClientRect().height > 0),
    enlarged: enlarged(all(".tile input")[7], page),
    back: page.getComputedStyle(page.document.body).backgroundColor,
    ink: page.getComputedStyle(root.querySelector("figure text")).fill,
  });
}"""


def look_at(
    folder, page, width: int, scheme: str = "light", script: str = MEASURE
) -> tuple[dict, list[str], list[str]]:
    """What `script` finds on a page in a frame of this width, the lines of the browser's console, and what the
    page asked the network for."""
    folder.mkdir(exist_ok=True)
    frame, log = folder / "frame.html", folder / "net.json"
    frame.write_text(
        f'<iframe id="page" src="{page.as_uri()}" style="width:{width}px;height:900px"></iframe>'
        f"<script>{script}</script>"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [
        "--disable-background-networking",
        "--no-first-run",
        "--virtual-time-budget=20000",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={log}", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # what the browser asks for of its own accord, such as updates, has the initiator "not an origin"
    request = re.compile('"initiator":"(?!not an origin)[^"]*".*?"url":"(http[^"]*)"')
    return json.loads(html.unescape(title[1])), console, sorted(set(request.findall(log.read_text())))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a small run with a history."""
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('browser')}"])
    small_merge.write_merge(cfg)
    checkpoint = small_merge.write_checkpoint(cfg, seed=1)
    rows = [
        {"epoch": epoch, "loss": 0.2, "val_map_at_r": 0.3, "val_recall_at_1": 0.4, "share_band_0": 0.7}
        | {"share_random": 0.3, "reward_band_0": 0.5, "reward_random": 0.1}
        for epoch in range(4)
    ]
    table = history.frame(rows, [{"seconds": 1.0, "triplets_per_second": 1.0}] * 4)
    history.write(
        checkpoint.parent / "history.parquet", table, provenance.record("train", {}, {}), {"finished": True}
    )
    split_report = {"rows_in": 600, "dropped": {"duplicates": 60}, "provenance": {"inputs": {"0088-0": "e0"}}}
    report = files.beside(cfg.paths.merged_dir, "report") / "split_report.json"
    files.write_text(report, json.dumps(split_report))
    evaluate.main(["--set", f"paths.root={cfg.paths.root}", "--set", "evaluation.bootstrap_samples=20"])
    return cfg.paths.evaluation_dir / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_and_fits(report, tmp_path, width):
    found, console, asked = look_at(tmp_path, report, width)
    assert console == asked == []
    assert found["wider_by"] == 0
    titles = [
        "Results",
        "Does it find the building?",
        "Where it is hard",
        "Examples",
        "Training",
        "Leakage check",
        "Settings",
    ]
    assert found["headings"] == titles
    assert len(found["figures"]) == 9  # recall, cosines, five breakdowns, training, bands
    assert all(name and shown > 250 for name, shown in found["figures"])
    assert len({name for name, _ in found["figures"]}) == 9
    assert len(found["pictures"]) > 50
    assert all(alt.startswith("image 0088_") for alt, _ in found["pictures"])
    assert all(pixels for _, pixels in found["pictures"][:6])  # those further down are loaded when they are seen
    enlarged = found["enlarged"]
    assert enlarged["open"] >= width - 20  # the whole screen, but for a scroll bar
    assert enlarged["over"]
    assert 90 < enlarged["before"] == enlarged["after"] < 175
    methods, differences, *of_buildings, a, b, c, d, e, leakage = [t for t in found["tables"] if t[1]]
    classes = [a, b, c, d, e]
    assert (methods, differences, leakage) == ([5, 6], [4, 6], [3, 5])
    assert of_buildings == [[5, 4], [4, 4]] * 2
    assert all(is_seen == (width == 390) for is_seen in found["hints"])
    assert [columns for _, columns in classes] == [11] * 5
    assert all(rows > 1 for rows, _ in found["tables"])


def test_it_is_dark_where_that_is_preferred_and_light_otherwise(report, tmp_path):
    looks = {scheme: look_at(tmp_path / scheme, report, 1280, scheme)[0] for scheme in ("light", "dark")}
    assert looks["light"]["back"] == "rgb(255, 255, 255)"
    assert looks["light"]["ink"] == "rgb(27, 31, 36)"
    assert looks["dark"]["back"] == "rgb(20, 23, 26)"
    assert looks["dark"]["ink"] == "rgb(227, 231, 235)"  # figures too


def test_a_page_that_asks_for_something_errs_and_is_too_wide_would_be_found(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://example.com/missing.png"><link rel="stylesheet" href="https://example.com/fonts.css">'
        '<div style="width:2000px">wide</div><figure><svg><text>x</text></svg></figure>'
        "<script>noSuchFunction()</script>"
    )
    found, console, asked = look_at(tmp_path / "profile", page, 390)
    assert asked == ["http://example.com/missing.png", "https://example.com/fonts.css"]
    assert found["wider_by"] > 1000
    assert any("noSuchFunction" in line for line in console)
