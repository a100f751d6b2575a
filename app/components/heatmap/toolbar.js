// The controls of the view and the legend. All of it acts in the browser only.

/** A row of buttons of which one is on: arrow keys move, one tab stop. */
class Choice {
  constructor(label, options, onChange) {
    this.element = make("div", "choice");
    this.element.setAttribute("role", "radiogroup");
    this.element.setAttribute("aria-label", label);
    this.onChange = onChange;
    this.buttons = options.map(({ value, title, hint, className }) => {
      const button = make("button", className ?? "");
      button.type = "button";
      button.setAttribute("role", "radio");
      if (hint) button.title = hint;
      button.append(make("span", "label", title));
      button.addEventListener("click", () => this.pick(value));
      button.value_ = value;
      this.element.append(button);
      return button;
    });
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const on = this.buttons.findIndex((b) => b.value_ === this.value);
      const next = this.buttons[(on + step + this.buttons.length) % this.buttons.length];
      this.pick(next.value_);
      next.focus();
    });
  }

  pick(value) {
    if (value === this.value) return;
    this.show(value);
    this.onChange(value);
  }

  show(value) {
    this.value = value;
    for (const button of this.buttons) {
      const on = button.value_ === value;
      button.setAttribute("aria-checked", String(on));
      button.tabIndex = on ? 0 : -1;
    }
  }
}

class Toolbar {
  constructor(host, legend, view) {
    this.host = host;
    this.legend = legend;
    this.view = view;
    this.built = null;
  }

  update() {
    const { header } = this.view.routing;
    const signature = JSON.stringify([header.adapters, header.softmax]);
    if (this.built !== signature) this.build(header);
    this.built = signature;
    this.refresh();
  }

  build(header) {
    const { view } = this;
    const { prefs } = view;
    const change = (name) => (value) => {
      prefs[name] = value;
      view.redraw();
    };
    const chips = [
      { value: null, title: "dominant", className: "chip", hint: "The leading adapter per cell" },
      ...header.adapters.map((name, k) => ({ value: k, title: name, className: "chip" })),
    ];
    this.chips = new Choice("Adapter shown", chips, (k) => view.choose(k));
    this.chips.element.classList.add("chips");
    this.chips.buttons.forEach((button, i) => {
      const swatch = make("i", i ? "swatch" : "swatch mixed");
      button.prepend(swatch);
      if (i) button.append(make("span", "share", ""));
    });
    this.values = new Choice(
      "Values",
      [
        { value: false, title: "router", hint: "What the router says, before top-k and weight" },
        { value: true, title: "effective", hint: "What the modules multiply by" },
      ],
      change("effective"),
    );
    const scales = Object.entries(SCALES).map(([value, title]) => ({ value, title }));
    const usable = scales.filter(({ value }) => value !== "lift" || this.canLift(header));
    this.scales = new Choice("Colour scale", usable, change("scale"));
    const orders = Object.entries(ROW_ORDERS).map(([value, title]) => ({ value, title }));
    this.orders = new Choice("Row order", orders, change("order"));
    this.tint = this.toggle("underline tokens", "Underline each token in its leading adapter's colour", () => {
      prefs.tint = !prefs.tint;
      view.redraw();
    });
    const zoom = make("div", "zoom");
    zoom.append(
      this.button("−", "Narrower columns", () => view.zoom(1 / 1.5)),
      this.button("+", "Wider columns", () => view.zoom(1.5)),
    );
    const first = make("div", "line");
    first.append(this.chips.element);
    const second = make("div", "line controls");
    const field = (title, element) => {
      const box = make("div", "field");
      box.append(make("span", "caption", title), element);
      return box;
    };
    second.append(
      field("values", this.values.element),
      (this.scaleField = field("colour scale", this.scales.element)),
      (this.orderField = field("rows", this.orders.element)),
      field("columns", zoom),
      this.tint,
    );
    this.host.replaceChildren(first, second);
  }

  canLift(header) {
    return header.softmax && header.adapters.length > 1;
  }

