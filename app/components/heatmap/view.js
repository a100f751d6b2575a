// Ties the parts together: one message in, one picture out; hover links texts and heatmap.

// What the viewer chose stays when the component is mounted again on the same page.
const PREFS = {
  adapter: null,
  effective: true,
  scale: "linear",
  order: "block",
  tint: true,
  zoom: 1,
};

let remembered = null;

class View {
  constructor(root) {
    this.root = root;
    this.prefs = PREFS;
    this.hover = null;
    this.pin = null;
    const part = (name) => root.querySelector(`[data-part="${name}"]`);
    this.part = part;
    this.texts = new Texts(part("texts"), (cell, span) => this.hoverToken(cell, span));
    this.tooltip = new Tooltip(part("tip"), root);
    this.plot = new Plot(part);
    this.plot.onScroll = () => this.showMark();
    this.toolbar = new Toolbar(part("toolbar"), part("legend"), this);
    this.listen();
    this.resize = new ResizeObserver(() => this.routing && this.drawing() && this.repaint());
    this.resize.observe(root);
  }

  listen() {
    const over = this.part("over");
    over.addEventListener("pointermove", (event) => {
      if (!this.drawing()) return;
      this.setHover(this.plot.hit(event.clientX, event.clientY));
    });
    over.addEventListener("pointerleave", () => this.setHover(null));
    over.addEventListener("click", (event) => {
      const cell = this.plot.hit(event.clientX, event.clientY);
      const same = this.pin && cell && this.pin.t === cell.t && this.pin.row === cell.row;
      this.pin = same ? null : cell;
      this.showMark();
    });
    this.part("plot").addEventListener("keydown", (event) => this.key(event));
    this.part("plot").addEventListener("blur", () => this.setHover(null));
    this.onWindowScroll = () => this.pin || this.tooltip.hide();
    addEventListener("scroll", this.onWindowScroll, true);
  }

  destroy() {
    if (this.routing) {
      const bodies = [...this.root.querySelectorAll(".body")].map((body) => body.scrollTop);
      const { follow } = this.plot;
      const left = this.part("scroll").scrollLeft;
      remembered = { run: this.routing.header.run_id, pin: this.pin, follow, left, bodies };
    }
    this.resize.disconnect();
    removeEventListener("scroll", this.onWindowScroll, true);
  }

  /** Takes a message. The same version again only follows the theme. */
  update(bytes) {
    const message = readMessage(bytes);
    const { header } = message;
    if (this.routing?.header.run_id !== header.run_id) {
      this.pin = this.hover = null;
      this.plot.follow = true;
    }
    const wasLive = this.routing?.header.live;
    this.routing = new Routing(message);
    this.adapter = this.prefs.adapter;
    if (this.adapter !== null && this.adapter >= header.adapters.length) this.adapter = null;
    this.theme = readTheme(this.root, header.palette);
    this.root.style.setProperty("--amber", rgba(this.theme.amber, 1));
    this.texts.update(header);
    this.part("figure").hidden = !this.drawing();
    this.root.classList.toggle("rerouted", header.rerouted);
    this.note(header);
    if (this.drawing()) this.redraw();
    if (remembered?.run === header.run_id) this.restore();
    remembered = null;
    if (wasLive && !header.live) this.announce();
  }

  /** Takes up where an earlier mount of the same run was: Streamlit may mount anew at any time. */
  restore() {
    const { pin, follow, left, bodies } = remembered;
    this.pin = pin;
    this.plot.follow = follow;
    if (!follow) this.part("scroll").scrollLeft = left;
    this.root.querySelectorAll(".body").forEach((body, i) => (body.scrollTop = bodies[i] ?? 0));
    this.showMark();
  }

  drawing() {
    return this.routing.header.routed_arm !== null;
  }

  note(header) {
    const notes = [];
    if (header.rerouted) {
      const knobs = header.knobs[0]?.[1] ?? "";
      notes.push(make("span", "amber", `Re-routed from the recording with ${knobs}.`));
    }
    if (!header.layerwise && header.routed_arm !== null) {
      const why = "The router writes one mixture for all modules (layerwise_scalings is off): one row.";
      notes.push(make("span", "", why));
    }
    if (header.routed_arm === null) {
      const why = "No arm of this run was routed: there are no scalings to draw.";
      notes.push(make("span", "", why));
    }
    const note = this.part("note");
    note.hidden = notes.length === 0;
    note.replaceChildren(...notes);

  }

  redraw() {
    this.repaint();
    this.toolbar.update();
    this.texts.tint(this.routing, this.theme, this.prefs.effective, this.prefs.tint);
  }

