// Geometry and painting of the lanes and the heatmap. Only the visible columns are drawn, on a
// canvas as wide as its window; the cells come from a picture with one pixel per cell.

const STRIP = { y: 0, h: 32 };
const SHARE = { y: 32, h: 60 };
const NUMBER = { y: 104, h: 34 };
const HEAT_TOP = 152;
const AXIS = 34;
const MIN_COLUMN = 3;
const MAX_COLUMN = 16;

/** Columns the time axis has room for: grows in steps, so that a stream rarely rescales. */
function timeCapacity(header, nTokens) {
  const arm = header.arms[header.routed_arm];
  if (!header.live) return Math.max(1, nTokens);
  let capacity = Math.max(64, arm.n_prompt + 32);
  while (capacity < nTokens + 1) capacity = Math.ceil(capacity * 1.5);
  return Math.max(nTokens, Math.min(capacity, header.expected_tokens ?? capacity));
}

class Plot {
  constructor(part) {
    this.part = part;
    this.main = part("main").getContext("2d");
    this.over = part("over").getContext("2d");
    this.gutter = part("gutter").getContext("2d");
    this.cells = document.createElement("canvas");
    this.follow = true;
    part("scroll").addEventListener("scroll", () => {
      const { scrollLeft, clientWidth, scrollWidth } = part("scroll");
      this.follow = scrollLeft + clientWidth >= scrollWidth - 4;
      this.draw();
      this.onScroll?.();
    });
  }

  /** Takes new data or new choices, and paints everything. */
  update({ routing, theme, prefs, adapter }) {
    Object.assign(this, { routing, theme, prefs, adapter });
    this.arrange();
    this.paintCells();
    const scroll = this.part("scroll");
    if (routing.header.live && this.follow) scroll.scrollLeft = scroll.scrollWidth;
    this.draw();
  }

  arrange() {
    const { routing, part, prefs } = this;
    const { header } = routing;
    this.layout = layoutRows(header, Math.max(1, routing.nRows), prefs.order);
    this.height = HEAT_TOP + this.layout.height + AXIS;
    const total = part("plot").clientWidth;
    this.gutterWidth = total < 560 ? 62 : 104;
    this.width = Math.max(80, total - this.gutterWidth);
    this.capacity = timeCapacity(header, header.arms[header.routed_arm].first + this.nPieces());
    const fit = this.width / this.capacity;
    const column = Math.max(MIN_COLUMN, Math.min(MAX_COLUMN, fit));
    this.column = Math.max(MIN_COLUMN, Math.min(40, column * prefs.zoom));
    const sheet = part("sheet");
    sheet.style.width = `${Math.ceil(this.column * this.capacity)}px`;
    sheet.style.height = `${this.height}px`;
    part("scroll").style.width = `${this.width}px`;
    part("pane").style.width = `${this.width}px`;
    for (const context of [this.main, this.over]) this.size(context, this.width);
    this.size(this.gutter, this.gutterWidth);
  }

  nPieces() {
    const { header } = this.routing;
    return header.arms[header.routed_arm].pieces.length;
  }

