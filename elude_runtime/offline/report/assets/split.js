/**
 * The picture of the method: a neuron with the mixed images that it answers to, the sub-units that it falls into, and
 * the concept that each of these joins. Lines are as wide as the part of the variance that they carry.
 */
(function () {
  "use strict";
  const { el, format, hash, pictures, svg, features: parts } = Elude;

  /** Sub-units that ever vary, those of one concept beside each other, the strongest concept first. */
  function ordered(features, rows) {
    const weight = (row) => features.data.std[row] ** 2;
    const live = rows.filter((row) => features.isLive(row));
    const ofConcept = new Map();
    for (const row of live)
      ofConcept.set(features.concept(row), (ofConcept.get(features.concept(row)) || 0) + weight(row));
    const total = live.reduce((sum, row) => sum + weight(row), 0) || 1;
    const key = (row) => (features.isRest(features.concept(row)) ? -1 : ofConcept.get(features.concept(row)));
    live.sort((a, b) => key(b) - key(a) || features.concept(a) - features.concept(b) || weight(b) - weight(a));
    return live.map((row) => ({ row, concept: features.concept(row), part: weight(row) / total }));
  }

  function ends(features, row) {
    return el("span", { class: "ends" }, parts.strip(features, row, 1), parts.strip(features, row, -1));
  }

  function heading(step, text, note) {
    return el(
      "div",
      { class: "split-head" },
      el("span", { class: "step" }, step),
      el("strong", null, text),
      el("span", { class: "faint" }, note),
    );
  }

  /** Of the neuron's exemplars, by end and image, the sub-unit that has the same one and the most part in it. */
  async function toldApart(features, found) {
    const told = new Map();
    for (const { row } of found) {
      for (const e of (await features.whole(row)).exemplars.filter((one) => one.role === "top")) {
        const key = `${e.end} ${e.image}`;
        if (Math.abs(e.activation) > Math.abs(told.get(key)?.activation ?? 0))
          told.set(key, { row, activation: e.activation });
      }
    }
    return told;
  }

  /** The neuron's own exemplars, both ends. */
  function neuronBox(features, { layer, tokens, neuron }, exemplars, told) {
    const name = `${features.layers[layer].name}/y${neuron}${tokens === "cls" ? "c" : ""}`;
    const box = el(
      "a",
      { class: "card split-neuron", href: "feature.html" + hash(name), "data-end": "neuron" },
      el(
        "span",
        { class: "titled" },
        el("span", { class: "label" }, `Neuron ${neuron}`),
        el("span", { class: "mono faint" }, `y${neuron}`),
      ),
    );
    if (!exemplars.length) {
      box.append(el("span", { class: "state slim" }, "This catalogue holds no exemplars of neurons; a new one may."));
      return box;
    }
    for (const end of [1, -1]) {
      const top = exemplars.filter((e) => e.end === end && e.role === "top");
      const names = top.map((e) => features.images[e.image].name).join(", ");
      const pictured = top.map((e) => {
        const part = told.get(`${e.end} ${e.image}`);
        const shown = pictures.picture(features.images[e.image], { layer: features.layers[layer], token: e.token });
        if (part)
          shown.append(el("span", { class: "mark", "data-of": part.row }, features.short(part.row).split("/").pop()));
        return shown;
      });
      const side = end > 0 ? "positive" : "negative";
      box.append(
        el("span", { class: `mosaic ${side}-end`, role: "img", "aria-label": `${side} end: ${names}` }, pictured),
      );
    }
    return box;
  }

  /** While a sub-unit is pointed at or has the focus, its marks on the neuron's pictures stand out. */
  function pointOut(root) {
    const show = (row) => {
      for (const mark of root.querySelectorAll(".mark")) {
        mark.parentElement.classList.toggle("pointed", mark.dataset.of === row);
      }
    };
    for (const kind of ["pointerover", "focusin"]) {
      root.addEventListener(kind, (event) => show(event.target.closest("[data-subunit]")?.dataset.subunit));
    }
    for (const kind of ["pointerleave", "focusout"]) root.addEventListener(kind, () => show());
  }

  function subunitBox(features, { row, concept, part }, current) {
    return el(
      "a",
      {
        class: row === current ? "card split-box current" : "card split-box",
        href: features.href(row),
        "data-subunit": row,
        "data-concept": concept,
        "data-part": part,
      },
      ends(features, row),
      el(
        "span",
        { class: "text" },
        parts.titled(features, row),
        parts.named(features, row),
        el(
          "span",
          { class: "faint number small", title: "part of the sub-units' summed variance" },
          format.percent(part),
        ),
        el("span", { class: "joins" }, features.falls(row) ? "joins, falling, " : "joins ", features.short(concept)),
      ),
    );
  }

  function conceptBox(features, row, current) {
    const rest = features.isRest(row);
    return el(
      "a",
      {
        class: row === current ? "card split-box current" : "card split-box",
        href: features.href(row),
        "data-joined": row,
      },
      rest ? el("span", { class: "state slim" }, "what joins no concept") : ends(features, row),
      el(
        "span",
        { class: "text" },
        parts.titled(features, row),
        parts.named(features, row),
        el("span", { class: "faint number small" }, `${format.count(features.data.size[row])} sub-units`),
      ),
    );
  }

  /** Curves from right edges to left edges, redrawn when the boxes move. */
  function connect(root) {
    const lines = svg("svg", { class: "split-lines", "aria-hidden": "true" });
    root.prepend(lines);
    const draw = () => {
      const frame = root.getBoundingClientRect();
      lines.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
      const at = (node, side) => {
        const box = node.getBoundingClientRect();
        return [(side === "right" ? box.right : box.left) - frame.left, box.top - frame.top + box.height / 2];
      };
      const curve = (from, to, part) => {
        const [[x0, y0], [x1, y1]] = [at(from, "right"), at(to, "left")];
        if (x1 <= x0) return null; // boxes stand below each other
        const middle = (x0 + x1) / 2;
        return svg("path", {
          d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}`,
          "stroke-width": 1.25 + 12 * part,
        });
      };
      const neuron = root.querySelector("[data-end=neuron]");
      const paths = [...root.querySelectorAll("[data-subunit]")].flatMap((box) => {
        const part = Number(box.dataset.part);
        const drawn = [
          curve(neuron, box, part),
          curve(box, root.querySelector(`[data-joined="${box.dataset.concept}"]`), part),
        ];
        if (box.classList.contains("current")) for (const path of drawn) path?.classList.add("current");
        return drawn;
      });
      lines.replaceChildren(...paths.filter(Boolean));
    };
    new ResizeObserver(draw).observe(root);
  }

  /**
   * @param {Object} features
   * @param {{layer: number, tokens: string, neuron: number, current?: number}} which  current: a row to mark
   * @returns {Promise<HTMLElement>}
   */
  async function split(features, { layer, tokens, neuron, current = -1 }) {
    const rows = features.ofNeuron(layer, tokens, neuron);
    const found = ordered(features, rows);
    if (!found.length) return Elude.state(`Neuron ${neuron} never varied.`, "It falls into nothing that can be shown.");
    const exemplars = await features.ofNeuronItself(layer, tokens, neuron);
    const told = exemplars.length ? await toldApart(features, found) : new Map();
    const concepts = [...new Set(found.map((one) => one.concept))];
    const root = el(
      "div",
      {
        class: "split",
        role: "group",
        "aria-label": `Neuron ${neuron}, its ${found.length} sub-units and the concepts they join`,
      },
      heading("1", "One neuron", "answers to a mixture"),
      el("div", { class: "split-column" }, neuronBox(features, { layer, tokens, neuron }, exemplars, told)),
      heading("2", found.length === 1 ? "One sub-unit" : `${found.length} sub-units`, "add up to the neuron"),
      el(
        "div",
        { class: "split-column" },
        found.map((one) => subunitBox(features, one, current)),
      ),
      heading("3", concepts.length === 1 ? "One concept" : `${concepts.length} concepts`, "each sub-unit joins one"),
      el(
        "div",
        { class: "split-column" },
        concepts.map((row) => conceptBox(features, row, current)),
      ),
    );
    connect(root);
    pointOut(root);
    return root;
  }

  Elude.split = split;
})();
