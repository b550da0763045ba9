// A panel is a canvas of points that can be moved and zoomed: the map and the projection are one each.
//
// The points are written pixel by pixel into an image, which takes milliseconds for 50,000, and the image is kept
// until the view or the colours change. Marks of single buildings are drawn over it.

const panels = {}; // by name: map, projection
const MARK_PX = 7;

class Panel {
  constructor(name, x, y, beneath) {
    Object.assign(this, { name, x, y, beneath, isMoved: false, hovered: -1 });
    this.canvas = document.querySelector(`#${name} canvas`);
    this.tip = document.querySelector(`#${name} .tip`);
    this.pen = this.canvas.getContext("2d");
    this.layer = document.createElement("canvas"); // the points alone
    const [closer, farther, all] = document.querySelectorAll(`#${name} .zoom button`);
    closer.onclick = () => this.zoom(1.6);
    farther.onclick = () => this.zoom(1 / 1.6);
    all.onclick = () => this.fit();
    this.resize();
  }

  resize() {
    const frame = this.canvas.parentElement;
    if (!frame.clientWidth) return; // on a tab that is not shown
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    [this.width, this.height] = [frame.clientWidth, frame.clientHeight];
    for (const canvas of [this.canvas, this.layer]) {
      canvas.width = Math.max(1, Math.round(this.width * this.ratio));
      canvas.height = Math.max(1, Math.round(this.height * this.ratio));
    }
    if (this.rows && !this.isMoved) this.fit();
  }

  show(rows, box = {}) { // which points there are; `box`: what else to have in view
    this.rows = rows.filter(row => !Number.isNaN(this.x[row]) && !Number.isNaN(this.y[row]));
    this.grid = gridOf(this.rows, this.x, this.y);
    this.box = { ...this.grid, ...box };
    this.fit();
  }

  fit() {
    const { west, south, east, north } = this.box;
    [this.centreX, this.centreY] = [(west + east) / 2, (south + north) / 2];
    const margin = 20;
    const across = (this.width - 2 * margin) / (east - west || 1);
    const up = (this.height - 2 * margin) / (north - south || 1);
    this.scale = this.fitted = Math.max(Math.min(across, up), 1e-9);
    this.isMoved = false;
    this.changed();
  }

  toScreen(x, y) {
    return [(x - this.centreX) * this.scale + this.width / 2, this.height / 2 - (y - this.centreY) * this.scale];
  }

  toData(px, py) {
    return [(px - this.width / 2) / this.scale + this.centreX, (this.height / 2 - py) / this.scale + this.centreY];
  }

  move(px, py) {
    this.centreX -= px / this.scale;
    this.centreY += py / this.scale;
    this.isMoved = true;
    this.changed();
  }

  zoom(factor, px = this.width / 2, py = this.height / 2) { // about a point of the screen
    const [x, y] = this.toData(px, py);
    this.scale = Math.min(Math.max(this.scale * factor, this.fitted / 4), this.fitted * 2000);
    this.centreX = x - (px - this.width / 2) / this.scale;
    this.centreY = y + (py - this.height / 2) / this.scale;
    this.isMoved = true;
    this.changed();
  }

  reveal(row) { // move no more than needed to see a building
    const [px, py] = this.toScreen(this.x[row], this.y[row]);
    const isSeen = px > 20 && py > 20 && px < this.width - 20 && py < this.height - 20;
    if (!isSeen && !Number.isNaN(px)) this.move(this.width / 2 - px, this.height / 2 - py);
  }

  viewText() {
    const view = [this.centreX, this.centreY, this.scale / this.fitted];
    return view.map(value => Number(value.toPrecision(6))).join("_");
  }

  setView(text) {
    const [x, y, zoom] = (text || "").split("_").map(Number);
    if (!(zoom > 0)) return this.fit();
    Object.assign(this, { centreX: x, centreY: y, scale: zoom * this.fitted, isMoved: true });
    this.changed();
  }

