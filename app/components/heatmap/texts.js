// The prompt and the responses as running text: one span per token, text set as text.

const FINISH = {
  stop: "ended by itself",
  length: "token limit reached",
  cancelled: "stopped",
  error: "failed",
};

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

/**
 * The text cards of a run. Grows in place: spans that stand are never rebuilt, so a selection or
 * a hover survives the next token.
 */
class Texts {
  constructor(host, onHover) {
    this.host = host;
    this.cards = [];
    this.runId = null;
    host.addEventListener("pointerover", (event) => {
      const span = event.target.closest?.("[data-t]");
      if (span) onHover({ t: Number(span.dataset.t), arm: Number(span.dataset.arm) }, span);
    });
    host.addEventListener("pointerleave", () => onHover(null, null));
  }

  update(header) {
    if (this.runId !== header.run_id || this.cards.length !== header.arms.length) {
      this.build(header);
    }
    header.arms.forEach((arm, index) => this.grow(arm, index, header));
    this.prompt.title.textContent = `Prompt · ${header.arms[this.promptArm].n_prompt} tokens`;
  }

  build(header) {
    this.runId = header.run_id;
    this.promptArm = header.routed_arm ?? 0;
    this.host.replaceChildren();
    this.prompt = this.card("prompt");
    this.host.append(this.prompt.element);
    const row = make("div", "arms");
    this.host.append(row);
    this.cards = header.arms.map((arm) => {
      const card = this.card("arm");
      card.title.textContent = arm.title;
      card.count = 0;
      row.append(card.element);
      return card;
    });
    this.prompt.count = 0;
  }

  card(kind) {
    const element = make("article", `card ${kind}`);
    const head = make("header", "");
    const title = make("h4", "");
    const facts = make("span", "facts");
    head.append(title, facts);
    const body = make("div", "body");
    // Scrolls, so the keyboard must reach it.
    body.tabIndex = 0;
    element.append(head, body);
    return { element, title, facts, body, spans: new Map() };
  }

  grow(arm, index, header) {
    const card = this.cards[index];
    const follow = card.body.scrollHeight - card.body.scrollTop - card.body.clientHeight < 40;
    const total = arm.first + arm.pieces.length;
    for (let t = arm.first + (card.read ?? 0); t < total; t++) {
      const target = t < arm.n_prompt ? this.prompt : card;
      const span = make("span", "token", arm.pieces[t - arm.first]);
      if (/^<\|.*\|>$/.test(span.textContent)) span.classList.add("special");
      span.dataset.t = t;
      span.dataset.arm = index;
      target.spans.set(t, span);
      target.body.append(span);
    }
    card.read = arm.pieces.length;
    const n = total - arm.n_prompt;
    card.element.classList.toggle("live", header.live && !arm.finish_reason);
    card.facts.textContent = this.facts(arm, n, header);
    const difference = arm.first_difference;
    if (difference !== null && difference !== undefined) {
      card.spans.get(arm.n_prompt + difference)?.classList.add("differs");
    }
    if (follow && header.live) card.body.scrollTop = card.body.scrollHeight;
  }

  facts(arm, n, header) {
    const facts = [`${n} tokens`];
    if (arm.tokens_per_second) facts.push(`${arm.tokens_per_second.toFixed(1)} tokens/s`);
    if (arm.finish_reason === "time") {
      facts.push(`stopped after ${arm.seconds.toFixed(0)} s (time limit)`);
    } else if (arm.finish_reason) {
      facts.push(FINISH[arm.finish_reason] ?? arm.finish_reason);
    }
    if (arm.first_difference !== null && arm.first_difference !== undefined) {
      facts.push(`first difference at token ${arm.first_difference + 1}`);
    }
    const routed = header.arms[header.routed_arm];
    const compared = routed && routed !== arm && routed.finish_reason && arm.finish_reason;
    if (compared && arm.first_difference === null) facts.push("same as routed");
    return facts.join(" · ");
  }

  /** Underlines every routed token with the colour of the adapter that leads at it. */
  tint(routing, theme, effective, on) {
    if (routing.header.routed_arm === null) return;
    const card = this.cards[routing.header.routed_arm];
    const uniform = 1 / routing.nAdapters;
    for (const spans of [this.prompt.spans, card.spans]) {
      for (const [t, span] of spans) {
        // Lines under spaces alone would look like blanks to fill in.
        const drawn = on && t < routing.nTokens && span.textContent.trim() !== "";
        const k = drawn ? routing.leader(t, effective) : -1;
        let tint = "transparent";
        if (k >= 0) {
          const lead = (routing.shares(t, effective)[k] - uniform) / (1 - uniform || 1);
          tint = rgba(theme.adapters[k], (0.25 + 0.75 * Math.min(1, lead)).toFixed(2));
        }
        if (span.tint === tint) continue;
        span.tint = tint;
        span.style.setProperty("--tint", tint);
      }
    }
  }

  /** Marks the token at t in every text; returns the span of `arm`. */
  mark(t, arm) {
    for (const span of this.marked ?? []) span.classList.remove("on");
    this.marked = [];
    if (t === null) return null;
    for (const card of [this.prompt, ...this.cards]) {
      const span = card?.spans.get(t);
      if (span) {
        span.classList.add("on");
        this.marked.push(span);
      }
    }
    return this.prompt?.spans.get(t) ?? this.cards[arm]?.spans.get(t) ?? null;
  }

  /** Scrolls a card, never the page, so that the token at t shows. */
  reveal(t, arm) {
    for (const card of [this.prompt, this.cards[arm]]) {
      const span = card?.spans.get(t);
      if (!span) continue;
      const top = span.offsetTop - card.body.offsetTop;
      if (top < card.body.scrollTop || top + 24 > card.body.scrollTop + card.body.clientHeight) {
        card.body.scrollTop = top - card.body.clientHeight / 2;
      }
    }
  }
}
