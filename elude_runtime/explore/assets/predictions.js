/** The default and the steered prediction, side by side. */

const { el, format } = window.Elude;

/**
 * @typedef {Object} Row a class with its two probabilities
 * @property {number} index
 * @property {string} label
 * @property {number | null} before  by default; null where the reply does not say
 * @property {number | null} after   steered; null where it is not steered
 */

/** Every class that a reply says something about, default ones first. @param {object} reply @returns {Map<number, Row>} */
export function rowsOf(reply) {
  const rows = new Map();
  const add = (index, label, values) => {
    const known = rows.get(index) ?? { index, label: label ?? `class ${index}`, before: null, after: null };
    rows.set(index, { ...known, ...values });
  };
  for (const p of reply.predictions) add(p.index, p.label, { before: p.probability });
  if (!reply.steered) return rows;
  for (const p of reply.steered.predictions) add(p.index, p.label, { after: p.probability });
  const sums = [logSum(reply.predictions), logSum(reply.steered.predictions)];
  for (const c of reply.steered.changes) {
    const known = rows.get(c.index);
    add(c.index, c.label, {
      before: known?.before ?? Math.exp(c.default - sums[0]),
      after: known?.after ?? Math.exp(c.steered - sums[1]),
    });
  }
  return rows;
}

/** Logarithm of the softmax's denominator, which the most probable class gives away. */
function logSum([first]) {
  return first.logit - Math.log(first.probability);
}

/** A probability with a decimal, so that a small step of a slider shows. */
function share(probability) {
  return probability > 0 && probability < 0.0005 ? "< 0.1 %" : `${(100 * probability).toFixed(1)} %`;
}

export class Predictions {
  /**
   * @param {HTMLElement} place
   * @param {(index: number) => void} onPick  a class is to be explained
   */
  constructor(place, onPick) {
    this.place = place;
    this.onPick = onPick;
    this.order = [];
    this.head = el("p", { class: "headline" });
    this.list = el("ul", { class: "classes plain-list" });
    this.foot = el("p", { class: "small faint answer-foot" });
    place.append(this.head, this.list, this.foot);
    this.items = new Map();
  }

  clear() {
    this.order = [];
    this.items.clear();
    this.list.replaceChildren();
    this.head.replaceChildren();
    this.foot.replaceChildren();
  }

  /**
   * @param {object} reply
   * @param {{target: number | null, count: number, facts: string}} view
   *   target: the class that is explained; count: classes shown of each; facts: said below
   */
  show(reply, { target, count, facts }) {
    if (!reply.predictions.length) this.#embedding(reply);
    else this.#classes(reply, target, count);
    this.foot.textContent = facts;
  }

  #classes(reply, target, count) {
    const rows = rowsOf(reply);
    const steered = Boolean(reply.steered);
    const wanted = new Set([
      ...reply.predictions.slice(0, count).map((p) => p.index),
      ...(reply.steered?.predictions.slice(0, count) ?? []).map((p) => p.index),
      ...(target !== null && rows.has(target) ? [target] : []),
    ]);
    // Rows keep their places while a slider moves: who goes leaves, who comes stands last.
    this.order = [
      ...this.order.filter((index) => wanted.has(index)),
      ...[...wanted].filter((i) => !this.order.includes(i)),
    ];
    this.place.classList.toggle("steered", steered);
    for (const [index, item] of this.items) if (!wanted.has(index)) (item.remove(), this.items.delete(index));
    for (const index of this.order) {
      const item = this.items.get(index) ?? this.#item(rows.get(index));
      this.items.set(index, item);
      if (this.list.children[this.order.indexOf(index)] !== item) this.list.append(item);
      fill(item, rows.get(index), steered, index === target);
    }
    const before = reply.predictions[0];
    const after = reply.steered?.predictions[0];
    const said = (p) => [
      el("strong", null, p.label ?? `class ${p.index}`),
      " ",
      el("span", { class: "number" }, share(p.probability)),
    ];
    this.head.replaceChildren(
      ...el(
        "p",
        null,
        after
          ? [
              el("span", { class: "was" }, said(before)),
              el("span", { class: "arrow" }, " → "),
              el("span", { class: "now" }, said(after)),
            ]
          : said(before),
      ).childNodes,
    );
  }

  #item(row) {
    return el(
      "li",
      { "data-class": row.index },
      el(
        "button",
        {
          type: "button",
          class: "button link class-name",
          title: `What carries “${row.label}”?`,
          onclick: () => this.onPick(row.index),
        },
        row.label,
      ),
      el(
        "span",
        { class: "two-bars", "aria-hidden": "true" },
        el("i", { class: "before" }),
        el("i", { class: "after" }),
      ),
      el("span", { class: "two-values number" }, el("span", { class: "before" }), el("span", { class: "after" })),
    );
  }

  #embedding(reply) {
    this.place.classList.toggle("steered", Boolean(reply.steered));
    const before = reply.embedding ?? [];
    this.head.replaceChildren(`No classes: an embedding of ${format.count(before.length)} numbers`);
    this.list.replaceChildren();
    const after = reply.steered?.embedding;
    if (!after) return;
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
    const moved = Math.sqrt(
      dot(
        before.map((v, i) => after[i] - v),
        before.map((v, i) => after[i] - v),
      ) / dot(before, before),
    );
    const cosine = dot(before, after) / Math.sqrt(dot(before, before) * dot(after, after));
    const facts = { "moved by, of its norm": format.percent(moved), "cosine to the default one": cosine.toFixed(4) };
    this.list.append(
      ...Object.entries(facts).map(([name, value]) =>
        el("li", { class: "fact" }, `${name}: `, el("strong", { class: "number" }, value)),
      ),
    );
  }
}

function fill(item, row, steered, isTarget) {
  const [first, second] = item.querySelectorAll(".two-bars i");
  const [before, after] = item.querySelectorAll(".two-values span");
  first.style.width = `${100 * (row.before ?? 0)}%`;
  second.style.width = `${100 * (steered ? (row.after ?? 0) : 0)}%`;
  before.textContent = row.before === null ? "" : share(row.before);
  after.textContent = steered && row.after !== null ? share(row.after) : "";
  item.classList.toggle("target", isTarget);
}