  changed(points = true) {
    this.isStale = this.isStale || points;
    if (points) keepAddress();
    if (!this.frame) this.frame = requestAnimationFrame(() => this.paint());
  }

  radius() { // of a dot, in CSS pixels: smaller where there are many, growing a little as one zooms in
    const usual = this.rows.length > 15000 ? 1.6 : this.rows.length > 3000 ? 2.4 : 4;
    return Math.min(usual * Math.max(1, this.scale / this.fitted) ** 0.3, Math.max(usual, 6));
  }

  paint() {
    this.frame = 0;
    const { pen } = this;
    if (this.isStale) this.paintPoints();
    this.isStale = false;
    pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    this.beneath(this);
    pen.drawImage(this.layer, 0, 0, this.width, this.height);
    this.paintMarks();
  }

  paintPoints() {
    const pen = this.layer.getContext("2d"), { width, height } = this.layer;
    const image = pen.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const stamp = stampOf(this.radius() * this.ratio, this.rows.length <= 5000 ? this.ratio : 0);
    const inks = state.colouring.classes.map(({ colour }) => stamp.inked(colourOf(colour), colourOf("back")));
    const { codes } = state.colouring, n = this.rows.length, scale = this.scale * this.ratio;
    const left = width / 2 - this.centreX * scale, top = height / 2 + this.centreY * scale;
    const step = n % 7919 ? 7919 : 7907; // in no class's order, or the last class would cover the others
    for (let k = 0, at = 0; k < n; k++, at = (at + step) % n) {
      const row = this.rows[at], code = codes[row];
      if (state.hidden.has(code)) continue;
      const px = Math.round(left + this.x[row] * scale), py = Math.round(top - this.y[row] * scale);
      stamp.press(pixels, width, height, px, py, inks[code]);
    }
    pen.putImageData(image, 0, 0);
  }

  paintMarks() {
    const { pen } = this, ink = colourOf("text"), back = colourOf("back");
    const nearest = state.building < 0 ? [] : nearestTo(state.building).filter(row => this.has(row));
    if (this.name === "map" && this.has(state.building)) {
      for (const row of nearest) this.line(state.building, row, ink);
    }
    for (const row of nearest) this.ring(row, this.radius() + 2.5, ink, back, 1.5);
    if (this.has(this.hovered)) this.ring(this.hovered, this.radius() + 2.5, ink, back, 2);
    if (this.has(state.building)) {
      this.ring(state.building, this.radius() + MARK_PX, ink, back, 2.5);
      this.ring(state.building, this.radius() + 1, ink, back, 2);
    }
  }

  has(row) {
    return row >= 0 && !Number.isNaN(this.x[row]) && (this.name !== "map" || data.city[row] === state.city);
  }

  ring(row, radius, ink, back, width) {
    const { pen } = this, [px, py] = this.toScreen(this.x[row], this.y[row]);
    for (const [style, thickness] of [[back, width + 2], [ink, width]]) {
      pen.beginPath();
      pen.arc(px, py, radius, 0, 2 * Math.PI);
      Object.assign(pen, { strokeStyle: style, lineWidth: thickness });
      pen.stroke();
    }
  }

  line(from, to, ink) {
    const { pen } = this;
    pen.beginPath();
    pen.moveTo(...this.toScreen(this.x[from], this.y[from]));
    pen.lineTo(...this.toScreen(this.x[to], this.y[to]));
    Object.assign(pen, { strokeStyle: ink, lineWidth: 1.2, globalAlpha: 0.6 });
    pen.stroke();
    pen.globalAlpha = 1;
  }

  at(px, py, reach) { // the nearest shown building within `reach` pixels, or -1
    const [x, y] = this.toData(px, py), { grid } = this, { codes } = state.colouring;
    let best = -1, least = (reach / this.scale) ** 2;
    grid.near(x, y, reach / this.scale, row => {
      const away = (this.x[row] - x) ** 2 + (this.y[row] - y) ** 2;
      if (away <= least && !state.hidden.has(codes[row])) [best, least] = [row, away];
    });
    return best;
  }

