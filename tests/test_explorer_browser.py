"""explorer.html in a browser, driven by a script in the page around it: clicks, gestures, filters, the address.

The answers are compared with the tables that the page was made from.
"""

import numpy as np
import pytest
import small_explorer
from test_report_browser import look_at, pytestmark  # noqa: F401 - skips where there is no chromium

from common import config
from publish import explore

TOOLS = """
const frame = document.getElementById("page"), found = {};
let page, look;
const one = what => page.document.querySelector(what);
const all = what => [...page.document.querySelectorAll(what)];
const texts = what => all(what).map(each => each.textContent);
const wait = ms => new Promise(done => setTimeout(done, ms));
const until = async ready => { for (let i = 0; i < 100 && !ready(); i++) await wait(50); };
function open() { // its constants are in reach of its own scripts alone
  page = frame.contentWindow;
  const script = page.document.createElement("script");
  script.textContent = "window.look = { panels, state, data }";
  page.document.head.append(script);
  look = page.look;
}
function placed(panel, px, py) {
  const { left, top } = panel.canvas.getBoundingClientRect();
  return { clientX: left + px, clientY: top + py };
}
function point(panel, kind, px, py, more = {}) {
  const about = { ...placed(panel, px, py), pointerId: 1, pointerType: "mouse", bubbles: true };
  panel.canvas.dispatchEvent(new page.PointerEvent(`pointer${kind}`, { ...about, ...more }));
}
function click(panel, row, more = {}) {
  const [px, py] = panel.toScreen(panel.x[row], panel.y[row]);
  point(panel, "down", px, py, more);
  point(panel, "up", px, py, more);
}
function press(target, key) {
  target.dispatchEvent(new page.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
}
function choose(what, value) {
  one(what).value = value;
  one(what).dispatchEvent(new page.Event("change"));
}
function inkAt(panel, row) { // of its dot, as #rrggbb
  panel.isStale = true;
  panel.paint();
  const [px, py] = panel.toScreen(panel.x[row], panel.y[row]).map(at => Math.round(at * panel.ratio));
  const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  copy.drawImage(panel.layer, -px, -py);
  const pixel = copy.getImageData(0, 0, 1, 1).data;
  return pixel[3] && "#" + [...pixel].slice(0, 3).map(value => value.toString(16).padStart(2, "0")).join("");
}
function under(panel, row, reach) { // what a pointer at a building finds
  return panel.at(...panel.toScreen(panel.x[row], panel.y[row]), reach);
}
function chosen() {
  const { building, city, tab } = look.state;
  return [look.data.names[building] || "", look.data.cities[city].name, tab];
}
"""
SELECTING = """
async function selecting() {
  const { map, projection } = look.panels, { data } = look;
  const [row, far] = [ROW, FAR].map(name => data.names.indexOf(name));
  const frames = all(".frame").map(each => each.getBoundingClientRect());
  found.stacked = frames[1].top > frames[0].bottom;
  found.first = [...chosen(), map.canvas.dataset.scale];
  click(map, row);
  found.clicked = chosen();
  const inView = what => {
    const { top, bottom } = one(what).getBoundingClientRect();
    return top >= 0 && bottom <= page.innerHeight;
  };
  found.bar = [one("#chosen").textContent, Boolean(one("#chosen img").src), inView("#chosen"), inView(".facts")];
  one("#chosen button").click();
  found.details = inView(".facts");
  page.scrollTo(0, 0);
  const words = texts("#building dd");
  found.facts = Object.fromEntries(texts("#building dt").map((term, i) => [term, words[i]]));
  found.tiles = all("#building .tiles").map(each => each.children.length);
  await wait(200); // decoded meanwhile
  found.images = all("#building img").map(image => image.complete && image.naturalWidth);
  found.nearest = texts("#building .tiles:last-child .tile");
  data.images[row] = 5;
  page.showBuilding();
  found.partly = texts("#building dd")[0];
  data.images[row] = 3;
  click(projection, far);
  found.far = chosen();
  found.marks = [map.has(far), map.has(row), projection.has(row)];
  const [px, py] = map.toScreen(map.x[far], map.y[far]);
  point(map, "move", px + 3, py);
  found.tip = one("#map .tip").textContent;
  point(map, "leave", 0, 0);
  found.noTip = one("#map .tip").hidden;
  one("#building .tiles:last-child .picture").click();
  found.next = chosen()[0];
  one("#search").value = ROW.toUpperCase();
  one("#search").dispatchEvent(new page.Event("input"));
  found.search = texts("#found li");
  press(one("#search"), "Enter");
  found.searched = chosen();
  one("#search").value = "nowhere";
  one("#search").dispatchEvent(new page.Event("input"));
  found.noSuch = texts("#found li");
  one("#search").value = "";
  one("#search").dispatchEvent(new page.Event("focus"));
  found.any = one("#found").hidden ? [] : texts("#found li");
  one("#found").hidden = true;
}
"""
GESTURES = """
function gestures() {
  const { map } = look.panels, row = look.data.names.indexOf(ROW), before = chosen(), other = map.rows[0];
  map.fit();
  const [fitted, [x, y]] = [map.scale, map.toData(100, 80)];
  const wheel = { deltaY: -60, cancelable: true, ...placed(map, 100, 80) };
  map.canvas.dispatchEvent(new page.WheelEvent("wheel", wheel));
  found.wheel = map.scale / fitted;
  found.wheelStays = Math.hypot(map.toScreen(x, y)[0] - 100, map.toScreen(x, y)[1] - 80);
  const [px, py] = map.toScreen(map.x[other], map.y[other]);
  point(map, "down", px, py);
  point(map, "move", px + 20, py + 10);
  point(map, "move", px + 30, py + 40);
  point(map, "up", px + 30, py + 40);
  found.drag = map.toScreen(map.x[other], map.y[other]).map((at, i) => Math.round(at - [px, py][i]));
  found.dragSelects = chosen()[0] !== before[0];
  press(map.canvas, "0");
  found.fits = map.scale / fitted;
  const touch = pointerId => ({ pointerId, pointerType: "touch" });
  point(map, "down", 100, 100, touch(1)); point(map, "down", 200, 100, touch(2));
  point(map, "move", 50, 100, touch(1)); point(map, "move", 250, 100, touch(2));
  point(map, "up", 50, 100, touch(1)); point(map, "up", 250, 100, touch(2));
  found.pinch = map.scale / fitted;
  found.pinchSelects = chosen()[0] !== before[0];
  press(map.canvas, "0");
  press(map.canvas, "ArrowLeft");
  found.arrow = map.toScreen(...[map.centreX, map.centreY])[0] - map.width / 2 === 0 && map.isMoved;
  all("#map .zoom button")[2].click();
  found.all = map.isMoved;
  const [tx, ty] = map.toScreen(map.x[row], map.y[row]);
  found.reach = [[0, 18], [18, 0]].map(([dx, dy]) => map.at(tx + dx, ty + dy, 24) >= 0);
  found.nothing = map.at(-500, -500, 24);
}
"""
COLOURS = """
function colours() {
  const { projection } = look.panels, { data } = look;
  found.legends = {};
  for (const { name, codes, classes } of data.colourings) {
    choose("#colouring", name);
    found.legends[name] = texts("#legend button");
    const dots = all("#legend i").map(dot => dot.style.background);
    const alone = projection.rows.find(row => under(projection, row, 15) === row);
    found.legends[name].push(inkAt(projection, alone), dots.length === new Set(dots).size);
  }
  choose("#colouring", "split");
  const test = data.names.indexOf(FAR);
  found.inkOfTest = inkAt(projection, test);
  all("#legend button")[2].click();
  found.hidden = all("#legend button")[2].getAttribute("aria-pressed");
  found.hiddenAt = under(projection, test, 0.5);
  all("#legend button")[3].click();
  found.shownAgain = all("#legend button").map(each => each.getAttribute("aria-pressed"));
  all("#legend button")[3].click();
  found.allHidden = inkAt(projection, test);
  all("#legend button")[2].click();
}
"""
FAILURES = """
async function failures() {
  one("#tab-failures").click();
  found.tabs = ["#view-buildings", "#view-failures"].map(view => one(view).hidden);
  found.options = {};
  for (const { id, options } of all("#filters select")) found.options[id] = [...options].map(each => each.text);
  found.shown = all(".failure").length;
  one("#more-failures").click();
  found.more = all(".failure").length;
  choose("#filter-compare", "gained");
  choose("#filter-angle", "3");
  found.filtered = one("#failure-count").textContent;
  found.compareFiltered = [...one("#filter-compare").options].map(each => each.text);
  found.angles = texts(".failure > p");
  found.titles = texts(".failure:first-child b");
  one(".failure .picture").click();
  const dialog = one("#enlarged"), shows = number =>
    dialog.querySelector("img").src === all(".failure .picture img")[number].src;
  found.enlarged = [dialog.open, dialog.querySelector("img").alt, shows(0)];
  press(dialog, "ArrowRight");
  found.arrowRight = shows(1);
  press(dialog, "ArrowLeft");
  press(dialog, "ArrowLeft"); // there is none before the first
  found.arrowLeft = shows(0);
  dialog.querySelector(".close").click();
  found.closed = !dialog.open;
  await until(() => page.location.hash.includes("tab=failures"));
  found.address = page.location.hash;
  one(".failure .link").click();
  found.linked = [...chosen(), one("#view-buildings").hidden];
  await until(() => !page.location.hash.includes("tab=failures"));
  look.panels.projection.zoom(2);
  page.location.hash = found.address.replace(/&projection=[^&]*/, "");
  await until(() => look.state.tab === "failures");
  found.projectionMoved = look.panels.projection.isMoved;
  found.restored = [look.state.tab, look.state.colouring.name, [...look.state.hidden], look.state.building >= 0,
    one("#filter-compare").value, one("#failure-count").textContent];
  choose("#filter-angle", ""); choose("#filter-compare", "");
}
"""
END = """
onload = async () => {
  try {
    open();
    for (const step of STEPS) await step();
    const root = page.document.documentElement;
    found.wider_by = root.scrollWidth - root.clientWidth;
    const isNamed = each => each.textContent.trim() || each.getAttribute("aria-label") || each.labels?.length
      || each.querySelector("img")?.alt;
    const unnamed = all("button, select, input, canvas").filter(each => !isNamed(each));
    found.unnamed = unnamed.map(each => each.outerHTML);
    found.back = page.getComputedStyle(page.document.body).backgroundColor;
  } catch (error) { found.error = `${error} ${error.stack}`; }
  document.title = JSON.stringify(found);
}
"""