  size(context, width) {
    const { canvas } = context;
    const scale = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(width * scale), Math.round(this.height * scale)];
    if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${this.height}px`;
    context.setTransform(scale, 0, 0, scale, 0, 0);
  }

  x(t) {
    return t * this.column - this.part("scroll").scrollLeft;
  }

  columns() {
    const from = Math.max(0, Math.floor(this.part("scroll").scrollLeft / this.column));
    const to = Math.min(this.routing.nTokens, from + Math.ceil(this.width / this.column) + 1);
    return { from, to: Math.max(from, to) };
  }

  /** One pixel per cell: column t, row in the order shown. Transparent: cut, absent, no mass. */
  paintCells() {
    const { routing, cells } = this;
    cells.width = Math.max(1, routing.nTokens);
    cells.height = Math.max(1, this.layout.rows.length);
    if (!routing.nTokens) return;
    const context = cells.getContext("2d");
    const image = context.createImageData(cells.width, cells.height);
    const words = new Uint32Array(image.data.buffer);
    if (this.adapter === null) this.paintDominant(words);
    else this.paintAdapter(words, this.adapter);
    context.putImageData(image, 0, 0);
  }

  paintAdapter(words, k) {
    const { routing, prefs } = this;
    const effective = prefs.effective;
    const range = routing.range(effective);
    this.scale = makeScale(prefs.scale, range, routing.nAdapters, this.theme);
    const ownPlane = effective && routing.header.effective === "plane";
    const codes = routing.planes[ownPlane ? "effective" : "scalings"].data;
    const codeRange = routing.range(ownPlane);
    const tables = new Map();
    const width = routing.nTokens;
    for (let t = 0; t < width; t++) {
      const weight = effective && !ownPlane ? routing.planes.weight.data[t] : 1;
      if (!tables.has(weight)) tables.set(weight, colorTable(this.scale, codeRange, weight));
      const table = tables.get(weight);
      this.layout.rows.forEach(({ l }, row) => {
        const hidden = effective ? !routing.isKept(t, l, k) : !routing.isPresent(l, k);
        if (!hidden) words[row * width + t] = table[codes[routing.index(t, l, k)]];
      });
    }
  }

  paintDominant(words) {
    const { routing, prefs, theme } = this;
    const K = routing.nAdapters;
    const width = routing.nTokens;
    for (let t = 0; t < width; t++) {
      this.layout.rows.forEach(({ l }, row) => {
        let best = -1;
        let most = 0;
        let sum = 0;
        for (let k = 0; k < K; k++) {
          const size = Math.abs(routing.value(t, l, k, prefs.effective));
          sum += size;
          if (size > most) [best, most] = [k, size];
        }
        if (best < 0) return;
        const lead = K > 1 ? (most / sum - 1 / K) / (1 - 1 / K) : 1;
        words[row * width + t] = word(theme.adapters[best], Math.round(255 * fade(lead)));
      });
    }
  }

  draw() {
    if (!this.routing) return;
    const { main: c, theme, routing, prefs } = this;
    c.clearRect(0, 0, this.width, this.height);
    const columns = this.columns();
    const x = (t) => this.x(t);
    c.imageSmoothingEnabled = false;
    drawShareLane(c, SHARE, routing, theme, prefs.effective, columns, x);
    drawNumberLane(c, NUMBER, routing, theme, prefs.effective, columns, x);
    this.drawHeat(c, columns);
    this.drawBoundary(c);
    this.drawChanges(c);
    this.drawAxis(c);
    this.drawGutter();
  }

  drawHeat(c, { from, to }) {
    const { routing, theme, adapter, prefs, layout } = this;
    const left = this.x(0);
    const right = this.x(routing.nTokens);
    c.fillStyle = rgba(theme.panel, 1);
    c.fillRect(left, HEAT_TOP, this.x(this.capacity) - left, layout.height);
    if (to <= from) return;
    if (adapter !== null) {
      if (prefs.effective && routing.planes.kept) {
        c.fillStyle = makePattern(c, "cut", theme);
        c.fillRect(left, HEAT_TOP, right - left, layout.height);
      }
      c.fillStyle = makePattern(c, "absent", theme);
      for (const { l, y, h } of layout.rows) {
        if (!routing.isPresent(l, adapter)) {
          c.save();
          c.fillStyle = rgba(theme.panel, 1);
          c.fillRect(left, HEAT_TOP + y, right - left, h);
          c.restore();
          c.fillRect(left, HEAT_TOP + y, right - left, h);
        }
      }
    }
    for (const group of layout.groups) {
      c.drawImage(
        this.cells,
        from,
        group.from,
        to - from,
        group.to - group.from,
        this.x(from),
        HEAT_TOP + group.y,
        (to - from) * this.column,
        group.h,
      );
    }
    // Gaps between groups: the page shows through.
    c.fillStyle = rgba(theme.background, 1);
    layout.groups.slice(1).forEach((group, i) => {
      const before = layout.groups[i];
      const y = before.y + before.h;
      if (group.y > y) c.fillRect(0, HEAT_TOP + y, this.width, group.y - y);
    });
  }

  drawBoundary(c) {
    const { theme } = this;
    const { header } = this.routing;
    const x = Math.round(this.x(header.arms[header.routed_arm].n_prompt)) - 0.5;
    c.strokeStyle = rgba(theme.text, 0.9);
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(x, STRIP.y + 2);
    c.lineTo(x, HEAT_TOP + this.layout.height);
    c.stroke();
    c.font = `11px ${theme.font}`;
    c.fillStyle = rgba(theme.text, 0.75);
    c.textBaseline = "middle";
    c.textAlign = "right";
    if (x > 52) c.fillText("prompt", x - 6, 8);
    c.textAlign = "left";
    c.fillText("response", x + 6, 8);
  }

  drawChanges(c) {
    const { theme } = this;
    c.font = `11px ${theme.font}`;
    c.textBaseline = "middle";
    c.textAlign = "left";
    let free = -Infinity;
    const changes = this.routing.header.knob_changes;
    for (const [i, [t, label]] of changes.entries()) {
      const x = Math.round(this.x(t)) + 0.5;
      c.strokeStyle = c.fillStyle = rgba(theme.amber, 1);
      c.setLineDash([3, 3]);
      c.beginPath();
      c.moveTo(x, 26);
      c.lineTo(x, HEAT_TOP + this.layout.height);
      c.stroke();
      c.setLineDash([]);
      c.beginPath();
      c.moveTo(x - 4, 19);
      c.lineTo(x + 4, 19);
      c.lineTo(x, 27);
      c.fill();
      const wide = c.measureText(label).width;
      const at = x + 7 + wide <= this.width ? x + 7 : x - 7 - wide;
      // A label that would run into the next mark is left to the tooltip.
      const next = i + 1 < changes.length ? this.x(changes[i + 1][0]) - 6 : this.width;
      const fits = at > free && at + wide <= next;
      if (fits) c.fillText(label, at, 23);
      free = Math.max(x + 6, fits ? at + wide + 14 : free);
    }
  }

  drawAxis(c) {
    const { theme } = this;
    const top = HEAT_TOP + this.layout.height;
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((s) => s * this.column >= 44);
    c.font = `11px ${theme.font}`;
    c.fillStyle = rgba(theme.text, 0.75);
    c.strokeStyle = rgba(theme.text, 0.4);
    c.textAlign = "center";
    c.textBaseline = "top";
    for (let n = step === 1 ? 1 : step; n <= this.capacity; n += step) {
      const x = this.x(n - 0.5);
      if (x < 8 || x > this.width - 8) continue;
      c.fillRect(Math.round(x), top + 1, 1, 4);
      c.fillText(String(n), x, top + 7);
    }
  }

  drawGutter() {
    const { gutter: c, theme, routing, layout } = this;
    const right = this.gutterWidth - 8;
    const narrow = this.gutterWidth < 100;
    c.clearRect(0, 0, this.gutterWidth, this.height);
    c.font = `11px ${theme.font}`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    c.fillStyle = rgba(theme.text, 0.9);
    const [share, number] = [SHARE, NUMBER].map(({ y, h }) => y + h / 2);
    c.fillText(narrow ? "share" : "share of mass", right - 18, share);
    c.fillText(narrow ? "eff. no." : "effective", right - 18, number - (narrow ? 0 : 6));
    if (!narrow) c.fillText("number", right - 18, number + 7);
    c.fillStyle = rgba(theme.text, 0.6);
    c.font = `10px ${theme.font}`;
    c.fillText("1", right, SHARE.y + 5);
    c.fillText("0", right, SHARE.y + SHARE.h - 4);
    c.fillText(String(Math.max(2, routing.nAdapters)), right, NUMBER.y + 4);
    c.fillText("1", right, NUMBER.y + NUMBER.h - 4);
    c.font = `11px ${theme.font}`;
    c.fillStyle = rgba(theme.text, 0.8);
    for (const group of labelledGroups(layout.groups, 15)) {
      c.fillText(group.label, right, HEAT_TOP + group.y + group.h / 2, right);
    }
    c.fillText("token", right, HEAT_TOP + layout.height + 12);
  }

  /** Crosshair of the cell or the column under the pointer, the cursor or the pin. */
  mark(cell, pinned) {
    const { over: c, theme } = this;
    c.clearRect(0, 0, this.width, this.height);
    if (!cell || !this.routing || cell.t >= this.capacity) return;
    const x = this.x(cell.t);
    const bottom = HEAT_TOP + this.layout.height;
    c.fillStyle = rgba(theme.text, 0.13);
    c.fillRect(x, SHARE.y, this.column, bottom - SHARE.y);
    c.strokeStyle = rgba(pinned ? theme.primary : theme.text, 0.9);
    c.lineWidth = 1;
    c.beginPath();
    for (const at of [x - 0.5, x + this.column + 0.5]) {
      c.moveTo(at, SHARE.y - 4);
      c.lineTo(at, bottom + 4);
    }
    const row = cell.row === undefined ? null : this.layout.rows[cell.row];
    if (row) {
      const y = HEAT_TOP + row.y;
      for (const at of [y - 0.5, y + row.h + 0.5]) {
        c.moveTo(0, at);
        c.lineTo(this.width, at);
      }
    }
    c.stroke();
    if (!row) return;
    const cellBox = [x - 1.5, HEAT_TOP + row.y - 1.5, this.column + 3, row.h + 3];
    c.lineWidth = 4;
    c.strokeStyle = rgba(theme.background, 1);
    c.strokeRect(...cellBox);
    c.lineWidth = 2;
    c.strokeStyle = rgba(pinned ? theme.primary : theme.text, 1);
    c.strokeRect(...cellBox);
  }

  /** The cell under a pointer: token t, and its row when it is over the heatmap. */
  hit(clientX, clientY) {
    const box = this.part("over").getBoundingClientRect();
    const t = Math.floor((clientX - box.left - this.x(0)) / this.column);
    const y = clientY - box.top - HEAT_TOP;
    if (t < 0 || t >= this.routing.header.arms[this.routing.header.routed_arm].first + this.nPieces())
      return null;
    if (y < 0 || y > this.layout.height || t >= this.routing.nTokens) return { t };
    return { t, row: rowAt(this.layout.rows, y) };
  }

  /** The box of a cell on the screen, for the tooltip. */
  box(cell) {
    const own = this.part("over").getBoundingClientRect();
    const left = own.left + this.x(cell.t);
    const row = cell.row === undefined ? { y: -20, h: 0 } : this.layout.rows[cell.row];
    const top = own.top + HEAT_TOP + row.y;
    return { left, right: left + this.column, top, bottom: top + row.h };
  }

  /** Scrolls sideways, never the page, until token t shows. */
  reveal(t) {
    const scroll = this.part("scroll");
    const x = this.x(t);
    if (x < 0 || x + this.column > this.width) {
      scroll.scrollLeft = t * this.column - this.width / 2;
    }
  }
}

/** How opaque a dominant cell is: faint when its adapter hardly leads, full when it has all. */
function fade(lead) {
  return 0.2 + 0.8 * Math.sqrt(Math.max(0, Math.min(1, lead)));
}