  hover(row) {
    if (row === this.hovered) return;
    this.hovered = row;
    this.tip.hidden = row < 0;
    if (row >= 0) {
      const [px, py] = this.toScreen(this.x[row], this.y[row]);
      const { classes, codes } = state.colouring;
      this.tip.textContent = `${data.names[row]} · ${classes[codes[row]].label}`;
      this.tip.style.left = `${Math.max(0, Math.min(px + 12, this.width - this.tip.offsetWidth - 4))}px`;
      this.tip.style.top = `${py > 40 ? py - 34 : py + 14}px`;
    }
    this.changed(false);
  }
}

// ---------------------------------------------------------------- dots

function stampOf(radius, rim) { // a disc with a rim in the colour of the page, in pixels of the device
  const reach = Math.ceil(radius + rim), spots = [];
  for (let dy = -reach; dy <= reach; dy++) {
    for (let dx = -reach; dx <= reach; dx++) {
      const away = Math.hypot(dx, dy), covers = at => Math.min(1, Math.max(0, at + 0.5 - away));
      if (covers(radius + rim)) spots.push({ dx, dy, core: covers(radius), alpha: covers(radius + rim) });
    }
  }
  const dx = Int32Array.from(spots, one => one.dx), dy = Int32Array.from(spots, one => one.dy);
  return {
    inked(colour, back) { // the pixels of a dot of this colour
      const [ink, page] = [channels(colour), channels(back)];
      return Uint32Array.from(spots, ({ core, alpha }) => {
        const share = rim ? core : 1;
        const [r, g, b] = ink.map((value, i) => Math.round(share * value + (1 - share) * page[i]));
        return (Math.round(255 * alpha) << 24 | b << 16 | g << 8 | r) >>> 0;
      });
    },
    press(pixels, width, height, px, py, ink) {
      if (px < -reach || py < -reach || px >= width + reach || py >= height + reach) return;
      for (let i = 0; i < ink.length; i++) {
        const x = px + dx[i], y = py + dy[i];
        if (x < 0 || y < 0 || x >= width || y >= height) continue;
        const at = y * width + x;
        if (ink[i] >>> 24 >= pixels[at] >>> 24) pixels[at] = ink[i]; // soft edges cover no dot
      }
    },
  };
}

// ---------------------------------------------------------------- which point is near

function gridOf(rows, x, y) { // points by square cells, about two in each
  let west = Infinity, south = Infinity, east = -Infinity, north = -Infinity;
  for (const row of rows) {
    west = Math.min(west, x[row]); east = Math.max(east, x[row]);
    south = Math.min(south, y[row]); north = Math.max(north, y[row]);
  }
  if (!rows.length) [west, south, east, north] = [0, 0, 1, 1];
  const side = Math.max(east - west, north - south, 1e-6) / Math.ceil(Math.sqrt(rows.length / 2) || 1);
  const columns = Math.floor((east - west) / side) + 1, lines = Math.floor((north - south) / side) + 1;
  const cellOf = row => Math.floor((y[row] - south) / side) * columns + Math.floor((x[row] - west) / side);
  const starts = new Int32Array(columns * lines + 1), sorted = new Int32Array(rows.length);
  for (const row of rows) starts[cellOf(row) + 1]++;
  for (let cell = 0; cell < columns * lines; cell++) starts[cell + 1] += starts[cell];
  const next = starts.slice();
  for (const row of rows) sorted[next[cellOf(row)]++] = row;
  const clamp = (value, most) => Math.min(Math.max(Math.floor(value), 0), most);
  function near(px, py, reach, visit) {
    const [first, last] = [px - reach, px + reach].map(at => clamp((at - west) / side, columns - 1));
    const [low, high] = [py - reach, py + reach].map(at => clamp((at - south) / side, lines - 1));
    for (let line = low; line <= high; line++) {
      const start = starts[line * columns + first], stop = starts[line * columns + last + 1];
      for (let i = start; i < stop; i++) visit(sorted[i]);
    }
  }
  return { west, south, east, north, near };
}
