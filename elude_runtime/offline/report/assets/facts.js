/** The head of a feature's page and its facts. Adds to `Elude.features`. */
(function () {
  "use strict";
  const { el, format, hash } = Elude;
  const parts = Elude.features;

  function badge(text, tone = "") {
    return el("span", { class: `badge ${tone}` }, text);
  }

  function tokenBadge(layer, tokens) {
    return badge(tokens === "cls" ? "class token" : layer.grid ? "patches" : "positions");
  }

  function path(layer, short) {
    const mono = (text) => el("span", { class: "mono" }, text);
    return el(
      "p",
      { class: "path" },
      el("a", { href: "features.html" }, "Features"),
      " / ",
      mono(layer.name),
      " / ",
      mono(short),
    );
  }

  /** Numbered features of the same layer, token type and kind, in their order. */
  function neighbours(features, row) {
    const { layer } = features.data;
    const rows = [];
    for (let i = 0; i < features.count; i++) {
      const same =
        layer[i] === layer[row] &&
        features.isConcept(i) === features.isConcept(row) &&
        features.tokens(i) === features.tokens(row);
      if (same && !features.isRest(i)) rows.push(i);
    }
    return rows;
  }

  function heading(features, row) {
    const layer = features.layer(row);
    const label = features.label(row);
    const rows = neighbours(features, row);
    const at = rows.indexOf(row);
    const turn = (to, text) =>
      at >= 0 && to in rows && el("a", { class: "button", href: features.href(rows[to]) }, text);
    const steer = "explore.html#feature=" + encodeURIComponent(features.names[row]);
    return el(
      "div",
      { class: "feature-head" },
      el(
        "div",
        null,
        path(layer, features.short(row)),
        el("h1", { class: "titled" }, label ? parts.labelled(features, row) : features.short(row)),
        el(
          "p",
          { class: "row" },
          badge(features.kind(row)),
          tokenBadge(layer, features.tokens(row)),
          label ? features.isAutomatic(row) && badge("labelled automatically", "warn") : badge("no label"),
          features.isRest(row) && badge("rest: what is in no other"),
          !features.isLive(row) && badge("dead: never varied", "bad"),
          layer.live[features.tokens(row)] === false && badge("cannot change the output", "warn"),
        ),
      ),
      el(
        "div",
        { class: "row controls" },
        document.body.dataset.explorer && el("a", { class: "button primary", href: steer }, "Steer this feature"),
        turn(at - 1, "Previous"),
        turn(at + 1, "Next"),
      ),
    );
  }

  function neuronHeading(features, place, tokens, neuron) {
    const layer = features.layers[place];
    return el(
      "div",
      { class: "feature-head" },
      el(
        "div",
        null,
        path(layer, `y${neuron}`),
        el("h1", null, `Neuron ${neuron}`),
        el("p", { class: "row" }, badge("neuron"), tokenBadge(layer, tokens)),
      ),
    );
  }

  function neuronName(features, row) {
    return `${features.layer(row).name}/y${features.neuron(row)}${features.tokens(row) === "cls" ? "c" : ""}`;
  }

  function facts(features, row, whole) {
    const { data } = features;
    const subunit = !features.isConcept(row);
    const concept = features.concept(row);
    const stability = data.stability?.[row];
    const entries = [
      ["Share", format.percent(data.share[row]), "of the variance of the layer's output"],
      ["Std", format.number(data.std[row]), "standard deviation of its activation over the calibration tokens"],
      ["Density", format.percent(data.density[row]), "share of tokens more than two standard deviations from the mean"],
      stability !== undefined &&
        stability !== null && [
          "Stability",
          format.number(stability, 2),
          "correlation with its counterpart in another rewrite",
        ],
      [
        subunit ? "Edges" : "Sub-units",
        format.count(data.size[row]),
        subunit ? "connections of the neuron that are its own" : "that it is made of",
      ],
      subunit && [
        "Neuron",
        el("a", { href: "feature.html" + hash(neuronName(features, row)) }, `y${features.neuron(row)}`),
        "that it is a part of",
      ],
      subunit &&
        concept >= 0 && [
          "Concept",
          el("a", { href: features.href(concept) }, parts.titled(features, concept)),
          features.falls(row) ? "that it joins, falling as the concept rises" : "that it joins",
        ],
    ];
    return el(
      "div",
      { class: "card padded facts-card" },
      el(
        "dl",
        { class: "facts" },
        entries
          .filter(Boolean)
          .map(([name, value, meaning]) => [el("dt", { title: meaning }, name), el("dd", null, value)]),
      ),
      el("h3", null, "Activation, 1 % to 99 % of tokens"),
      spread(whole),
    );
  }

  function spread({ quantiles: q, mean }) {
    if (q.includes(null) || q[0] === q[6]) return el("p", { class: "soft small" }, "It is the same on every token.");
    return Elude.charts.spread(q, mean);
  }

  Object.assign(parts, { heading, neuronHeading, facts });
})();
