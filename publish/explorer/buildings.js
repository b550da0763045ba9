// The chosen building with its pictures and its nearest ones, the search, the colours and their legend.

function nearestTo(row) {
  return Array.from(data.nearest.subarray(row * NUM_NEAREST, (row + 1) * NUM_NEAREST));
}

function select(row) {
  state.building = row;
  if (row >= 0 && panels.map && located(row) && state.city !== data.city[row]) showCity(data.city[row]);
  for (const panel of Object.values(panels)) {
    if (panel.has(row)) panel.reveal(row);
    panel.changed(false);
  }
  showBuilding();
  keepAddress();
}

function showBuilding() {
  const row = state.building, place = byId("building");
  showChosen(row);
  if (row < 0) {
    place.replaceChildren(element("p", { className: "dim", textContent: "No building is selected." }));
    return;
  }
  const images = data.images_of[row].map(number => ({ number, name: data.image_names[number] }));
  const nearest = nearestTo(row).map((other, k) => nearestTile(row, other, data.cosines[row * NUM_NEAREST + k]));
  place.replaceChildren(
    factsOf(row),
    tiles(images.map(({ number, name }) => pictureTile(name, number, name))),
    element("h3", { textContent: "Most similar buildings" }),
    tiles(nearest),
  );
}

function showChosen(row) { // in view even where the details are not
  byId("chosen").hidden = row < 0;
  if (row < 0) return;
  const src = picture(data.images_of[row][0]);
  const button = element("button", {}, src && element("img", { src, alt: "" }), `Building ${data.names[row]}`);
  button.append(element("span", { className: "dim", textContent: " details" }));
  button.onclick = () => byId("building").scrollIntoView();
  byId("chosen").replaceChildren(button);
}

function factsOf(row) {
  const all = count(data.images[row]), shown = data.images_of[row].length;
  const images = shown && shown < data.images[row] ? `${shown} of ${all} shown` : all;
  const facts = [["Images", images], ["Spread of its images", data.spread[row].toFixed(3)]];
  if (data.cities.length > 1) facts.push(["City", data.cities[data.city[row]].name]);
  for (const { name, title, classes, codes } of data.colourings) {
    if (["split", "right"].includes(name)) facts.push([title, classes[codes[row]].label]);
  }
  if (data.cluster[row] >= 0) {
    const similarity = data.cluster_similarity[row].toFixed(2);
    facts.push(["Cluster", `${data.cluster[row]} (cosine to its centre ${similarity})`]);
  }
  if (located(row)) facts.push(["Position", positionOf(row)]);
  const terms = facts.map(([term, value]) => element("div", {},
    element("dt", { textContent: term }), element("dd", { textContent: value })));
  return element("dl", { className: "facts" }, ...terms);
}

function positionOf(row) { // latitude, longitude in degrees
  const metresPerDegree = 111194.93, city = data.cities[data.city[row]];
  const lat = city.lat + data.north[row] / metresPerDegree;
  const lon = city.lon + data.east[row] / (metresPerDegree * Math.cos(city.lat * Math.PI / 180));
  return `${lat.toFixed(5)}, ${lon.toFixed(5)}`;
}

function tiles(all) {
  return element("div", { className: "tiles" }, ...all);
}

function pictureTile(name, number, caption, kind = "", ...lines) { // a picture that is enlarged on click
  const button = element("button", { className: "picture" });
  const src = picture(number);
  if (!src) {
    Object.assign(button, { disabled: true, textContent: "no picture" });
  } else {
    button.append(element("img", { src, alt: `image ${name}` }));
    button.onclick = () => enlarge(button);
  }
  const words = [caption === name ? "" : caption, ...lines, `image ${name}`];
  button.dataset.caption = words.filter(word => word && typeof word === "string").join(" · ");
  const title = element("b", { textContent: caption });
  return element("div", { className: `tile ${kind}` }, button, title, ...lines.map(asLine));
}

function asLine(line) {
  return typeof line === "string" ? element("div", { textContent: line }) : line;
}

function buildingLink(row, text) {
  const link = element("button", { className: "link", textContent: text });
  link.onclick = () => { showTab("buildings"); select(row); };
  return link;
}

function nearestTile(row, other, cosine) {
  const src = picture(data.images_of[other][0]), name = data.names[other];
  const button = element("button", { className: "picture" });
  button.setAttribute("aria-label", `select building ${name}`);
  button.append(src ? element("img", { src, alt: "" }) : "no picture");
  button.onclick = () => select(other);
  const lines = [`cosine ${cosine.toFixed(3)}`, howFar(row, other)].map(asLine);
  return element("div", { className: "tile" }, button, element("b", { textContent: name }), ...lines);
}

// ---------------------------------------------------------------- the search

const MOST_FOUND = 10;

