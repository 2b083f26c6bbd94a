/** The page of one feature, `feature.html#LAYER/P17`: a concept, a sub-unit, or a neuron (`LAYER/y17`). */
(function () {
  "use strict";
  const { el, format, fromHash, hash, list, page, pictures, section, sectionHead, state } = Elude;
  const parts = Elude.features;
  const NEURON = /^(.+)\/y(\d+)(c?)$/;
  const MIXED =
    "A neuron answers to several things at once. Its sub-units add up to it again, and each joins the concept it acts with. A mark on a picture of the neuron names the sub-unit that has the same image among its strongest.";

  /** The exemplars of both ends side by side, and the rows of others below. */
  function ends(shown) {
    const half = (end, title) => {
      const top = shown.of("top", end);
      return el(
        "div",
        { class: end > 0 ? "end positive-end" : "end negative-end" },
        el("h3", null, title),
        top.length ? shown.row(top) : el("p", { class: "state slim" }, "No image goes beyond the mean at this end."),
      );
    };
    const heatOnly = { "data-heat-only": true, hidden: shown.view !== "heat" };
    return el(
      "section",
      null,
      sectionHead(
        "Exemplars",
        "The images with the strongest activation at each end, one token of each.",
        el(
          "div",
          { class: "row" },
          shown.largest > 0 && el("span", heatOnly, pictures.scale(shown.largest)),
          shown.control(),
        ),
      ),
      el("div", { class: "ends-side" }, half(1, "Positive end"), half(-1, "Negative end")),
    );
  }

  function others(shown) {
    const spectrum = shown.of("quantile").sort((a, b) => a.activation - b.activation);
    const rows = [
      [spectrum, "Across its range", "Images spread over the calibration's quantiles, from one end to the other."],
      [shown.of("random"), "Random images", "The same for every feature: what it does when nothing is chosen for it."],
      [
        shown.of("near_miss", 1),
        "Near misses at the positive end",
        "Just below the strongest; of another class, where the label names any.",
      ],
      [shown.of("near_miss", -1), "Near misses at the negative end", "The same at the other end."],
    ].filter(([some]) => some.length);
    if (!rows.length) return null;
    const row = ([some, title, note]) =>
      el("div", null, el("h3", null, title), el("p", { class: "soft small" }, note), shown.row(some));
    return section("Beside the strongest", "", el("div", { class: "rows" }, rows.map(row)));
  }

  function classes(features, whole) {
    const effects = [...(whole.raises || []), ...(whole.lowers || [])].sort((a, b) => b[1] - a[1]);
    if (!effects.length) return null;
    const rows = effects.map(([index, effect]) => ({
      name: el("a", { href: "class.html" + hash(String(index)), dir: "auto" }, features.className(index)),
      value: effect,
    }));
    return section(
      "Classes it raises and lowers",
      "Mean change of the logit, against the mean of all, when the feature rises by one standard deviation on all its tokens. Its negative end does the opposite.",
      el("div", { class: "card padded" }, Elude.charts.bars(rows, { signed: true })),
    );
  }

  function members(features, row) {
    const rows = features.members(row).filter((one) => features.isLive(one));
    if (!rows.length) return null;
    const neurons = new Set(rows.map((one) => features.neuron(one))).size;
    return section(
      "What it is made of",
      `${format.count(rows.length)} sub-units of ${format.count(neurons)} neurons, largest share first. What they write into the layer's output, added up, is what this concept writes. Those that fall as it rises have their ends the other way round.`,
      list(rows, (one) => parts.card(features, one), "grid"),
    );
  }

  async function inputs(features, row, whole) {
    if (!whole.inputs?.length) return null;
    const place = features.data.layer[row];
    const first = features.layers[place].exemplars.inputs ? await Elude.load(`x-${place}`) : {};
    const suffix = features.tokens(row) === "cls" ? "c" : "";
    const largest = Math.max(...whole.inputs.map(([, share]) => Math.abs(share)));
    const make = ([channel, share]) => {
      const flat = first[`x${channel}${suffix}`] || first[`x${channel}`] || [];
      const pictured = [];
      for (let i = 0; i < flat.length; i += 2) {
        const image = features.images[flat[i]];
        pictured.push(pictures.picture(image, { layer: features.layer(row), token: flat[i + 1], alt: image.name }));
      }
      return el(
        "div",
        { class: "card padded input" },
        el(
          "span",
          { class: "row spread" },
          el("span", { class: "mono" }, `input ${channel}`),
          el("span", { class: "number" }, format.percent(share)),
        ),
        Elude.charts.bar(share, largest),
        pictured.length
          ? el("span", { class: "strip" }, pictured)
          : el("span", { class: "faint small" }, "no exemplars"),
      );
    };
    return section(
      "What it is made of",
      "The inputs of the layer that it reads, by their share of its variance, each with the images that drive it most.",
      list(whole.inputs, make, "grid narrow"),
    );
  }

  /** The neuron of a sub-unit; of a concept those of its members, the largest first, to choose from. */
  function taken(features, row) {
    const rows = features.isConcept(row) ? features.members(row).filter((one) => features.isLive(one)) : [row];
    const neurons = [...new Set(rows.map((one) => features.neuron(one)))];
    if (!neurons.length) return null;
    const place = el("div");
    const which = { layer: features.data.layer[row], tokens: features.tokens(row), current: row };
    const show = async (neuron) => place.replaceChildren(await Elude.split(features, { ...which, neuron }));
    const choices = neurons.map((neuron) => el("option", { value: neuron }, `y${neuron}`));
    const choose = el("select", { onchange: (event) => show(Number(event.target.value)) }, choices);
    show(neurons[0]);
    const title = features.isConcept(row) ? "One of its neurons, taken apart" : "The neuron that it is a part of";
    return el(
      "section",
      null,
      sectionHead(title, MIXED, neurons.length > 1 && el("label", { class: "labelled controls" }, "Neuron", choose)),
      place,
    );
  }

  /** Features that act alike, or oppositely: each with the end that goes along with this one's stronger end. */
  function near(features, row, whole) {
    if (!whole.duplicates?.length) return null;
    const line = ([other, r]) =>
      parts.line(features, other, { end: features.lead(row) * (r < 0 ? -1 : 1), value: `r ${format.number(r, 2)}` });
    return section(
      "Nearest others",
      "Correlation of the activations over the calibration tokens; from .95 on, of either sign, they are near-duplicates. The pictures show the end that goes along with this feature's stronger end.",
      el("div", { class: "lines" }, whole.duplicates.map(line)),
    );
  }

  function dead(features, row) {
    const why = features.isRest(row)
      ? "Rest holds what no other takes. Here it holds nothing that varies."
      : "Its activation was the same on every token of the calibration images, so no image stands for it.";
    return el("section", null, state("Nothing to see: this feature is dead.", why));
  }

  function noExemplars(features) {
    const box = features.data.catalogue
      ? state("This feature has no exemplars.", "The catalogue holds none of it.")
      : state(
          "This checkpoint has no catalogue yet.",
          "Exemplars, labels and class effects are made by:",
          `elude catalogue ${document.body.dataset.checkpoint} --images DIR`,
        );
    return el("section", null, box);
  }

  async function featurePage(features, row) {
    const whole = await features.whole(row);
    const live = features.isLive(row);
    const shown = live && whole.exemplars.length && new Elude.Exemplars(features, features.layer(row), whole.exemplars);
    return [
      parts.heading(features, row),
      el(
        "div",
        { class: "with-facts" },
        el("div", null, !live ? dead(features, row) : shown ? ends(shown) : noExemplars(features)),
        el("aside", { "aria-label": "Facts" }, parts.facts(features, row, whole)),
      ),
      ...(live
        ? [
            taken(features, row),
            classes(features, whole),
            shown && others(shown),
            features.isConcept(row) ? members(features, row) : await inputs(features, row, whole),
            near(features, row, whole),
          ]
        : []),
    ];
  }

  /** A neuron's own page: what it falls into, and its exemplars. */
  async function neuronPage(features, layer, tokens, neuron) {
    const exemplars = await features.ofNeuronItself(layer, tokens, neuron);
    return [
      parts.neuronHeading(features, layer, tokens, neuron),
      el(
        "section",
        null,
        sectionHead("What it falls into", MIXED),
        await Elude.split(features, { layer, tokens, neuron }),
      ),
      exemplars.length
        ? ends(new Elude.Exemplars(features, features.layers[layer], exemplars))
        : el("section", null, state("This catalogue holds no exemplars of neurons.", "Its sub-units have theirs.")),
    ];
  }

  function unknown(name) {
    const text = name
      ? `This checkpoint has no feature of the name ${name.slice(0, 80)}.`
      : "The address of this page names the feature that it shows, after #.";
    const box = state(text, "The gallery lists every feature that there is.");
    box.append(el("p", null, el("a", { class: "button", href: "features.html" }, "All features")));
    return [el("h1", null, "No such feature"), el("section", null, box)];
  }

  /** What the address asks for: the content of the page and its title. */
  async function content(features, name) {
    const row = features.row(name);
    if (row >= 0) return [features.title(row), await featurePage(features, row)];
    const [, layerName, number, c] = NEURON.exec(name) || [];
    const layer = features.layers.findIndex((one) => one.name === layerName && Number(number) < one.neurons);
    if (layer >= 0)
      return [`Neuron ${number}`, await neuronPage(features, layer, c ? "cls" : "patches", Number(number))];
    return ["No such feature", unknown(name)];
  }

  page(async () => {
    const features = await parts.all();
    const place = document.getElementById("feature");
    const rest = document.title;
    const show = async () => {
      const name = fromHash();
      const [title, drawn] = await content(features, name);
      if (name !== fromHash()) return; // another one was asked for meanwhile
      document.title = `${title} · ${rest}`;
      place.replaceChildren(...drawn.flat().filter(Boolean));
      Elude.ready(name || "yes");
    };
    await show();
    window.addEventListener("hashchange", () =>
      page(async () => {
        await show();
        window.scrollTo(0, 0);
        document.getElementById("main").focus({ preventScroll: true });
      }),
    );
  });
})();
