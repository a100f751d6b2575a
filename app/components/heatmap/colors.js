// Values -> colours. The stops come from Python (app/colors.py); here they become lookup tables.

function hexToRgb(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

/** Any CSS colour -> [r, g, b]. */
function cssToRgb(text) {
  const value = text.trim();
  if (/^#[0-9a-f]{6}$/i.test(value)) return hexToRgb(value);
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = value;
  context.fillRect(0, 0, 1, 1);
  return Array.from(context.getImageData(0, 0, 1, 1).data.slice(0, 3));
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((v) => {
    const x = v / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function rgba([r, g, b], alpha) {
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

/** Colour at position x in [0, 1] of evenly spaced stops. */
function colorAt(stops, x) {
  const at = Math.min(1, Math.max(0, x)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(at));
  return stops[i].map((v, c) => Math.round(v + (stops[i + 1][c] - v) * (at - i)));
}

/** Little-endian RGBA word for an ImageData seen as Uint32Array. */
function word([r, g, b], alpha = 255) {
  return ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/** The page's colours and the palette of the theme that is on. */
function readTheme(element, palette) {
  const style = getComputedStyle(element);
  const read = (name, fallback) => style.getPropertyValue(name).trim() || fallback;
  const background = cssToRgb(read("--st-background-color", "#ffffff"));
  const dark = luminance(background) < 0.2;
  const chosen = palette[dark ? "dark" : "light"];
  return {
    dark,
    background,
    panel: cssToRgb(read("--st-secondary-background-color", "#f3f5f8")),
    text: cssToRgb(read("--st-text-color", "#1c2430")),
    border: cssToRgb(read("--st-border-color", "#d5dbe4")),
    font: read("--st-font", "sans-serif"),
    primary: cssToRgb(read("--st-primary-color", "#1f5fae")),
    adapters: chosen.adapters.map(hexToRgb),
    sequential: chosen.sequential.map(hexToRgb),
    diverging: chosen.diverging.map(hexToRgb),
    amber: hexToRgb(chosen.amber),
  };
}

const SCALES = { linear: "linear", sqrt: "√", lift: "lift over 1/K" };

/**
 * A colour scale: position in [0, 1] of a value, the stops, and the ticks of its legend.
 * `range` is [low, high]; low < 0 means that values have both signs.
 */
function makeScale(name, range, nAdapters, theme) {
  const [low, high] = range;
  const signed = low < 0;
  const lift = name === "lift" && !signed && nAdapters > 1;
  const root = name === "sqrt";
  const scale = {
    signed,
    stops: signed || lift ? theme.diverging : theme.sequential,
    name: lift ? "lift" : root ? "sqrt" : "linear",
  };
  if (lift) {
    const most = Math.log2(nAdapters * high);
    scale.position = (v) => (v <= 0 ? 0 : (Math.log2(v * nAdapters) / most + 1) / 2);
    scale.ticks = [1 / nAdapters / nAdapters / high, 1 / nAdapters, high];
    scale.tickLabel = (v, i) => ["≤ −" + trim(most), "0 = 1/K", "+" + trim(most)][i];
    scale.formula = `log₂(s · K), K = ${nAdapters}`;
  } else if (signed) {
    const bend = root ? Math.sqrt : (x) => x;
    scale.position = (v) => (1 + Math.sign(v) * bend(Math.min(1, Math.abs(v) / high))) / 2;
    scale.ticks = [-high, 0, high];
    scale.tickLabel = (v) => trim(v);
    scale.formula = root ? "sign(s) · √|s|" : "s";
  } else {
    scale.position = root ? (v) => Math.sqrt(Math.max(0, v) / high) : (v) => v / high;
    const ticks = [0, 1 / nAdapters, high / 2, high];
    scale.ticks = ticks.filter((v, i) => ticks.findIndex((w) => Math.abs(w - v) < 0.04) === i);
    scale.tickLabel = (v) => (nAdapters > 1 && v === 1 / nAdapters ? "1/K" : trim(v));
    scale.formula = root ? "√s" : "s";
  }
  return scale;
}

function trim(value) {
  return String(Math.round(value * 100) / 100).replace("-", "−");
}

/** 256 colour words for the codes of a plane over `range`, each value times `weight`. */
function colorTable(scale, range, weight) {
  const [low, high] = range;
  const table = new Uint32Array(256);
  for (let code = 0; code < 256; code++) {
    const value = (low + (code / 255) * (high - low)) * weight;
    table[code] = word(colorAt(scale.stops, scale.position(value)));
  }
  return table;
}

/** Diagonal hatch for cells that top-k cut; a dotted one for adapters that are absent. */
function makePattern(context, kind, theme) {
  const size = kind === "cut" ? 6 : 4;
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const c = tile.getContext("2d");
  c.fillStyle = rgba(theme.panel, 1);
  c.fillRect(0, 0, size, size);
  c.strokeStyle = c.fillStyle = rgba(theme.text, kind === "cut" ? 0.28 : 0.35);
  if (kind === "cut") {
    c.beginPath();
    for (const shift of [-size, 0, size]) {
      c.moveTo(shift - 1, size + 1);
      c.lineTo(shift + size + 1, -1);
    }
    c.lineWidth = 1;
    c.stroke();
  } else {
    c.fillRect(0, 0, 1, 1);
  }
  return context.createPattern(tile, "repeat");
}