function bindSearch() {
  const field = byId("search");
  field.oninput = field.onfocus = () => showFound(field.value.trim().toLowerCase());
  field.onkeydown = event => {
    if (event.key === "Enter") byId("found").querySelector("button")?.click();
    if (event.key === "Escape") byId("found").hidden = true;
    if (event.key === "ArrowDown") byId("found").querySelector("button")?.focus();
  };
  document.addEventListener("pointerdown", event => {
    if (!event.target.closest(".search")) byId("found").hidden = true;
  });
}

function showFound(text) {
  const found = [];
  for (let row = 0; row < data.names.length && found.length < MOST_FOUND; row++) {
    if (data.names[row].toLowerCase().includes(text)) found.push(row);
  }
  const entries = found.map(row => {
    const button = element("button", { textContent: data.names[row] });
    button.onclick = () => { byId("found").hidden = true; byId("search").value = data.names[row]; select(row); };
    return element("li", {}, button);
  });
  if (!found.length) entries.push(element("li", { textContent: "no such building here" }));
  byId("found").replaceChildren(...entries);
  byId("found").hidden = false;
}

// ---------------------------------------------------------------- colours, and cities on the map

function bindColours() {
  const choice = byId("colouring");
  setOptions(choice, data.colourings.map(({ name, title }) => [name, title]), state.colouring.name);
  choice.onchange = () => {
    state.colouring = data.colourings.find(one => one.name === choice.value);
    state.hidden = new Set();
    showLegend();
  };
}

function showLegend() {
  const { classes, counts } = state.colouring;
  const entries = classes.map(({ label, colour }, code) => {
    if (!counts[code]) return "";
    const dot = element("i");
    dot.style.background = colourOf(colour);
    const button = element("button", {}, dot, `${label} (${count(counts[code])})`);
    button.setAttribute("aria-pressed", !state.hidden.has(code));
    button.onclick = () => {
      state.hidden.delete(code) || state.hidden.add(code);
      showLegend();
      byId("legend").querySelectorAll("button")[entries.filter(Boolean).indexOf(button.parentElement)].focus();
    };
    return element("li", {}, button);
  });
  const all = element("button", { textContent: state.hidden.size ? "show all" : "hide all" });
  all.onclick = () => {
    state.hidden = new Set(state.hidden.size ? [] : classes.keys());
    showLegend();
  };
  byId("legend").replaceChildren(...entries, element("li", {}, all));
  for (const panel of Object.values(panels)) panel.changed();
  keepAddress();
}

function bindCities() {
  const choice = byId("city");
  if (!choice) return;
  const shown = data.cities.map((city, code) => [code, city]).filter(([, city]) => city.located);
  const options = shown.map(([code, { name, located }]) => [code, `${/^\d+$/.test(name) ? "city " : ""}${name} (${count(located)})`]);
  setOptions(choice, options, state.city);
  choice.hidden = shown.length < 2;
  choice.onchange = () => showCity(Number(choice.value));
}

function showCity(city) {
  state.city = city;
  byId("city").value = city;
  panels.map.show(allRows.filter(row => data.city[row] === city), boxOf(city));
}

function boxOf(city) { // of its cells
  const cells = [];
  data.cell_city.forEach((other, i) => { if (other === city) cells.push(data.cells.subarray(4 * i, 4 * i + 4)); });
  const [west, south] = [0, 1].map(side => Math.min(...cells.map(cell => cell[side])));
  const [east, north] = [2, 3].map(side => Math.max(...cells.map(cell => cell[side])));
  return cells.length ? { west, south, east, north } : {};
}

function paintMap(panel) { // cells, and the scale
  const { pen } = panel;
  Object.assign(pen, { strokeStyle: colourOf("line"), lineWidth: 1 });
  for (let i = 0; i < data.cell_city.length; i++) {
    if (data.cell_city[i] !== state.city) continue;
    const [west, south, east, north] = data.cells.subarray(4 * i, 4 * i + 4);
    const [left, bottom] = panel.toScreen(west, south), [right, top] = panel.toScreen(east, north);
    pen.strokeRect(left, top, right - left, bottom - top);
  }
  paintScale(panel);
}

function paintScale(panel) {
  const { pen, height } = panel, widest = 130 / panel.scale;
  const power = 10 ** Math.floor(Math.log10(widest));
  const length = [5, 2, 1].map(times => times * power).find(one => one <= widest);
  const text = length < 1 ? `${length.toPrecision(1)} m` : metres(length).replace(".0", "");
  const ink = colourOf("text"), [left, right, top, bottom] = [12, 12 + length * panel.scale, height - 18, height - 12];
  Object.assign(pen, { fillStyle: ink, strokeStyle: ink, lineWidth: 2, font: "13px system-ui, sans-serif" });
  pen.beginPath();
  for (const [x, y] of [[left, top], [left, bottom], [right, bottom], [right, top]]) pen.lineTo(x, y);
  pen.stroke();
  pen.fillText(text, 16, height - 18);
  panel.canvas.dataset.scale = text;
}