  repaint() {
    this.plot.update(this);
    const part = this.part("plot");
    part.setAttribute("aria-colcount", String(this.routing.nTokens));
    part.setAttribute("aria-rowcount", String(this.routing.nRows));
    this.showMark();
  }

  choose(adapter) {
    this.adapter = this.prefs.adapter = adapter;
    this.redraw();
  }

  zoom(factor) {
    this.prefs.zoom = Math.max(0.5, Math.min(8, this.prefs.zoom * factor));
    this.repaint();
  }

  setHover(cell) {
    this.hover = cell;
    // Only here: a text that scrolled with every message would fight its reader.
    if (cell) this.texts.reveal(cell.t, this.routing.header.routed_arm);
    this.showMark();
  }

  /** A token of a text is under the pointer. */
  hoverToken(cell, span) {
    this.hover = null;
    if (!cell) {
      this.showMark();
      return;
    }
    const own = cell.arm === this.routing.header.routed_arm;
    this.texts.mark(cell.t, cell.arm);
    if (own && this.drawing() && cell.t < this.routing.nTokens) {
      this.plot.reveal(cell.t);
      this.plot.mark({ t: cell.t }, false);
    }
    if (this.pin) return;
    this.tooltip.show(describeToken(this, cell.t, cell.arm), span.getBoundingClientRect(), false);
  }

  /** Draws the hovered cell, or else the pinned one. */
  showMark() {
    if (!this.routing || !this.drawing()) return;
    const cell = this.hover ?? this.pin;
    this.plot.mark(cell, cell !== null && cell === this.pin);
    this.texts.mark(cell ? cell.t : null, this.routing.header.routed_arm);
    if (!cell) {
      this.tooltip.hide();
      return;
    }
    const nodes = this.describe(cell);
    if (nodes) this.tooltip.show(nodes, this.plot.box(cell), cell === this.pin);
  }

  describe(cell) {
    const known = cell.row !== undefined && cell.t < this.routing.nTokens;
    if (known) return describeCell(this, cell.t, this.plot.layout.rows[cell.row].l);
    return describeToken(this, cell.t, this.routing.header.routed_arm);
  }

  key(event) {
    if (event.target !== this.part("plot") || !this.drawing() || !this.routing.nTokens) return;
    const { rows, groups } = this.plot.layout;
    const at = this.hover?.row !== undefined ? this.hover : { t: this.routing.nTokens - 1, row: 0 };
    let { t, row } = at;
    const step = event.ctrlKey ? 10 : 1;
    const group = groups.findIndex((g) => row >= g.from && row < g.to);
    switch (event.key) {
      case "ArrowLeft": t -= step; break;
      case "ArrowRight": t += step; break;
      case "ArrowUp": row -= step; break;
      case "ArrowDown": row += step; break;
      case "PageUp": row = groups[Math.max(0, group - 1)].from; break;
      case "PageDown": row = groups[Math.min(groups.length - 1, group + 1)].from; break;
      case "Home": t = 0; break;
      case "End": t = this.routing.nTokens - 1; break;
      case "Enter": this.pin = this.hover; break;
      case "Escape": this.pin = this.hover = null; this.showMark(); return;
      default: return;
    }
    event.preventDefault();
    event.stopPropagation();
    t = Math.max(0, Math.min(this.routing.nTokens - 1, t));
    row = Math.max(0, Math.min(rows.length - 1, row));
    this.plot.reveal(t);
    this.setHover(event.key === "Enter" ? this.pin : { t, row });
    if (event.key === "Enter") return;
    const label = speakCell(this, t, rows[row].l);
    const cell = this.part("cell");
    cell.setAttribute("aria-label", label);
    cell.setAttribute("aria-colindex", String(t + 1));
    cell.parentElement.setAttribute("aria-rowindex", String(row + 1));
    cell.textContent = label;
  }

  /** Says once, at the end, what a run showed. */
  announce() {
    const { routing } = this;
    const { header } = routing;
    if (!this.drawing()) return;
    const means = routing.meanShares(0, routing.nTokens, this.prefs.effective);
    if (!means) return;
    const best = means.indexOf(Math.max(...means));
    this.part("status").textContent =
      `Finished with ${routing.nTokens} tokens; ${header.adapters[best]} carries ${percent(means[best])} of the mass.`;
  }
}

const views = new WeakMap();

/** Called by Streamlit with every new message and every change of the theme. */
export default function (component) {
  const { data, parentElement } = component;
  const root = parentElement.querySelector('[data-part="root"]');
  if (!data || !root) return;
  if (!views.has(root)) views.set(root, new View(root));
  const view = views.get(root);
  view.update(data);
  return () => {
    view.destroy();
    views.delete(root);
  };
}
