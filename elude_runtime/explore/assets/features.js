/** The features of an explanation and those of the user's choice: each with its heat, its share, and a slider. */

const { el, format, pictures, charts, hash } = window.Elude;
const { written } = window.Elude.features;
export const [LEAST, MOST, STEP] = [-2, 3, 0.1];

/**
 * @typedef {Object} Shown a feature as the list shows it
 * @property {string} feature
 * @property {string} layer
 * @property {string | null} label
 * @property {number | null} attribution  null where it is not among the top ones
 * @property {number | null} activation
 * @property {number | null} token
 * @property {{values: number[], grid: [number, number], largest: number} | null} heat
 * @property {Face} [face]
 */

/**
 * @typedef {Object} Face what the catalogue knows of a feature
 * @property {string | null} label
 * @property {boolean} automatic  nobody wrote it
 * @property {{positive: Exemplar[], negative: Exemplar[]}} ends
 *
 * @typedef {{number: number, name: string, aspect: number, file: string | null, thumbnail: string | null, token: number,
 *   activation: number}} Exemplar
 */

const FACES = 4; // exemplars beside a feature

/** The features of a reply's first explanation, by layer. @returns {Array<{layer: object, features: Shown[]}>} */
export function groupsOf(reply, layers) {
  return (reply.explanations?.[0]?.layers ?? []).map((found) => {
    const layer = layers.find((one) => one.name === found.layer);
    const features = found.features.map((f) => ({ ...f, layer: found.layer, heat: heatOf(f.heatmap?.values) }));
    return { layer: { ...layer, ...found, features: undefined }, features };
  });
}

/** @param {number[][] | null | undefined} rows */
function heatOf(rows) {
  if (!rows) return null;
  const values = rows.flat();
  return { values, grid: [rows.length, rows[0].length], largest: Math.max(...values.map(Math.abs)) };
}

/** The features that the user added, from the reply's activations at every token. @returns {Shown[]} */
export function addedOf(reply, layers) {
  return (reply.activations ?? []).map((found) => {
    const layer = layers.find((one) => found.feature.startsWith(`${one.name}/`));
    const first = isPrefix(found.feature, layer) ? 0 : layer.prefix;
    const peak = found.values.reduce(
      (best, value, i) => (Math.abs(value) > Math.abs(found.values[best]) ? i : best),
      0,
    );
    const onGrid = layer.grid && first === layer.prefix && found.values.length === layer.grid[0] * layer.grid[1];
    const heat = onGrid ? { values: found.values, grid: layer.grid, largest: Math.abs(found.values[peak]) } : null;
    const facts = { feature: found.feature, layer: layer.name, label: found.label, heat };
    return { ...facts, attribution: null, activation: found.values[peak], token: first + peak };
  });
}

/** Whether a feature lives on class and register tokens: `LAYER/C4`, `LAYER/17/c3`. */
export function isPrefix(feature, layer) {
  return layer.prefix > 0 && /\/[Cc](\d+|rest)$/.test(feature);
}

/** Whether edits that are kept to a scope can act on a feature: each lives on tokens of one type. */
export function fits(feature, scope, layers) {
  const layer = layers.find((one) => feature.startsWith(`${one.name}/`));
  if (!layer || scope.kind === "all" || (scope.kind === "box" && !scope.box)) return true;
  const prefix = isPrefix(feature, layer);
  return scope.kind === "cls" ? prefix : !prefix && (scope.kind === "patches" || layer.grid !== null);
}

export class Features {
  /**
   * @param {HTMLElement} place
   * @param {Object} listeners
   * @param {(feature: string, factor: number) => void} listeners.onSteer
   * @param {(heat: Shown["heat"], name: string, prefix: boolean) => void} listeners.onLook
   *   a feature is pointed at, or none any more; prefix: it lives on class and register tokens
   * @param {(feature: string) => void} listeners.onRemove  a feature of the user's choice is taken off the list
   */
  constructor(place, { onSteer, onLook, onRemove }) {
    Object.assign(this, { place, onSteer, onLook, onRemove });
    this.rows = new Map(); // feature -> its row
    this.factors = new Map();
  }

