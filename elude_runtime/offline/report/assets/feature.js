/** The page of one feature, `feature.html#LAYER/P17`: a concept, a sub-unit, or a neuron (`LAYER/y17`). */
(function () {
  "use strict";
  const { el, format, fromHash, hash, page, pictures, state } = Elude;
  const parts = Elude.features;
  const SHOWN = 12; // rows of a list before "show all"

  function section(title, note, ...content) {
    return el("section", null, el("div", { class: "section-head" }, el("h2", null, title), note && el("p", null, note)), ...content);
  }

  /** A list of which the rest is shown on request. */
  function list(items, make, kind = "lines") {
    const box = el("div", { class: kind }, items.slice(0, SHOWN).map(make));
    if (items.length <= SHOWN) return box;
    const more = el(
      "button",
      { class: "button", type: "button", onclick: () => { more.remove(); box.append(...items.slice(SHOWN).map(make)); } }, // prettier-ignore
      `Show all ${format.count(items.length)}`,
    );
    return el("div", null, box, el("p", null, more));
  }

  function heading(features, row) {
    const label = features.label(row);
    const dead = !features.isLive(row);
    const layer = features.layer(row);
    const neuron = features.neuron(row);
    const rows = features.data.layer.map((l, i) => i).filter(
      (i) => features.data.layer[i] === features.data.layer[row] && features.isConcept(i) === features.isConcept(row) &&
        features.tokens(i) === features.tokens(row) && !features.isRest(i),
    ); // prettier-ignore
    const at = rows.indexOf(row);
    const turn = (to, text) => (rows[to] === undefined || at < 0 ? null : el("a", { class: "button", href: features.href(rows[to]) }, text));
    return el(
      "div",
      { class: "feature-head" },
      el(
        "div",
        null,
        el("p", { class: "path" }, el("a", { href: "features.html" }, "Features"), " / ", el("span", { class: "mono" }, layer.name), " / ", el("span", { class: "mono" }, features.short(row))),
        el("h1", { dir: "auto" }, label || features.short(row)),
        el(
          "p",
          { class: "row" },
          el("span", { class: "badge" }, features.kind(row)),
          el("span", { class: "badge" }, features.tokens(row) === "cls" ? "class token" : layer.grid ? "patches" : "positions"),
          label ? features.isAutomatic(row) && el("span", { class: "badge warn" }, "label made automatically") : el("span", { class: "badge" }, "no label"),
          dead && el("span", { class: "badge bad" }, "dead: never varied"),
          features.isRest(row) && el("span", { class: "badge" }, "rest: what is in no other"),
          layer.live[features.tokens(row)] === false && el("span", { class: "badge warn" }, "cannot change the output"),
        ),
      ),
      el(
        "div",
        { class: "row controls" },
        neuron !== null && el("a", { class: "button", href: features.href(features.concept(row)) }, "Its concept"),
        document.body.dataset.explorer && el("a", { class: "button primary", href: "explore.html#feature=" + encodeURIComponent(features.names[row]) }, "Steer this feature"),
        turn(at - 1, "Previous"),
        turn(at + 1, "Next"),
      ),
    );
  }

  function facts(features, row, whole) {
    const { data } = features;
    const concept = features.concept(row);
    const entry = (name, value, title) => value !== null && [el("dt", { title }, name), el("dd", null, value)];
    return el(
      "div",
      { class: "card padded facts-card" },
      el(
        "dl",
        { class: "facts" },
        entry("Share", format.percent(data.share[row]), "of the variance of the layer's output"),
        entry("Std", format.number(data.std[row]), "of its activation over the calibration tokens"),
        entry("Density", format.percent(data.density[row]), "tokens more than two standard deviations from the mean"),
        entry("Stability", data.stability && data.stability[row] !== null ? format.number(data.stability[row], 2) : null, "correlation with its counterpart in another rewrite"),
        entry(features.isConcept(row) ? "Sub-units" : "Edges", format.count(data.size[row])),
        !features.isConcept(row) && entry("Neuron", neuronLink(features, row)),
        !features.isConcept(row) && concept >= 0 && entry("Concept", el("a", { href: features.href(concept) }, features.title(concept))),
      ),
      el("h4", null, "Activation"),
      quantiles(whole.quantiles, whole.mean),
    );
  }

  function neuronLink(features, row) {
    const name = `${features.layer(row).name}/y${features.neuron(row)}${features.tokens(row) === "cls" ? "c" : ""}`;
    return el("a", { href: "feature.html" + hash(name) }, `y${features.neuron(row)}`);
  }

  /** Quantiles 1 to 99 % as nested bars around the median. */
  function quantiles(q, mean) {
    if (q.some((v) => v === null) || q[0] === q[6]) return el("p", { class: "soft small" }, "It is the same on every token.");
    return Elude.charts.spread(q, mean);
  }

  function exemplarSections(features, row, whole) {
    const shown = new Elude.Exemplars(features, features.layer(row), whole.exemplars);
    const controls = el(
      "div",
      { class: "row" },
      shown.largest > 0 && el("span", { "data-heat-only": true, hidden: shown.view !== "heat" }, pictures.scale(shown.largest)),
      shown.control(),
    );
    const half = (end, title) => {
      const top = shown.of("top", end);
      return el(
        "div",
        { class: end > 0 ? "end positive-end" : "end negative-end" },
        el("h3", null, title),
        top.length ? shown.row(top) : el("p", { class: "state slim" }, "No image goes beyond the mean at this end."),
      );
    };
    const spectrum = shown.of("quantile").sort((a, b) => a.activation - b.activation);
    const more = [
      [spectrum, "Across its range", "Images spread over the calibration's quantiles, from one end to the other."],
      [shown.of("random"), "Random images", "The same for every feature: what it does when nothing is chosen."],
      [shown.of("near_miss", 1), "Near misses, positive end", "Just not enough, or predicted as what its label does not say."],
      [shown.of("near_miss", -1), "Near misses, negative end", ""],
    ].filter(([some]) => some.length);
    return [
      el(
        "section",
        { id: "exemplars" },
        el("div", { class: "section-head" }, el("h2", null, "Exemplars"), controls, el("p", null, "Images with the strongest activation at each end, one token each.")),
        el("div", { class: "ends-side" }, half(1, "Positive end"), half(-1, "Negative end")),
      ),
      more.length > 0 &&
        section("Beside the strongest", "", el("div", { class: "rows" }, more.map(([some, title, note]) =>
          el("div", null, el("h3", null, title), note && el("p", { class: "soft small" }, note), shown.row(some)),
        ))), // prettier-ignore
    ];
  }

  function classes(features, whole) {
    if (whole.raises === null && whole.lowers === null) return null;
    const effects = [...(whole.raises || []), ...(whole.lowers || [])].sort((a, b) => b[1] - a[1]);
    if (!effects.length) return null;
    const rows = effects.map(([index, effect]) => ({
      name: el("a", { href: "class.html" + hash(String(index)), dir: "auto" }, features.className(index)),
      value: effect,
    }));
    return section(
      "Classes it raises and lowers",
      "Direct effect on the logits through what follows the layer, averaged; at its positive end. Its negative end does the opposite.",
      el("div", { class: "card padded" }, Elude.charts.bars(rows, { signed: true })),
    );
  }

  function members(features, row) {
    const rows = features.members(row).filter((one) => features.isLive(one));
    if (!rows.length) return null;
    return section(
      "What it is made of",
      `${format.count(rows.length)} sub-units of ${format.count(new Set(rows.map((r) => features.neuron(r))).size)} neurons, largest share first. What they write into the layer's output, added up, is what this concept writes.`,
      list(rows, (one) => parts.card(features, one), "grid"),
    );
  }

  async function inputs(features, row, whole) {
    if (!whole.inputs?.length) return null;
    const place = features.data.layer[row];
    const cards = features.layers[place].exemplars.inputs ? await Elude.load(`x-${place}`) : {};
    const suffix = features.tokens(row) === "cls" ? "c" : "";
    const largest = Math.max(...whole.inputs.map(([, share]) => Math.abs(share)));
    const make = ([channel, share]) => {
      const flat = cards[`x${channel}${suffix}`] || cards[`x${channel}`] || [];
      const pictured = [];
      for (let i = 0; i < flat.length; i += 2) {
        const image = features.images[flat[i]];
        pictured.push(pictures.picture(image, { layer: features.layer(row), token: flat[i + 1], alt: image.name }));
      }
      return el(
        "div",
        { class: "card padded input" },
        el("span", { class: "row spread" }, el("span", { class: "mono" }, `input ${channel}`), el("span", { class: "number" }, format.percent(share))),
        Elude.charts.bar(share, largest),
        pictured.length ? el("span", { class: "strip" }, pictured) : el("span", { class: "faint small" }, "no exemplars"),
      );
    };
    return section(
      "What it is made of",
      `The inputs of the layer that it reads, by their share of its variance, with the images that drive each most.`,
      list(whole.inputs, make, "grid narrow"),
    );
  }

  /** The neuron of a sub-unit; of a concept those of its members, the largest first, to choose from. */
  function splitSection(features, row) {
    const rows = features.isConcept(row) ? features.members(row).filter((one) => features.isLive(one)) : [row];
    if (!rows.length) return null;
    const neurons = [...new Map(rows.map((one) => [features.neuron(one), one])).keys()];
    const place = el("div", { class: "split-place" });
    const show = async (neuron) =>
      place.replaceChildren(
        await Elude.split(features, { layer: features.data.layer[row], tokens: features.tokens(row), neuron, current: row }),
      );
    const choice =
      neurons.length > 1 &&
      el(
        "label",
        { class: "labelled controls" },
        "Neuron",
        el("select", { onchange: (event) => show(Number(event.target.value)) }, neurons.map((k) => el("option", { value: k }, `y${k}`))),
      );
    show(neurons[0]);
    const title = features.isConcept(row) ? "One of its neurons, taken apart" : "The neuron that it is a part of";
    return el(
      "section",
      null,
      el(
        "div",
        { class: "section-head" },
        el("h2", null, title),
        choice,
        el("p", null, "A neuron answers to several things at once. Its sub-units add up to it again, and each joins the concept it acts with."),
      ),
      place,
    );
  }

  function near(features, row, whole) {
    if (!whole.duplicates?.length) return null;
    return section(
      "Nearest others",
      "Correlation of the activations over the calibration tokens; over .95 they are near-duplicates.",
      el("div", { class: "lines" }, whole.duplicates.map(([other, r]) => parts.line(features, other, { value: `r ${format.number(r, 2)}` }))),
    );
  }

  /** A neuron's own page: its exemplars, and what it falls into. */
  async function neuronPage(features, name, [, layerName, number, c]) {
    const layer = features.layers.findIndex((one) => one.name === layerName);
    const tokens = c ? "cls" : "patches";
    const exemplars = await features.ofNeuronItself(layer, tokens, Number(number));
    const shown = new Elude.Exemplars(features, features.layers[layer], exemplars);
    document.title = `${name} · ${document.title}`;
    const half = (end, title) => el("div", { class: end > 0 ? "end positive-end" : "end negative-end" }, el("h3", null, title), shown.row(shown.of("top", end)));
    return [
      el(
        "div",
        { class: "feature-head" },
        el(
          "div",
          null,
          el("p", { class: "path" }, el("a", { href: "features.html" }, "Features"), " / ", el("span", { class: "mono" }, layerName), " / ", el("span", { class: "mono" }, `y${number}`)),
          el("h1", null, `Neuron ${number}`),
          el("p", { class: "row" }, el("span", { class: "badge" }, "neuron"), el("span", { class: "badge" }, c ? "class token" : "patches")),
        ),
      ),
      el(
        "section",
        null,
        el("div", { class: "section-head" }, el("h2", null, "What it falls into"), el("p", null, "The neuron answers to several things at once. Its sub-units add up to it again, and each joins the concept it acts with.")),
        await Elude.split(features, { layer, tokens, neuron: Number(number) }),
      ),
      exemplars.length
        ? el("section", null, el("div", { class: "section-head" }, el("h2", null, "Its exemplars"), shown.control()), el("div", { class: "ends-side" }, half(1, "Positive end"), half(-1, "Negative end")))
        : el("section", null, state("This catalogue holds no exemplars of neurons.", "Its sub-units have theirs.")),
    ];
  }

  async function featurePage(features, row) {
    const whole = await features.whole(row);
    document.title = `${features.title(row)} · ${features.short(row)} · ${document.title}`;
    const head = heading(features, row);
    const dead = !features.isLive(row);
    if (dead) {
      const why = features.isRest(row)
        ? "Rest holds what no other takes; here it holds nothing that varies, so there is nothing to show."
        : "Its activation was the same on every token of the calibration images, so no image stands for it.";
      return [head, el("section", null, state("Nothing to see: this feature is dead.", why)), el("section", null, facts(features, row, whole))];
    }
    const exemplars = whole.exemplars.length
      ? exemplarSections(features, row, whole)
      : [el("section", null, noExemplars(features))];
    return [
      head,
      el("div", { class: "with-facts" }, el("div", null, exemplars[0]), el("aside", { "aria-label": "Facts" }, facts(features, row, whole))),
      splitSection(features, row),
      classes(features, whole),
      exemplars[1],
      features.isConcept(row) ? members(features, row) : await inputs(features, row, whole),
      near(features, row, whole),
    ];
  }

  function noExemplars(features) {
    if (features.data.catalogue) return state("This feature has no exemplars.", "No image of the catalogue goes beyond its mean.");
    const { checkpoint } = document.body.dataset;
    return state("This checkpoint has no catalogue yet.", "Exemplars, labels and class effects are made by:", `elude catalogue ${checkpoint} --images DIR`);
  }

  async function show(features, title) {
    const name = fromHash();
    document.title = title;
    const place = document.getElementById("feature");
    const neuron = /^(.+)\/y(\d+)(c?)$/.exec(name);
    const row = features.row(name);
    let content;
    if (row >= 0) content = await featurePage(features, row);
    else if (neuron && features.layers.some((one) => one.name === neuron[1])) content = await neuronPage(features, name, neuron);
    else {
      const text = name ? `This checkpoint has no feature of the name ${name.slice(0, 80)}.` : "This page shows the feature that its address names after #.";
      content = [el("h1", null, "No such feature"), state(text, "Choose one in the gallery: features.html.")];
    }
    if (name !== fromHash()) return; // another one was asked for meanwhile
    place.replaceChildren(...content.flat().filter(Boolean));
    document.documentElement.dataset.ready = name;
  }

  page(async () => {
    const features = await parts.all();
    const title = document.title;
    await show(features, title);
    window.addEventListener("hashchange", () =>
      page(async () => {
        await show(features, title);
        window.scrollTo(0, 0);
        document.getElementById("main").focus({ preventScroll: true });
      }),
    );
  });
})();
