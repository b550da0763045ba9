// Queries whose first result is wrong: filters, their pictures, and the view that enlarges pictures.

const WORDS = { raw: "raw backbone", trained: "trained head" };
const SHOWN_AT_ONCE = 20;
let numShown = SHOWN_AT_ONCE;

function comparisons() { // the choices of the first filter: value, text, which queries
  const [raw, trained] = data.failures.methods;
  const isWrong = (query, method) => query[`rank_${method}`] > 1;
  if (!trained) return [["", `${WORDS[raw]} wrong`, query => isWrong(query, raw)]];
  return [
    ["", "either wrong", () => true],
    ["trained", `${WORDS.trained} wrong`, query => isWrong(query, "trained")],
    ["both", "both wrong", query => isWrong(query, "raw") && isWrong(query, "trained")],
    ["gained", `raw wrong, trained right`, query => isWrong(query, "raw") && !isWrong(query, "trained")],
    ["lost", `raw right, trained wrong`, query => !isWrong(query, "raw") && isWrong(query, "trained")],
  ];
}

function filterChoices() { // name -> [title, [value, text, which queries]...]
  const { queries, angle_classes: angles, distance_classes: distances } = data.failures;
  const cities = [...new Set(queries.map(query => query.city))].sort();
  const of = (name, labels, all) => [["", all, () => true],
    ...labels.map((label, code) => [String(code), label, query => query[name] === code])];
  return {
    compare: ["Methods", comparisons()],
    city: ["City", [["", "all", () => true], ...cities.map(city => [city, city, query => query.city === city])]],
    angle: ["Angle to best match", of("angle", angles, "any")],
    distance: ["Camera to building", of("distance", distances, "any")],
  };
}

function passing(choices, except = "") { // the queries that pass all filters but one
  const tests = FILTERS.filter(name => name !== except).map(name =>
    (choices[name][1].find(([value]) => value === state.filters[name]) || choices[name][1][0])[2]);
  return data.failures.queries.filter(query => tests.every(test => test(query)));
}

function showFailures() {
  const choices = filterChoices(), queries = passing(choices);
  for (const name of FILTERS) {
    const others = passing(choices, name);
    const counted = test => count(others.filter(test).length);
    const options = choices[name][1].map(([value, text, test]) => [value, `${text} (${counted(test)})`]);
    setOptions(byId(`filter-${name}`), options, state.filters[name]);
  }
  byId("failure-count").textContent = `${count(queries.length)} of ${count(data.failures.queries.length)} queries`;
  byId("failures").replaceChildren(...queries.slice(0, numShown).map(failureRow));
  byId("more-failures").hidden = queries.length <= numShown;
  keepAddress();
}

function bindFailures() {
  if (!data.failures) return;
  const choices = filterChoices();
  byId("filters").replaceChildren(...FILTERS.map(name => {
    const choice = element("select", { id: `filter-${name}` });
    choice.onchange = () => { state.filters[name] = choice.value; numShown = SHOWN_AT_ONCE; showFailures(); };
    return element("label", {}, `${choices[name][0]} `, choice);
  }));
  byId("more-failures").onclick = () => { numShown += SHOWN_AT_ONCE; showFailures(); };
  for (const tab of ["buildings", "failures"]) byId(`tab-${tab}`).onclick = () => showTab(tab);
  byId("tab-buildings").parentElement.onkeydown = event => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    showTab(state.tab === "failures" ? "buildings" : "failures");
    byId(`tab-${state.tab}`).focus();
  };
}

function failureRow(query) {
  const { methods } = data.failures, last = methods[methods.length - 1];
  const { angle_classes: angles, distance_classes: distances } = data.failures;
  const about = [`city ${query.city}`, query.angle < 0 ? "" : `angle to best match ${angles[query.angle]}`,
    query.distance < 0 ? "" : `camera ${distances[query.distance]} away`].filter(Boolean);
  const all = [failureTile("Query", query.id, query.building, "query")];
  for (const method of methods) all.push(resultTile(query, method));
  if (query[`rank_${last}`] > 1) {
    const lines = [`at rank ${count(query[`rank_${last}`])}`, cosineOf(query, "match", last)];
    all.push(failureTile("Best match", query[`match_${last}`], query[`match_building_${last}`], "right", ...lines));
  }
  const line = element("p", { className: "dim", textContent: about.join(", ") });
  return element("div", { className: "failure" }, line, tiles(all));
}

function resultTile(query, method) { // what the method finds first
  const isRight = query[`rank_${method}`] === 1, what = isRight ? "match" : "wrong";
  const title = `${WORDS[method]}: ${isRight ? "right" : "wrong"}`, row = query[`${what}_building_${method}`];
  const lines = [cosineOf(query, what, method)];
  if (!isRight && row >= 0 && query.building >= 0) lines.push(howFar(query.building, row));
  return failureTile(title, query[`${what}_${method}`], row, isRight ? "right" : "wrong", ...lines);
}

function cosineOf(query, what, method) {
  const cosine = query[`${what}_cosine_${method}`];
  return cosine === null ? "" : `cosine ${cosine.toFixed(2)}`;
}

function failureTile(title, image, row, kind, ...lines) {
  const link = row < 0 ? [] : [buildingLink(row, data.names[row])];
  return pictureTile(image, numberOfImage.get(image), title, kind, ...lines, ...link);
}

function showTab(tab) {
  state.tab = tab;
  if (!data.failures) return;
  for (const name of ["buildings", "failures"]) {
    byId(`view-${name}`).hidden = name !== tab;
    byId(`tab-${name}`).setAttribute("aria-selected", name === tab);
    byId(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  if (tab === "failures") showFailures();
  else resizePanels();
  keepAddress();
}

// ---------------------------------------------------------------- enlarged pictures

let enlarged = null; // the button of the picture

function enlarge(button) {
  enlarged = button;
  const small = button.querySelector("img"), dialog = byId("enlarged");
  Object.assign(dialog.querySelector("img"), { src: small.src, alt: small.alt });
  dialog.querySelector("figcaption").textContent = button.dataset.caption;
  if (!dialog.open) dialog.showModal();
}

function enlargeOther(step) {
  const view = enlarged.closest("#failures, #building");
  const all = [...view.querySelectorAll(".picture:not(:disabled)")].filter(one => one.dataset.caption);
  const other = all[all.indexOf(enlarged) + step];
  if (other) enlarge(other);
}

function bindEnlarged() {
  const dialog = byId("enlarged");
  dialog.querySelector(".close").onclick = () => dialog.close();
  dialog.querySelector(".previous").onclick = () => enlargeOther(-1);
  dialog.querySelector(".next").onclick = () => enlargeOther(1);
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
  dialog.onkeydown = event => {
    if (event.key === "ArrowLeft") enlargeOther(-1);
    if (event.key === "ArrowRight") enlargeOther(1);
  };
  dialog.onclose = () => enlarged?.scrollIntoView({ block: "nearest" });
}
