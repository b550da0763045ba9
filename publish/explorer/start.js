// Gestures on the panels, and what happens when the page opens.

const NEAR_PX = { mouse: 12, pen: 16, touch: 24 }; // how far from a dot a pointer may be
const STILL_PX = 5; // a press that moves less is a click
const KEYS = {
  ArrowLeft: panel => panel.move(50, 0), ArrowRight: panel => panel.move(-50, 0),
  ArrowUp: panel => panel.move(0, 50), ArrowDown: panel => panel.move(0, -50),
  "+": panel => panel.zoom(1.5), "-": panel => panel.zoom(1 / 1.5), 0: panel => panel.fit(),
};

function bindPanel(panel) {
  const { canvas } = panel, pressed = new Map(); // pointers, and where they are
  let isDrag = false;
  const placeOf = event => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.onpointerdown = event => {
    if (event.isTrusted) canvas.setPointerCapture(event.pointerId); // a scripted event has no pointer
    isDrag = pressed.size > 0;
    pressed.set(event.pointerId, placeOf(event));
    panel.hover(-1);
  };
  canvas.onpointermove = event => {
    const place = placeOf(event), before = pressed.get(event.pointerId);
    if (!before) return panel.hover(panel.at(...place, NEAR_PX[event.pointerType] || NEAR_PX.mouse));
    const from = [...pressed.values()];
    isDrag = isDrag || Math.hypot(place[0] - before[0], place[1] - before[1]) > STILL_PX;
    if (!isDrag) return;
    pressed.set(event.pointerId, place);
    follow(panel, from, [...pressed.values()]);
  };
  canvas.onpointerup = event => {
    if (!pressed.delete(event.pointerId) || isDrag) return;
    const row = panel.at(...placeOf(event), NEAR_PX[event.pointerType] || NEAR_PX.mouse);
    if (row >= 0) select(row);
  };
  canvas.onpointercancel = event => pressed.delete(event.pointerId);
  canvas.onpointerleave = () => panel.hover(-1);
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    panel.zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 200), ...placeOf(event));
  }, { passive: false });
  canvas.onkeydown = event => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    KEYS[event.key](panel);
  };
}

function follow(panel, from, to) { // one finger moves, two move and zoom
  const middle = places => [0, 1].map(i => places.reduce((sum, place) => sum + place[i], 0) / places.length);
  const [before, now] = [middle(from), middle(to)];
  panel.move(now[0] - before[0], now[1] - before[1]);
  if (to.length < 2) return;
  const apart = places => Math.hypot(places[0][0] - places[1][0], places[0][1] - places[1][1]);
  panel.zoom(apart(to) / Math.max(1, apart(from)), ...now);
}

function resizePanels() {
  for (const panel of Object.values(panels)) {
    panel.resize();
    panel.changed();
  }
}

function applyAddress() {
  const words = readAddress();
  byId("colouring").value = state.colouring.name;
  showLegend();
  if (panels.map) showCity(state.city);
  if (state.building >= 0) select(state.building);
  else showBuilding();
  for (const panel of Object.values(panels)) panel.setView(words.get(panel.name));
  showTab(state.tab);
}

const allRows = Int32Array.from(data.names, (_, row) => row);

function start() {
  if (byId("map")) panels.map = new Panel("map", data.east, data.north, paintMap);
  if (byId("projection")) panels.projection = new Panel("projection", data.x, data.y, () => {});
  panels.projection?.show(allRows);
  Object.values(panels).forEach(bindPanel);
  bindSearch();
  bindColours();
  bindCities();
  bindFailures();
  bindEnlarged();
  const observer = new ResizeObserver(resizePanels);
  for (const panel of Object.values(panels)) observer.observe(panel.canvas.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showLegend);
  addEventListener("hashchange", applyAddress);
  applyAddress();
  addEventListener("DOMContentLoaded", () => { // the pictures are there
    showBuilding();
    showTab(state.tab);
  });
}

start();
