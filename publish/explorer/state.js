"use strict";
// The tables of the page, what the reader has chosen, and the address (#...) that holds it.

const ARRAYS = { float32: Float32Array, int32: Int32Array, int16: Int16Array, uint8: Uint8Array };

function read(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

function unpacked({ type, bytes }) {
  const text = atob(bytes), array = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) array[i] = text.charCodeAt(i);
  return new ARRAYS[type](array.buffer);
}

const data = read("data");
for (const [name, value] of Object.entries(data)) if (value?.bytes !== undefined) data[name] = unpacked(value);
for (const colouring of data.colourings) {
  colouring.codes = unpacked(colouring.codes);
  colouring.counts = colouring.classes.map(() => 0);
  for (const code of colouring.codes) colouring.counts[code]++;
}
const NUM_NEAREST = data.nearest.length / data.names.length;
const rowOfName = new Map(data.names.map((name, row) => [name, row]));
const numberOfImage = new Map(data.image_names.map((name, number) => [name, number]));
const located = row => !Number.isNaN(data.east[row]);
const byId = id => document.getElementById(id);

// ---------------------------------------------------------------- what is chosen

const state = {
  tab: "buildings",
  colouring: data.colourings[0],
  hidden: new Set(), // codes of the colouring
  city: 0, // on the map
  building: -1, // row, or -1
  filters: { compare: "", city: "", angle: "", distance: "" }, // of failures; "": all
};
const FILTERS = Object.keys(state.filters);

function addressOf() {
  const words = new URLSearchParams();
  const add = (key, value, usual) => { if (String(value) !== String(usual)) words.set(key, value); };
  add("tab", state.tab, "buildings");
  add("colour", state.colouring.name, data.colourings[0].name);
  add("hide", [...state.hidden].sort().join("."), "");
  add("city", data.cities[state.city].name, data.cities[firstCity()].name);
  add("building", state.building < 0 ? "" : data.names[state.building], "");
  for (const name of FILTERS) add(`failures-${name}`, state.filters[name], "");
  for (const panel of Object.values(panels)) if (panel.isMoved) add(panel.name, panel.viewText(), "");
  return words.toString();
}

let addressTimer = 0;
function keepAddress() { // browsers limit how often an address may change
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    const address = `#${addressOf()}`;
    if (address !== (location.hash || "#")) history.replaceState(null, "", address);
  }, 250);
}

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.tab = words.get("tab") === "failures" && data.failures ? "failures" : "buildings";
  state.colouring = data.colourings.find(one => one.name === words.get("colour")) || data.colourings[0];
  state.hidden = new Set((words.get("hide") || "").split(".").filter(Boolean).map(Number));
  const city = data.cities.findIndex(one => one.name === words.get("city"));
  state.city = city < 0 ? firstCity() : city;
  state.building = rowOfName.get(words.get("building")) ?? -1;
  for (const name of FILTERS) state.filters[name] = words.get(`failures-${name}`) || "";
  return words;
}

function firstCity() { // the one with most buildings on the map
  return data.cities.reduce((best, city, code) => city.located > data.cities[best].located ? code : best, 0);
}

// ---------------------------------------------------------------- elements and words

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function setOptions(select, options, chosen) { // [value, text]
  select.replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));
  select.value = chosen;
}

const count = number => number.toLocaleString("en");

function metres(distance) {
  if (distance < 1000) return `${distance.toFixed(0)} m`;
  return `${(distance / 1000).toFixed(distance < 10000 ? 1 : 0)} km`;
}

function howFar(a, b) { // in words, between two buildings
  const [cityA, cityB] = [a, b].map(row => data.cities[data.city[row]].name);
  if (cityA && cityB && cityA !== cityB) return "another city";
  if (!located(a) || !located(b)) return "position not known";
  return metres(Math.hypot(data.east[a] - data.east[b], data.north[a] - data.north[b]));
}

let jpegs = null; // at the end of the page, so that the first drawing does not wait for them
function picture(number) { // a data URI, or "" if there is none, or none yet
  if (number === undefined || document.readyState === "loading") return "";
  jpegs = jpegs || read("pictures");
  return `data:image/jpeg;base64,${jpegs[number]}`;
}

const HUES = 8;
function colourOf(name) { // of the style, as #rrggbb; categories beyond the eight hues are lighter, then darker ones
  const category = /^category-(\d+)$/.exec(name), shade = category ? Math.floor(category[1] / HUES) : 0;
  const styled = one => getComputedStyle(document.documentElement).getPropertyValue(`--${one}`).trim();
  if (!shade) return styled(name);
  return mixed(styled(`category-${category[1] % HUES}`), styled(shade === 1 ? "back" : "text"), 0.45);
}

function channels(colour) { // of #rrggbb
  return [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16));
}

function mixed(one, other, share) {
  const [a, b] = [channels(one), channels(other)];
  return `#${a.map((value, i) => Math.round(value + share * (b[i] - value)).toString(16).padStart(2, "0")).join("")}`;
}