  /**
   * @param {{added: Shown[], groups: ReturnType<typeof groupsOf>, view: {thumb: string, aspect: number},
   *   layers: object[], factors: Map<string, number>, value: number | null}} content
   */
  show({ added, groups, view, layers, factors, value }) {
    const focused = document.activeElement?.closest?.("[data-feature]")?.dataset.feature;
    this.rows.clear();
    this.factors = factors;
    const listed = new Set(groups.flatMap((group) => group.features.map((f) => f.feature)));
    const own = added.filter((f) => !listed.has(f.feature));
    const sections = groups.map(({ layer, features }) => {
      const largest = Math.max(0, ...features.map((f) => Math.abs(f.attribution)));
      return el(
        "section",
        { class: "layer", "aria-label": `Features of ${layer.name}` },
        el(
          "header",
          null,
          el("h3", { class: "mono" }, layer.name),
          el("p", { class: "small faint" }, facts(layer, value)),
        ),
        features.length
          ? el(
              "ul",
              { class: "plain-list feature-list" },
              features.map((f) => this.#row(f, layer, view, largest, false)),
            )
          : el("p", { class: "faint" }, "No feature of this layer stands out."),
      );
    });
    if (own.length) {
      const rows = own.map((f) =>
        this.#row(
          f,
          layers.find((one) => one.name === f.layer),
          view,
          0,
          true,
        ),
      );
      sections.unshift(
        el(
          "section",
          { class: "layer", "aria-label": "Features that you added" },
          el("header", null, el("h3", null, "Added by you")),
          el("ul", { class: "plain-list feature-list" }, rows),
        ),
      );
    }
    this.place.replaceChildren(...sections);
    this.rows.get(focused)?.querySelector("input")?.focus();
  }

  /** Put the sliders where the factors are. @param {Map<string, number>} factors */
  update(factors) {
    this.factors = factors;
    for (const [feature, row] of this.rows) setFactor(row, factors.get(feature) ?? 1);
  }

  /** Bring a feature into view, its slider focused. */
  reveal(feature) {
    const row = this.rows.get(feature);
    row?.scrollIntoView({ block: "center" });
    row?.querySelector('input[type="range"]').focus({ preventScroll: true });
  }

  #row(shown, layer, view, largest, removable) {
    const { feature, heat } = shown;
    const short = feature.slice(layer.name.length + 1);
    const label = shown.face?.label || shown.label;
    const name = label || short;
    const others = faces(shown, layer);
    const picture = heat
      ? pictures.picture(view, {
          layer: { grid: heat.grid, prefix: layer.prefix },
          token: shown.token,
          mode: "heat",
          ...heat,
          alt: `Where ${name} is active`,
        })
      : el(
          "div",
          { class: "nowhere" },
          others ?? el("span", null, isPrefix(feature, layer) ? "class token" : "no place in the image"),
        );
    const slider = el("input", {
      type: "range",
      min: LEAST,
      max: MOST,
      step: STEP,
      value: 1,
      "aria-label": `Factor of ${name}`,
      oninput: (event) => this.onSteer(feature, Number(event.target.value)),
      ondblclick: () => this.onSteer(feature, 1),
    });
    const row = el(
      "li",
      { class: "feature", "data-feature": feature },
      picture,
      el(
        "div",
        { class: "about" },
        el(
          "div",
          { class: "title" },
          el(
            "a",
            { class: label ? "" : "mono", href: `feature.html${hash(feature)}`, title: `${feature}: its page` },
            label ? written(label, Boolean(shown.face?.automatic)) : short,
          ),
          label && el("span", { class: "mono faint small" }, short),
          removable &&
            el(
              "button",
              { type: "button", class: "button link small remove", onclick: () => this.onRemove(feature) },
              "remove",
            ),
        ),
        shown.attribution !== null &&
          el(
            "div",
            { class: "share" },
            charts.bar(shown.attribution, largest, true),
            el("span", { class: `number ${sign(shown.attribution)}` }, format.signed(shown.attribution)),
          ),
        el("p", { class: "small faint number" }, where(shown, layer)),
        heat && others,
      ),
      el(
        "div",
        { class: "steer" },
        el(
          "button",
          {
            type: "button",
            class: "button small ablate",
            "aria-pressed": "false",
            onclick: () => this.onSteer(feature, (this.factors.get(feature) ?? 1) === 0 ? 1 : 0),
          },
          "Ablate",
        ),
        el("span", { class: "slide" }, el("i", { "aria-hidden": "true" }), slider),
        el("output", { class: "factor number" }),
        el(
          "button",
          {
            type: "button",
            class: "button link small reset",
            title: "As it is",
            onclick: () => this.onSteer(feature, 1),
          },
          "reset",
        ),
      ),
    );
    const look = () => this.onLook(heat, name, isPrefix(feature, layer));
    row.addEventListener("pointerenter", look);
    row.addEventListener("focusin", look);
    row.addEventListener("pointerleave", () => row.contains(document.activeElement) || this.onLook(null, "", false));
    row.addEventListener("focusout", () => this.onLook(null, "", false));
    this.rows.set(feature, row);
    setFactor(row, this.factors.get(feature) ?? 1);
    return row;
  }
}

