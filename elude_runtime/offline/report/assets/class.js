/** The page of one class, `class.html#281`: what carries it, images predicted as it; and the list of all classes. */
(function () {
  "use strict";
  const { el, format, fromHash, hash, list, load, page, pictures, section, state } = Elude;
  const parts = Elude.features;

  /** [[row, effect], …] of a flat list. */
  function pairs(flat = []) {
    return Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
  }

  /** All classes, to search and to choose from. */
  class ClassList {
    constructor(features, data) {
      this.field = document.getElementById("class-search");
      this.box = document.getElementById("class-list");
      this.summary = document.getElementById("class-summary");
      const said = ["raises", "lowers", "images"].flatMap((key) => Object.keys(data[key]).map(Number));
      const carried = new Set(said);
      this.count = Math.max(features.data.classes.length, ...said.map((index) => index + 1));
      this.texts = Array.from({ length: this.count }, (_, index) => features.className(index).toLowerCase());
      this.links = this.texts.map((_, index) =>
        el(
          "a",
          { href: hash(String(index)), class: carried.has(index) ? "" : "bare" },
          el("span", { dir: "auto" }, features.className(index)),
          el("span", { class: "faint number" }, String(index)),
        ),
      );
      this.box.replaceChildren(...this.links.map((link) => el("li", null, link)));
      this.field.addEventListener("input", () => this.filter());
      this.filter();
    }

    filter() {
      const wanted = this.field.value.trim().toLowerCase();
      let shown = 0;
      this.links.forEach((link, index) => {
        const hit = !wanted || this.texts[index].includes(wanted) || String(index) === wanted;
        link.parentElement.hidden = !hit;
        shown += hit;
      });
      this.summary.textContent = `${format.count(shown)} of ${format.count(this.count)} classes`;
    }

    mark(index) {
      this.marked?.removeAttribute("aria-current");
      this.marked = this.links[index];
      this.marked.setAttribute("aria-current", "true");
      this.box.scrollTop = this.marked.parentElement.offsetTop - this.box.clientHeight / 3;
    }
  }

  /**
   * [[row, effect, end], …] of the features that name a class: the effect of going towards their stronger end, `end`.
   * A feature that lowers the class at its positive end raises it at its negative one.
   */
  function effects(features, data, index) {
    const all = [...pairs(data.raises[index]), ...pairs(data.lowers[index])];
    const found = all.map(([row, effect]) => [row, effect * features.lead(row), features.lead(row)]);
    return found.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  }

  /** Features with their effects, concepts and sub-units apart. */
  function carriers(features, found, largest) {
    const make = ([row, effect, end]) =>
      parts.line(features, row, { end, value: format.signed(effect), extra: Elude.charts.bar(effect, largest, true) });
    return [true, false].map((concepts) => {
      const some = found.filter(([row]) => features.isConcept(row) === concepts);
      if (!some.length) return null;
      return [el("h3", { class: "kind" }, concepts ? "Concepts" : "Sub-units"), list(some, make, "lines", 8)];
    });
  }

  function images(features, places) {
    const make = (place) => {
      const image = features.images[place];
      return el(
        "figure",
        { class: "tile" },
        pictures.picture(image, { mode: "whole", alt: image.name }),
        el("figcaption", { class: "number" }, format.percent(image.predicted[0][1])),
      );
    };
    return list(places, make, "tiles", 24);
  }

  function noCatalogue() {
    const { checkpoint } = document.body.dataset;
    return el(
      "section",
      null,
      state(
        "This checkpoint has no class effects yet.",
        "They are made by:",
        `elude catalogue ${checkpoint} --images DIR`,
      ),
    );
  }

  function content(features, data, index) {
    const found = effects(features, data, index);
    const largest = Math.max(0, ...found.map(([, effect]) => Math.abs(effect)));
    const predicted = data.images[index] || [];
    const carried = (title, note, some) =>
      section(
        title,
        note,
        some.length
          ? carriers(features, some, largest)
          : state("No feature has this class among the five that it moves most."),
      );
    return [
      el("p", { class: "path" }, `Class ${index}`),
      el("h1", { dir: "auto" }, features.className(index)),
      ...(data.known
        ? [
            carried(
              "Raised by",
              "Each with its stronger end: mean change of the logit, against the mean of all, when the feature goes one standard deviation towards it. Only classes among the five that a feature raises or lowers most are known.",
              found.filter(([, effect]) => effect > 0),
            ),
            carried(
              "Lowered by",
              "Towards its stronger end each of these lowers the class.",
              found.filter(([, effect]) => effect < 0),
            ),
          ]
        : [noCatalogue()]),
      section(
        "Images predicted as it",
        "Of those that are exemplars of some feature, with the probability.",
        predicted.length
          ? images(features, predicted)
          : state("No exemplar of any feature is predicted as this class."),
      ),
    ];
  }

  page(async () => {
    const features = await parts.all();
    if (!features.data.classes) {
      const box = state(
        "This model has no classes.",
        "Its output is an embedding; what it is made of is in the gallery.",
      );
      document.getElementById("classes").replaceWith(el("h1", null, "Classes"), el("section", null, box));
      return Elude.ready();
    }
    const data = await load("classes");
    const all = new ClassList(features, data);
    const place = document.getElementById("class");
    const rest = document.title;
    const show = () => {
      const asked = fromHash();
      const index = /^\d+$/.test(asked) ? Number(asked) : -1;
      const known = index >= 0 && index < all.count;
      document.title = known ? `${features.className(index)} · ${rest}` : rest;
      if (known) {
        all.mark(index);
        place.replaceChildren(...content(features, data, index).flat(9).filter(Boolean));
      } else {
        const text = asked ? `This model has no class ${asked.slice(0, 20)}.` : "Choose a class from the list.";
        place.replaceChildren(
          el("h1", null, "Classes"),
          el(
            "section",
            null,
            state(
              text,
              "Its page shows the concepts and sub-units that raise and lower it most, and images predicted as it.",
            ),
          ),
        );
      }
      Elude.ready(asked || "yes");
    };
    show();
    window.addEventListener("hashchange", () => {
      show();
      place.scrollIntoView({ block: "nearest" });
    });
  });
})();
