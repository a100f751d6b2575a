// The two summary lanes above the heatmap; same x axis.

/** Stacked share of mass per adapter. `x(t)` is a column's left edge. */
function drawShareLane(c, box, routing, theme, effective, columns, x) {
  c.fillStyle = rgba(theme.panel, 1);
  c.fillRect(x(0), box.y, x(routing.nTokens) - x(0), box.h);
  for (let t = columns.from; t < columns.to; t++) {
    const left = x(t);
    const width = x(t + 1) - left + 0.35;
    let bottom = box.y + box.h;
    routing.shares(t, effective).forEach((share, k) => {
      const height = share * box.h;
      c.fillStyle = rgba(theme.adapters[k], 1);
      c.fillRect(left, bottom - height, width, height);
      bottom -= height;
    });
  }
}

/** Effective number of adapters as a step line from 1 to K. */
function drawNumberLane(c, box, routing, theme, effective, columns, x) {
  const most = Math.max(2, routing.nAdapters);
  const y = (n) => box.y + box.h - ((Math.max(1, n) - 1) / (most - 1)) * box.h;
  c.fillStyle = rgba(theme.panel, 1);
  c.fillRect(x(0), box.y, x(routing.nTokens) - x(0), box.h);
  if (columns.to <= columns.from) return;
  c.beginPath();
  for (let t = columns.from; t < columns.to; t++) {
    const n = routing.number(t, effective);
    c.lineTo(x(t), y(n));
    c.lineTo(x(t + 1), y(n));
  }
  c.strokeStyle = rgba(theme.text, 0.85);
  c.lineWidth = 1.25;
  c.stroke();
  c.lineTo(x(columns.to), box.y + box.h);
  c.lineTo(x(columns.from), box.y + box.h);
  c.closePath();
  c.fillStyle = rgba(theme.text, 0.1);
  c.fill();
}
