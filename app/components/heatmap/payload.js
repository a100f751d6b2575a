// Reads the messages that payload.py packs.

const PLANE_TYPES = { uint8: Uint8Array, float32: Float32Array };

/** Returns `{header, planes}`; a plane is `{data, shape}`. */
function readMessage(bytes) {
  const magic = String.fromCharCode(...bytes.subarray(0, 4));
  if (magic !== "XLH1") throw new Error("the heatmap got a message it does not know");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = view.getUint32(4, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const start = 8 + length;
  const planes = {};
  for (const { name, dtype, shape, offset } of header.arrays) {
    const Type = PLANE_TYPES[dtype];
    const count = shape.reduce((a, b) => a * b, 1);
    const from = start + offset;
    // A copy, because the message may start at an address that float32 cannot.
    const raw = bytes.slice(from, from + count * Type.BYTES_PER_ELEMENT);
    planes[name] = { data: new Type(raw.buffer, raw.byteOffset, count), shape };
  }
  return { header, planes };
}

/**
 * The routing of one message: answers what the value of a cell is, raw or effective.
 * Indices: t token, l module row, k adapter.
 */
class Routing {
  constructor({ header, planes }) {
    this.header = header;
    this.planes = planes;
    const shape = planes.scalings ? planes.scalings.shape : [0, 0, header.adapters.length];
    [this.nTokens, this.nRows, this.nAdapters] = shape;
    this.maskBytes = Math.ceil(this.nAdapters / 8);
  }

  index(t, l, k) {
    return (t * this.nRows + l) * this.nAdapters + k;
  }

  isPresent(l, k) {
    return this.planes.present.data[l * this.nAdapters + k] === 1;
  }

  isKept(t, l, k) {
    if (!this.isPresent(l, k)) return false;
    const kept = this.planes.kept;
    if (!kept) return true;
    const byte = kept.data[(t * this.nRows + l) * this.maskBytes + (k >> 3)];
    return ((byte >> (k & 7)) & 1) === 1;
  }

  /** Why an adapter is present but does not act, in a word and in words. */
  get off() {
    if (this.header.steered) return { word: "off", why: "cut by top-k or muted" };
    return { word: "cut", why: "cut by top-k" };
  }

  scaling(t, l, k) {
    const [low, high] = this.header.range;
    return low + (this.planes.scalings.data[this.index(t, l, k)] / 255) * (high - low);
  }

  effective(t, l, k) {
    if (!this.isKept(t, l, k)) return 0;
    if (this.header.effective === "derived") {
      return this.scaling(t, l, k) * this.planes.weight.data[t];
    }
    const [low, high] = this.header.effective_range;
    return low + (this.planes.effective.data[this.index(t, l, k)] / 255) * (high - low);
  }

  value(t, l, k, effective) {
    return effective ? this.effective(t, l, k) : this.scaling(t, l, k);
  }

  /** Share of mass of every adapter at token t. */
  shares(t, effective) {
    const data = this.planes[effective ? "share_effective" : "share"].data;
    return data.subarray(t * this.nAdapters, (t + 1) * this.nAdapters);
  }

  /** Effective number of adapters at token t. */
  number(t, effective) {
    return this.planes[effective ? "number_effective" : "number"].data[t];
  }

  /** The adapter with the largest share at token t, or -1 when there is no mass. */
  leader(t, effective) {
    const shares = this.shares(t, effective);
    let best = -1;
    for (let k = 0; k < shares.length; k++) {
      if (shares[k] > 0 && (best < 0 || shares[k] > shares[best])) best = k;
    }
    return best;
  }

  /** Mean share per adapter over tokens [from, to). */
  meanShares(from, to, effective) {
    const mean = new Array(this.nAdapters).fill(0);
    let n = 0;
    for (let t = from; t < Math.min(to, this.nTokens); t++) {
      n += 1;
      this.shares(t, effective).forEach((share, k) => (mean[k] += share));
    }
    return n ? mean.map((sum) => sum / n) : null;
  }

  range(effective) {
    return this.header[effective ? "effective_range" : "range"];
  }

  /** The knobs in force at token t, as text. */
  knobs(t) {
    let label = "";
    for (const [from, text] of this.header.knobs) if (from <= t) label = text;
    return label;
  }
}
