/** The features of a report: facts of each by its row, and the cards that stand for it on every page. */
(function () {
  "use strict";
  const { el, format, hash, load, pictures } = Elude;
  const ROLES = ["top", "quantile", "random", "near_miss"];

  /** Every feature, by row. Column by column, since there may be a hundred thousand. */
  class Features {
    constructor(data, images) {
      this.data = data;
      this.layers = data.layers;
      this.count = data.short.length;
      this.names = data.short.map((short, row) => `${data.layers[data.layer[row]].name}/${short}`);
      this.images = images.name.map((name, i) => ({
        name, thumb: images.thumb[i], aspect: images.aspect[i], predicted: images.predicted[i],
      })); // prettier-ignore
      this.parsed = data.short.map((short) => /^(?:(\d+)\/)?([pcPC])(\d+|rest)$/.exec(short) || []);
      this.concepts = Uint8Array.from(this.parsed, ([, neuron]) => neuron === undefined);
    }

    /** The row of a feature's name; -1 where there is none. */
    row(name) {
      this.rows ??= new Map(this.names.map((known, row) => [known, row]));
      return this.rows.get(name) ?? -1;
    }
    layer(row) {
      return this.layers[this.data.layer[row]];
    }
    short(row) {
      return this.data.short[row];
    }
    isConcept(row) {
      return this.concepts[row] === 1;
    }
    kind(row) {
      return this.isConcept(row) ? "concept" : "sub-unit";
    }
    /** "patches" or "cls" */
    tokens(row) {
      return (this.parsed[row][2] || "p").toLowerCase() === "c" ? "cls" : "patches";
    }
    /** The number of a sub-unit's neuron, null for a concept. */
    neuron(row) {
      return this.isConcept(row) ? null : Number(this.parsed[row][1]);
    }
    isRest(row) {
      return this.parsed[row][3] === "rest";
    }
    label(row) {
      const { values, codes } = this.data.label;
      return values[codes[row]];
    }
    isAutomatic(row) {
      const { values, codes } = this.data.source;
      return values[codes[row]] === "automatic";
    }
    /** Whether it ever varied on the calibration images. */
    isLive(row) {
      return this.data.std[row] > 0;
    }
    /** What to call it: its label, else its name within the layer. */
    title(row) {
      return this.label(row) || this.short(row);
    }
    concept(row) {
      return this.data.concept[row];
    }
    /** Whether a sub-unit falls as its concept rises: its negative end goes with the concept's positive one. */
    falls(row) {
      return this.data.sign[row] < 0;
    }
    /** The sub-units of a concept, largest share first. */
    members(row) {
      const found = [];
      for (let i = 0; i < this.count; i++) if (this.data.concept[i] === row && i !== row) found.push(i);
      return found.sort((a, b) => this.data.share[b] - this.data.share[a]);
    }
    /** The sub-units of a neuron, in their order. */
    ofNeuron(layer, tokens, neuron) {
      const found = [];
      for (let i = 0; i < this.count; i++) {
        if (this.data.layer[i] === layer && this.neuron(i) === neuron && this.tokens(i) === tokens) found.push(i);
      }
      return found;
    }
    /** The first exemplars of one end, 1 or -1. @returns {Array<[image: number, token: number]>} */
    first(row, end) {
      const flat = this.data.cards[row][end > 0 ? 0 : 1];
      return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
    }
    /** Activation of the first exemplar of one end, in standard deviations; 0 where there is none. */
    peak(row, end) {
      return (this.data.peaks[row][end > 0 ? 0 : 1] ?? 0) / (this.data.std[row] || 1);
    }
    /** The end that reaches further. */
    lead(row) {
      return Math.abs(this.peak(row, -1)) > Math.abs(this.peak(row, 1)) ? -1 : 1;
    }
    /** Whether one end is so much weaker than the other that it says little. */
    isWeak(row, end) {
      return Math.abs(this.peak(row, end)) < Math.abs(this.peak(row, -end)) / 4;
    }
    className(index) {
      return this.data.classes?.[index] ?? `class ${index}`;
    }
    href(row) {
      return "feature.html" + hash(this.names[row]);
    }
    /** Everything about one feature. */
    async whole(row) {
      const chunk = await load(`f-${Math.floor(row / this.data.chunk)}`);
      const found = chunk[row % this.data.chunk];
      return { ...found, exemplars: found.exemplars.map(exemplar) };
    }
    /** Exemplars of a neuron; none where the catalogue has none of it. */
    async ofNeuronItself(layer, tokens, neuron) {
      if (!this.layers[layer].exemplars.neurons) return [];
      const chunk = await load(`y-${layer}-${Math.floor(neuron / this.data.chunk)}`);
      return (chunk[`y${neuron}${tokens === "cls" ? "c" : ""}`] || []).map(exemplar);
    }
  }

  /** @returns {{end: number, role: string, image: number, token: number, activation: number, heat: ?string, scale: number}} */
  function exemplar([end, role, image, token, activation, heat, scale]) {
    return { end, role: ROLES[role], image, token, activation, heat: heat || null, scale };
  }

  /** All features with their images, read once a page. @returns {Promise<Features>} */
  async function all() {
    const [data, images] = await Promise.all([load("features"), load("images")]);
    return new Features(data, images);
  }

  /** The first exemplars of one end side by side, as one picture with one description. */
  function strip(features, row, end, count = 4) {
    const first = features.first(row, end).slice(0, count);
    const names = first.map(([image]) => features.images[image].name).join(", ");
    return el(
      "span",
      {
        class: `strip ${end > 0 ? "positive" : "negative"}-end${features.isWeak(row, end) ? " weak" : ""}`, role: "img",
        "aria-label": first.length ? `${end > 0 ? "Positive" : "Negative"} end: ${names}` : "No exemplars at this end",
      }, // prettier-ignore
      first.map(([image, token]) => pictures.picture(features.images[image], { layer: features.layer(row), token })),
      Array.from({ length: count - first.length }, () => el("span", { class: "picture none" })),
    );
  }

  /**
   * A label as elements. An automatic one says what shows at each end (`zebra ↔ minivan`): each part with the end's
   * colour, and the mark that nobody wrote it.
   */
  function written(label, automatic) {
    if (!automatic) return [el("span", { class: "label", dir: "auto" }, label)];
    const [positive, negative] = label.split("↔").map((text) => text.trim());
    const part = (text, end) =>
      text &&
      el("span", { class: `label ${end}-label`, dir: "auto" }, el("span", { class: "hidden" }, `${end} end: `), text);
    const mark = el(
      "abbr",
      { class: "auto", title: "Labelled automatically, by what the model says of its exemplars" },
      "auto",
    );
    return [part(positive, "positive"), part(negative, "negative"), mark];
  }

  function labelled(features, row) {
    return written(features.label(row), features.isAutomatic(row));
  }

  /** Its label, or its name where it has none. */
  function titled(features, row) {
    const name = () => el("span", { class: "label mono" }, features.short(row));
    return el("span", { class: "titled" }, features.label(row) ? labelled(features, row) : name());
  }

  /** Its name below its label, nothing where the name is all there is. */
  function named(features, row) {
    return features.label(row) ? el("span", { class: "mono faint" }, features.short(row)) : null;
  }

  /** How far its two ends reach. */
  function reach(features, row) {
    const end = (sign) => {
      const peak = features.peak(row, sign);
      return peak !== 0 && el("span", { class: sign > 0 ? "positive" : "negative" }, `${format.signed(peak, 2)}σ`);
    };
    return el(
      "span",
      { class: "reach number", title: "activation of the first exemplar of each end, in standard deviations" },
      end(1),
      end(-1),
    );
  }

  /** What a card is called: pictures have texts of their own. */
  function spoken(features, row) {
    const share = features.isLive(row) ? `, ${format.percent(features.data.share[row])} of the variance` : ", dead";
    return `${features.kind(row)} ${features.short(row)}: ${features.label(row) || "no label"}${share}`;
  }

  /** A feature as a card: both ends, label, name, share. */
  function card(features, row) {
    const dead = !features.isLive(row);
    const share = features.data.share[row];
    const largest = (features.largestShare ??= [0, 1].map((kind) =>
      features.data.share.reduce((most, v, i) => (Number(features.isConcept(i)) === kind && v > most ? v : most), 0),
    ));
    return el(
      "a",
      { class: "card feature", href: features.href(row), "aria-label": spoken(features, row) },
      el("span", { class: "ends" }, strip(features, row, 1), strip(features, row, -1)),
      el(
        "span",
        { class: "about" },
        titled(features, row),
        el(
          "span",
          { class: "meta" },
          named(features, row),
          features.tokens(row) === "cls" && el("span", { class: "badge" }, "class token"),
          !dead &&
            features.falls(row) &&
            el("span", { class: "badge", title: "falls as its concept rises: its ends are the other way round" }, "falls"),
          !dead && reach(features, row),
          dead
            ? el("span", { class: "badge" }, "dead")
            : el("span", { class: "share", title: "share of the layer output's variance" }, format.percent(share)),
        ),
        !dead && Elude.charts.bar(Math.max(0, share), largest[Number(features.isConcept(row))]),
      ),
    );
  }

  /** A feature on one line: a few exemplars, label and name, and what is said about it. */
  function line(features, row, { end = 1, count = 4, value = null, extra = null } = {}) {
    return el(
      "a",
      { class: "feature-line", href: features.href(row) },
      strip(features, row, end, count),
      el("span", { class: "text" }, titled(features, row), named(features, row)),
      extra,
      value !== null && el("span", { class: "value number" }, value),
    );
  }

  Elude.features = { all, card, line, strip, titled, labelled, written, named };
})();
