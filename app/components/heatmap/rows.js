// Which module stands on which row of the picture.

const ROW_ORDERS = {
  block: "by block",
  kind: "by module type",
};

/**
 * Returns `{rows, groups, height}`: rows from top to bottom with module index `l`, `y` and `h`;
 * groups (blocks or module types) with a label and their rows [from, to).
 */
function layoutRows(header, nRows, order) {
  if (nRows === 1) {
    const rows = [{ l: 0, y: 0, h: 28 }];
    const label = header.modules.name.length > 1 ? "all modules" : header.modules.kind[0];
    return { rows, groups: [{ label, from: 0, to: 1, y: 0, h: 28 }], height: 28, rowHeight: 28 };
  }
  const rowHeight = Math.max(3, Math.min(16, Math.floor(560 / nRows)));
  const modules = Array.from({ length: nRows }, (_, l) => l);
  const keys = order === "kind" ? header.modules.kind : header.modules.block;
  const members = new Map();
  for (const l of modules) {
    if (!members.has(keys[l])) members.set(keys[l], []);
    members.get(keys[l]).push(l);
  }
  const gap = members.size > 1 && members.size < nRows ? (order === "kind" ? 5 : 1) : 0;
  const rows = [];
  const groups = [];
  let y = 0;
  for (const [key, list] of members) {
    const from = rows.length;
    const top = y;
    for (const l of list) {
      rows.push({ l, y, h: rowHeight });
      y += rowHeight;
    }
    const label = order === "kind" ? String(key) : key < 0 ? "other" : `block ${key}`;
    groups.push({ label, from, to: rows.length, y: top, h: y - top });
    y += gap;
  }
  return { rows, groups, height: y - gap, rowHeight };
}

/** Returns the groups whose label has room: every n-th, at least `space` pixels apart. */
function labelledGroups(groups, space) {
  const picked = [];
  let free = -Infinity;
  for (const group of groups) {
    const middle = group.y + group.h / 2;
    if (middle - space / 2 >= free) {
      picked.push(group);
      free = middle + space / 2;
    }
  }
  return picked;
}

/** Returns the row index at height y, or -1 above, the last one below. */
function rowAt(rows, y) {
  if (y < 0) return -1;
  let low = 0;
  let high = rows.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (rows[middle].y <= y) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** A module's name for people: "block 12 · q_proj". */
function moduleTitle(header, l, nRows) {
  if (nRows === 1) {
    const n = header.modules.name.length;
    return n > 1 ? `all ${n} modules (one mixture for all)` : header.modules.name[0];
  }
  const block = header.modules.block[l];
  return block < 0 ? header.modules.name[l] : `block ${block} · ${header.modules.kind[l]}`;
}