def drive(folder, path, width: int, steps: str, words: str = "", scheme: str = "light") -> dict:
    """What the steps find on the page, which asks for nothing and says nothing."""
    script = "\n".join((TOOLS, SELECTING, GESTURES, COLOURS, FAILURES, words, END.replace("STEPS", f"[{steps}]")))
    found, console, asked = look_at(folder, path, width, scheme, script)
    assert "error" not in found, found["error"]
    assert console == asked == []
    assert found["wider_by"] == 0
    assert found["unnamed"] == []
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page, and the tables that it was made from."""
    cfg = config.load(None, [f"paths.root={tmp_path_factory.mktemp('explorer')}"])
    buildings, queries = small_explorer.write(cfg)
    assert explore.main(["--set", f"paths.root={cfg.paths.root}"]) == 0
    return cfg.paths.evaluation_dir / "explorer.html", buildings, queries


@pytest.fixture(scope="module")
def wide(made, tmp_path_factory):
    return drive(
        tmp_path_factory.mktemp("wide"), made[0], 1280, "selecting, gestures, colours, failures", words(made)
    )


def words(made) -> str:
    """The names of a building of city 0088 and one of 0089, for the script."""
    names = made[1]["building"]
    return f'const ROW = "{names[0]}", FAR = "{names[-1]}";'


def test_a_click_shows_a_building_and_what_is_like_it(made, wide):
    _, buildings, _ = made
    names, vectors = buildings["building"], buildings["embedding"]
    assert not wide["stacked"]
    assert wide["first"] == ["", "0088", "buildings", wide["first"][3]]
    assert wide["first"][3].endswith("km")
    assert wide["clicked"] == [names[0], "0088", "buildings"]
    assert wide["bar"][:3] == [f"Building {names[0]} details", True, True]
    assert wide["details"]
    assert (wide["facts"]["Images"], wide["facts"]["City"], wide["facts"]["Split"]) == ("3", "0088", "train")
    lat, lon = map(float, wide["facts"]["Position"].split(","))
    assert (lat, lon) == pytest.approx((buildings["lat"][0], buildings["lon"][0]), abs=1e-5)
    assert wide["tiles"] == [3, 8]
    assert wide["images"] == [240] * 11
    assert wide["partly"] == "3 of 5 shown"
    cosines = vectors @ vectors[0]
    best = [row for row in np.argsort(-cosines) if row][:8]
    for row, text in zip(best, wide["nearest"], strict=True):
        assert text.startswith(f"{names[row]}cosine {cosines[row]:.3f}")
        assert text.endswith("another city") == (buildings["dataset_id"][row] == 89)
        assert text.endswith((" m", " km", "another city"))


def test_both_panels_and_the_search_select_too(made, wide):
    names = made[1]["building"]
    assert wide["far"] == [names[-1], "0089", "buildings"]  # the map goes to the other city
    assert wide["marks"] == [True, False, True]
    assert wide["tip"].startswith(f"{names[-1]} · ")
    assert wide["noTip"]
    assert wide["next"] not in (names[-1], "")
    assert wide["search"][0] == names[0]
    assert wide["searched"] == [names[0], "0088", "buildings"]
    assert wide["any"] == names[:10]
    assert wide["noSuch"] == ["no such building here"]


def test_the_map_is_moved_and_zoomed_by_mouse_fingers_and_keys(wide):
    assert wide["wheel"] > 1.2
    assert wide["wheelStays"] < 0.2  # pixels that the place under the pointer moves
    assert wide["drag"] == [30, 40]
    assert not wide["dragSelects"]
    assert wide["fits"] == pytest.approx(1)
    assert wide["pinch"] == pytest.approx(2)
    assert not wide["pinchSelects"]
    assert wide["arrow"]
    assert not wide["all"]
    assert wide["reach"] == [True, True]
    assert wide["nothing"] == -1


def test_colours_have_a_legend_whose_entries_hide_buildings(made, wide):
    _, buildings, _ = made
    names, splits = buildings["building"], buildings["split"]
    legends = wide["legends"]
    assert legends.keys() == {"city", "split", "cluster", "right", "spread"}
    expected = [f"{split} ({splits.count(split)})" for split in ("train", "val", "test")]
    assert legends["split"][:4] == [*expected, "hide all"]
    assert legends["city"][:2] == ["0088 (80)", "0089 (40)"]
    assert all(ink.startswith("#") and differ for *_, ink, differ in legends.values())
    assert wide["inkOfTest"] == "#009e73"
    assert wide["hidden"] == "false"
    assert wide["hiddenAt"] != len(names) - 1
    assert wide["shownAgain"] == ["true", "true", "true", None]
    assert wide["allHidden"] == 0  # nothing is drawn


def test_failures_are_filtered_counted_enlarged_and_linked(made, wide):
    _, _, queries = made
    raw, trained = (np.array(queries[f"rank_{method}"]) > 1 for method in ("raw", "trained"))
    assert wide["tabs"] == [True, False]
    counts = {"either wrong": raw | trained, "trained head wrong": trained, "both wrong": raw & trained}
    counts |= {"raw wrong, trained right": raw & ~trained, "raw right, trained wrong": ~raw & trained}
    assert wide["options"]["filter-compare"] == [f"{text} ({rows.sum()})" for text, rows in counts.items()]
    assert wide["options"]["filter-city"] == [f"{text} ({(raw | trained).sum()})" for text in ("all", "0089")]
    assert (wide["shown"], wide["more"]) == (20, 40)
    ids = {name: row for row, name in enumerate(queries["streetview_image_id"])}
    matched = [queries["heading"][ids[name]] for name in queries["match_trained"]]
    angle = np.abs((np.array(queries["heading"]) - matched + 180) % 360 - 180)
    of_angle = [f"{text} ({(rows & (angle >= 90)).sum()})" for text, rows in counts.items()]
    assert wide["compareFiltered"] == of_angle  # a filter's own choice does not lower the counts of its others
    expected = (raw & ~trained & (angle >= 90)).sum()
    assert expected > 3
    assert wide["filtered"] == f"{expected} of {(raw | trained).sum()} queries"
    assert len(wide["angles"]) == min(expected, 20)
    assert all("angle to best match 90° or more" in line for line in wide["angles"])
    assert wide["titles"] == ["Query", "raw backbone: wrong", "trained head: right"]
    assert wide["enlarged"][0] is wide["enlarged"][2] is True
    assert wide["enlarged"][1].startswith("image 0088_")
    assert [wide[step] for step in ("arrowRight", "arrowLeft", "closed")] == [True] * 3
    assert wide["linked"][1:] == ["0089", "buildings", False]


def test_the_address_brings_a_view_back(wide):
    assert "tab=failures" in wide["address"]
    assert not wide["projectionMoved"]  # the address had no view of it: all is shown
    assert wide["restored"] == ["failures", "split", [0, 1], True, "gained", wide["filtered"]]


def test_it_works_on_a_phone_and_in_the_dark(made, tmp_path):
    found = drive(tmp_path, made[0], 390, "selecting, gestures, failures", words(made), "dark")
    assert found["back"] == "rgb(20, 23, 26)"
    assert found["stacked"]
    assert found["clicked"] == [made[1]["building"][0], "0088", "buildings"]
    assert found["bar"] == [f"Building {made[1]['building'][0]} details", True, True, False]
    assert found["details"]
    assert found["pinch"] == pytest.approx(2)
    assert found["enlarged"][0]


def test_a_page_of_little_is_shown(made, tmp_path):
    """No positions, no tars, and queries by the raw backbone alone."""
    _, buildings, queries = made
    nothing = np.full(len(buildings["building"]), np.nan)
    table = buildings | {"lat": nothing, "lon": nothing}
    small_explorer.write_buildings(tmp_path / "t.parquet", table, without=("dataset_id",))
    raw = {name: values for name, values in queries.items() if not name.endswith("_trained")}
    small_explorer.write_queries(config.load(None, [f"paths.root={tmp_path}"]), raw)
    out = tmp_path / "page.html"
    assert explore.main([str(tmp_path / "t.parquet"), str(out), "--set", f"paths.root={tmp_path}"]) == 0
    steps = """() => {
      click(look.panels.projection, 0);
      found.little = [chosen()[0], texts("#building .picture").length, texts("#building .tile").length,
        texts("#building dt"), texts("#building .tile div")];
      found.panels = texts(".panel h2");
      one("#tab-failures").click();
      found.compare = texts("#filter-compare option");
      found.titles = texts(".failure:first-child b");
    }"""
    found = drive(tmp_path / "b", out, 1280, steps)
    name, pictures, tiles, facts, lines = found["little"]
    assert (name, pictures, tiles) == (buildings["building"][0], 8, 8)
    assert facts == ["Images", "Spread of its images", "Split", "Queries right or wrong"]
    assert found["compare"] == [f"raw backbone wrong ({(np.array(queries['rank_raw']) > 1).sum()})"]
    assert found["titles"] == ["Query", "raw backbone: wrong", "Best match"]
    assert lines[1] == "position not known"
    assert [title.strip() for title in found["panels"]] == ["Projection"]
