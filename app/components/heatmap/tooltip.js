// One popover for cells, tokens and knob changes: its contents change, the box stays.

class Tooltip {
  constructor(element, frame) {
    this.element = element;
    this.frame = frame;
  }

  hide() {
    this.element.hidden = true;
  }

  /** Shows `nodes` beside the box {left, right, top, bottom} in client coordinates. */
  show(nodes, box, pinned) {
    const { element } = this;
    element.replaceChildren(...nodes);
    element.classList.toggle("pinned", pinned);
    element.hidden = false;
    const own = element.getBoundingClientRect();
    let left = box.right + 14;
    if (left + own.width > innerWidth - 8) left = box.left - own.width - 14;
    let top = (box.top + box.bottom) / 2 - own.height / 2;
    left = Math.max(8, Math.min(left, innerWidth - own.width - 8));
    top = Math.max(8, Math.min(top, innerHeight - own.height - 8));
    if (left < box.right && left + own.width > box.left) top = box.bottom + 12;
    element.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }
}

/** A token's text with whitespace made visible. */
function visibleText(text) {
  if (text === "") return "(part of a character)";
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
}

function percent(share) {
  return `${Math.round(share * 100)} %`;
}

function signed(value) {
  return value.toFixed(2).replace("-", "−");
}

/** The text of the token at t in an arm, or "". */
function pieceAt(header, arm, t) {
  const own = header.arms[arm];
  const source = t < own.n_prompt ? header.arms[header.routed_arm ?? 0] : own;
  return source.pieces[t - source.first] ?? "";
}

function tokenHead(header, t, arm) {
  const own = header.arms[arm];
  const head = make("div", "head");
  head.append(make("code", "", visibleText(pieceAt(header, arm, t))));
  const place =
    t < own.n_prompt ? `prompt token ${t + 1}` : `response token ${t - own.n_prompt + 1}`;
  head.append(make("span", "dim", place));
  return head;
}

function probabilityLine(header, t, arm) {
  const own = header.arms[arm];
  const at = t - own.n_prompt;
  const chosen = at >= 0 ? own.probability[at] : null;
  if (chosen === null || chosen === undefined) return null;
  let text = `chosen with probability ${chosen.toFixed(2)}`;
  const base = own.base_probability[at];
  if (base !== null && base !== undefined) text += `, base model ${base.toFixed(2)}`;
  return make("div", "dim", text);
}

/** The table of all adapters' values. `read(k)` returns {value, text, state}. */
function adapterTable(header, theme, chosen, read, largest) {
  const table = make("div", "values");
  header.adapters.forEach((name, k) => {
    const { value, text, state } = read(k);
    const row = make("div", `value ${state}${k === chosen ? " chosen" : ""}`);
    const swatch = make("i", "swatch");
    swatch.style.background = rgba(theme.adapters[k], 1);
    const bar = make("span", "bar");
    const fill = make("b", "");
    fill.style.width = `${Math.min(100, (Math.abs(value) / largest) * 100)}%`;
    fill.style.background = rgba(theme.adapters[k], 1);
    bar.append(fill);
    row.append(swatch, make("span", "name", name), bar, make("span", "number", text));
    table.append(row);
  });
  return table;
}

/** What the tooltip says of cell (t, l). */
function describeCell(view, t, l) {
  const { routing, theme, prefs } = view;
  const { header } = routing;
  const nodes = [tokenHead(header, t, header.routed_arm)];
  nodes.push(make("div", "where", moduleTitle(header, l, routing.nRows)));
  const read = (k) => {
    const raw = routing.scaling(t, l, k);
    const effective = routing.effective(t, l, k);
    if (!routing.isPresent(l, k)) {
      return { value: 0, text: `${signed(raw)} → absent here`, state: "off" };
    }
    if (!routing.isKept(t, l, k)) {
      const text = `${signed(raw)} → ${routing.off.word}`;
      return { value: prefs.effective ? 0 : raw, text, state: "off" };
    }
    const same = Math.abs(raw - effective) < 0.005;
    const text = same ? signed(raw) : `${signed(raw)} → ${signed(effective)}`;
    return { value: prefs.effective ? effective : raw, text, state: "" };
  };
  const [low, high] = routing.range(prefs.effective);
  nodes.push(adapterTable(header, theme, view.adapter, read, Math.max(Math.abs(low), high)));
  nodes.push(make("div", "dim", `${routing.knobs(t)}`));
  return nodes;
}

/** What the tooltip says of token t as a whole. */
function describeToken(view, t, arm) {
  const { routing, theme, prefs } = view;
  const { header } = routing;
  const nodes = [tokenHead(header, t, arm)];
  const probability = probabilityLine(header, t, arm);
  if (probability) nodes.push(probability);
  if (arm === header.routed_arm && t < routing.nTokens) {
    const shares = routing.shares(t, prefs.effective);
    nodes.push(make("div", "where", "share of mass while reading this token"));
    const read = (k) => ({ value: shares[k], text: percent(shares[k]), state: "" });
    nodes.push(adapterTable(header, theme, view.adapter, read, 1));
    const number = routing.number(t, prefs.effective);
    nodes.push(make("div", "dim", `effective number of adapters ${number.toFixed(1)}`));
    nodes.push(make("div", "dim", routing.knobs(t)));
  }
  return nodes;
}

/** The same as one sentence, for a screen reader. */
function speakCell(view, t, l) {
  const { routing, prefs } = view;
  const { header } = routing;
  const values = header.adapters.map((name, k) => {
    if (!routing.isPresent(l, k)) return `${name} absent`;
    if (!routing.isKept(t, l, k)) return `${name} ${routing.off.why}`;
    return `${name} ${signed(routing.value(t, l, k, prefs.effective))}`;
  });
  const token = visibleText(pieceAt(header, header.routed_arm, t));
  return `token ${t + 1} ${token}, ${moduleTitle(header, l, routing.nRows)}: ${values.join(", ")}`;
}