/** Where else the feature is as it is here: exemplars of the end that its activation points to. */
function faces(shown, layer) {
  const end = shown.activation < 0 ? "negative" : "positive";
  const found = (shown.face?.ends[end] ?? []).filter((one) => one.thumbnail).slice(0, FACES);
  if (!found.length) return null;
  const pictured = found.map((one) =>
    pictures.picture(
      { thumb: `api/samples/${one.number}`, aspect: one.aspect },
      { layer, token: one.token, alt: one.name },
    ),
  );
  return el("div", { class: "faces", title: `Images where it is most ${end}` }, pictured);
}

function setFactor(row, factor) {
  const slider = row.querySelector('input[type="range"]');
  if (Number(slider.value) !== factor) slider.value = String(factor);
  slider.setAttribute(
    "aria-valuetext",
    factor === 0 ? "ablated" : factor === 1 ? "as it is" : `times ${format.number(factor)}`,
  );
  const [low, high] = [Math.min(1, factor), Math.max(1, factor)].map((value) => (value - LEAST) / (MOST - LEAST));
  const way = row.querySelector(".slide i").style; // between the middle of the thumb at either end
  way.left = `calc(0.55rem + (100% - 1.1rem) * ${low})`;
  way.width = `calc((100% - 1.1rem) * ${high - low})`;
  row.querySelector(".factor").textContent = factor === 0 ? "ablated" : `× ${factor.toFixed(1).replace("-", "\u2212")}`;
  row.querySelector(".ablate").setAttribute("aria-pressed", String(factor === 0));
  row.classList.toggle("changed", factor !== 1);
}

function facts(layer, value) {
  const said = [
    `${layer.method.replaceAll("_", " ")}: ${format.signed(value - layer.baseline)} to explain, from a baseline of ${format.number(layer.baseline)}`,
  ];
  if (layer.completeness_error !== null) said.push(`completeness error ${format.signed(layer.completeness_error, 2)}`);
  return said.join("; ");
}

function where(shown, layer) {
  const at = shown.token === null ? null : pictures.place(layer, shown.token);
  const prefix = layer.prefix === 1 ? "on the class token" : `on prefix token ${shown.token}`;
  const place = at
    ? `at row ${at[0] + 1}, column ${at[1] + 1}`
    : shown.token < layer.prefix
      ? prefix
      : `at token ${shown.token}`;
  return `activation ${format.signed(shown.activation)} ${place}`;
}

function sign(value) {
  return value > 0 ? "positive" : value < 0 ? "negative" : "";
}
