/** The overview's drawings: how features are distributed, and one neuron taken apart. */
(function () {
  "use strict";
  const { el, format, page } = Elude;

  /** Charts of one layer and token type. */
  function charts(features, layer, tokens) {
    const rows = [];
    for (let row = 0; row < features.count; row++) {
      if (features.data.layer[row] === layer && features.tokens(row) === tokens) rows.push(row);
    }
    const concepts = rows.filter((row) => features.isConcept(row));
    const subunits = rows.filter((row) => !features.isConcept(row) && features.isLive(row));
    const { share, std, density } = features.data;
    const ranked = concepts.filter((row) => features.isLive(row)).sort((a, b) => share[b] - share[a]);
    const half = halfWay(ranked.map((row) => share[row]));
    const chart = (title, note, drawn) =>
      el(
        "figure",
        { class: "card padded" },
        el("figcaption", null, el("h3", null, title), el("p", { class: "soft small" }, note)),
        drawn,
      );
    return [
      chart(
        "Share of variance, concept by concept",
        half ? `The first ${half} of ${ranked.length} carry half of the output's variance.` : "None varies.",
        Elude.charts.columns(
          ranked.map((row) => ({
            value: Math.max(0, share[row]), quiet: features.isRest(row), href: features.href(row),
            title: `${features.title(row)} (${features.short(row)}): ${format.percent(share[row])}`,
          })), // prettier-ignore
          {
            label: `Share of variance of ${ranked.length} concepts, largest first`,
            number: format.percent,
            ends: ["largest", "smallest"],
          },
        ),
      ),
      chart(
        "Standard deviation of sub-units",
        `${format.count(subunits.length)} live sub-units, in units of the layer's output.`,
        Elude.charts.histogram(
          subunits.map((row) => std[row]),
          { label: "Histogram of the standard deviation of sub-units" },
        ),
      ),
      chart(
        "Density of sub-units",
        "Tokens beyond two standard deviations; 4.6 % for a normal distribution.",
        Elude.charts.histogram(
          subunits.map((row) => density[row]),
          { label: "Histogram of the density of sub-units", number: format.percent },
        ),
      ),
      chart("Live features", "Those that vary at all on the calibration images.", liveBars(features, rows)),
    ];
  }

  /** How many of the largest carry half of the whole. */
  function halfWay(shares) {
    const total = shares.reduce((sum, v) => sum + v, 0);
    let sum = 0;
    return total > 0 ? shares.findIndex((v) => (sum += v) >= total / 2) + 1 : 0;
  }

  function liveBars(features, rows) {
    const groups = [
      ["concepts", rows.filter((r) => features.isConcept(r) && !features.isRest(r))],
      ["sub-units", rows.filter((r) => !features.isConcept(r) && !features.isRest(r))],
      ["rest of neurons", rows.filter((r) => !features.isConcept(r) && features.isRest(r))],
    ];
    return Elude.charts.bars(
      groups
        .filter(([, all]) => all.length)
        .map(([name, all]) => {
          const live = all.filter((row) => features.isLive(row)).length;
          return { name, value: live / all.length, text: `${format.count(live)} of ${format.count(all.length)}` };
        }),
      { largest: 1 },
    );
  }

  page(async () => {
    const features = await Elude.features.all();
    for (const place of document.querySelectorAll("[data-charts]")) {
      place.append(...charts(features, Number(place.dataset.layer), place.dataset.tokens));
    }
    const place = document.getElementById("split");
    if (place) {
      const { layer, tokens, neuron } = place.dataset;
      place.append(await Elude.split(features, { layer: Number(layer), tokens, neuron: Number(neuron) }));
    }
    Elude.ready();
  });
})();