  button(text, title, onClick) {
    const button = make("button", "tool", text);
    button.type = "button";
    button.title = title;
    button.setAttribute("aria-label", title);
    button.addEventListener("click", onClick);
    return button;
  }

  toggle(text, title, onClick) {
    const button = this.button(text, title, onClick);
    button.setAttribute("aria-label", text);
    return button;
  }

  refresh() {
    const { view } = this;
    const { routing, prefs, theme } = view;
    if (prefs.scale === "lift" && !this.canLift(routing.header)) prefs.scale = "linear";
    this.chips.show(view.adapter);
    this.values.show(prefs.effective);
    this.scales.show(prefs.scale);
    this.orders.show(prefs.order);
    this.tint.setAttribute("aria-pressed", String(prefs.tint));
    this.scaleField.hidden = view.adapter === null;
    this.orderField.hidden = routing.nRows === 1;
    const means = routing.meanShares(0, routing.nTokens, prefs.effective);
    this.chips.buttons.forEach((button, i) => {
      const swatch = button.querySelector(".swatch");
      if (i === 0) {
        const stops = theme.adapters.slice(0, routing.nAdapters).map((c) => rgba(c, 1));
        const step = 100 / stops.length;
        const bands = stops.map((c, k) => `${c} ${k * step}% ${(k + 1) * step}%`);
        swatch.style.background = `linear-gradient(90deg, ${bands.join(", ")})`;
        return;
      }
      swatch.style.background = rgba(theme.adapters[i - 1], 1);
      const share = button.querySelector(".share");
      share.textContent = means ? percent(means[i - 1]) : "";
      button.title = `${routing.header.adapters[i - 1]}: mean share of mass over all tokens so far`;
    });
    this.drawLegend();
  }

  drawLegend() {
    const { view, legend } = this;
    const { routing, theme, prefs, plot } = view;
    const items = [];
    const key = (className, text, style) => {
      const item = make("span", "key");
      const swatch = make("i", `swatch ${className}`);
      if (style) swatch.style.background = style;
      item.append(swatch, make("span", "", text));
      return item;
    };
    if (view.adapter === null) {
      const most = `${Math.round(100 / routing.nAdapters)} %`;
      routing.header.adapters.forEach((name, k) => {
        const [faint, full] = [rgba(theme.adapters[k], fade(0)), rgba(theme.adapters[k], 1)];
        items.push(key("wide", name, `linear-gradient(90deg, ${faint}, ${full})`));
      });
      items.push(make("span", "formula", `faint: leads with just over ${most} · full: has all`));
    } else {
      items.push(this.ramp(plot.scale));
      if (prefs.effective && routing.planes.kept) items.push(key("cut", routing.off.why));
      const absent = routing.planes.present.data.some((flag) => flag === 0);
      if (absent) items.push(key("absent", "adapter absent"));
      if (!routing.header.softmax) {
        items.push(make("span", "formula", "no softmax: scalings may have both signs"));
      }
    }
    if (routing.header.knob_changes.length) items.push(key("change", "knobs changed from this token"));
    legend.replaceChildren(...items);
  }

  /** The colour ramp with ticks and formula. */
  ramp(scale) {
    const box = make("div", "ramp");
    const canvas = make("canvas", "");
    [canvas.width, canvas.height] = [256, 1];
    const c = canvas.getContext("2d");
    for (let i = 0; i < 256; i++) {
      c.fillStyle = rgba(colorAt(scale.stops, i / 255), 1);
      c.fillRect(i, 0, 1, 1);
    }
    const ticks = make("div", "ticks");
    scale.ticks.forEach((value, i) => {
      const tick = make("span", "", scale.tickLabel(value, i));
      tick.style.left = `${Math.max(0, Math.min(1, scale.position(value))) * 100}%`;
      ticks.append(tick);
    });
    const bar = make("div", "bar");
    bar.append(canvas, ticks);
    const what = this.view.prefs.effective ? "effective scaling" : "router scaling";
    const formula = scale.formula === "s" ? `the ${what} s` : `${scale.formula}, s the ${what}`;
    box.append(bar, make("span", "formula", `colour: ${formula}`));
    return box;
  }
}
