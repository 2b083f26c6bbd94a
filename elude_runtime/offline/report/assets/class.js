/** The page of one class, `class.html#281`: what carries it, images predicted as it; and the list of all classes. */
(function () {
  "use strict";
  const { el, format, fromHash, hash, load, page, pictures, state } = Elude;
  const parts = Elude.features;
  const SHOWN = 12;

  /** [[row, effect], …] of a flat list. */
  function pairs(flat) {
    return Array.from({ length: (flat || []).length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
  }

  class ClassList {
    constructor(features, data) {
      this.features = features;
      this.data = data;
      this.field = document.getElementById("class-search");
      this.list = document.getElementById("class-list");
      this.summary = document.getElementById("class-summary");
      this.texts = features.data.classes.map((name) => name.toLowerCase());
      const count = Math.max(this.texts.length, ...["raises", "lowers", "images"].flatMap((key) => Object.keys(data[key]).map((c) => Number(c) + 1)));
      this.links = Array.from({ length: count }, (_, index) =>
        el(
          "a",
          { href: hash(String(index)), class: this.carried(index) ? "" : "bare" },
          el("span", { dir: "auto" }, features.className(index)),
          el("span", { class: "faint number" }, String(index)),
        ),
      );
      this.list.replaceChildren(...this.links.map((link) => el("li", null, link)));
      this.field.addEventListener("input", () => this.filter());
      this.filter();
    }

    /** Whether any feature names it, or any image is predicted as it. */
    carried(index) {
      return ["raises", "lowers", "images"].some((key) => index in this.data[key]);
    }

    filter() {
      const wanted = this.field.value.trim().toLowerCase();
      let shown = 0;
      this.links.forEach((link, index) => {
        const hit = !wanted || (this.texts[index] || "").includes(wanted) || String(index) === wanted;
        link.parentElement.hidden = !hit;
        shown += hit;
      });
      this.summary.textContent = `${format.count(shown)} of ${format.count(this.links.length)} classes`;
    }

    mark(index) {
      this.links.forEach((link, i) => (i === index ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
      const item = this.links[index]?.parentElement;
      if (item) this.list.scrollTop = item.offsetTop - this.list.offsetTop - this.list.clientHeight / 3;
    }
  }

  /** Features with their effects, concepts and sub-units apart. */
  function carriers(features, found, end, largest) {
    const make = ([row, effect]) =>
      parts.line(features, row, {
        value: format.signed(effect),
        extra: Elude.charts.bar(effect, largest, true),
      });
    const shown = (some) => {
      const box = el("div", { class: "lines" }, some.slice(0, SHOWN).map(make));
      if (some.length <= SHOWN) return box;
      const more = el("button", { class: "button", type: "button", onclick: () => { more.remove(); box.append(...some.slice(SHOWN).map(make)); } }, `Show all ${format.count(some.length)}`); // prettier-ignore
      return [box, el("p", null, more)];
    };
    const groups = [true, false].map((concept) => found.filter(([row]) => features.isConcept(row) === concept));
    return groups.map((some, i) =>
      some.length ? [el("h4", null, i ? "Sub-units" : "Concepts"), shown(some)] : null,
    );
  }

  function images(features, places) {
    return el(
      "div",
      { class: "tiles" },
      places.map((place) => {
        const image = features.images[place];
        return el(
          "figure",
          { class: "tile" },
          pictures.picture(image, { mode: "whole", alt: image.name }),
          el("figcaption", { class: "number" }, format.percent(image.predicted[0][1])),
        );
      }),
    );
  }

  function show(features, data, list) {
    const place = document.getElementById("class");
    const index = Number.parseInt(fromHash(), 10);
    if (!(index >= 0 && index < list.links.length)) {
      const text = fromHash() ? `This model has no class ${fromHash().slice(0, 20)}.` : "Choose a class from the list.";
      place.replaceChildren(state(text, "Its page shows the concepts and sub-units that raise and lower it most, and images predicted as it."));
      return;
    }
    list.mark(index);
    const name = features.className(index);
    document.title = `${name} · ${document.title.split(" · ").slice(-3).join(" · ")}`;
    const [raises, lowers] = ["raises", "lowers"].map((key) => pairs(data[key][index]));
    const largest = Math.max(0, ...[...raises, ...lowers].map(([, effect]) => Math.abs(effect)));
    const predicted = data.images[index] || [];
    const section = (title, note, content) => el("section", null, el("div", { class: "section-head" }, el("h2", null, title), note && el("p", null, note)), content);
    const none = (what) => state(`No feature ${what} this class among the five that it ${what} most.`);
    place.replaceChildren(
      el("p", { class: "path" }, "Class ", String(index)),
      el("h1", { dir: "auto" }, name),
      ...(data.known
        ? [
            section("Raised by", "At their positive ends, which the pictures show; direct effect on the logit.", raises.length ? carriers(features, raises, 1, largest) : none("raises")),
            section("Lowered by", "At their positive ends; at its negative end each of these raises the class.", lowers.length ? carriers(features, lowers, 1, largest) : none("lowers")),
          ]
        : [el("section", null, noCatalogue())]),
      section(
        "Images predicted as it",
        "Of those that are exemplars of some feature.",
        predicted.length ? images(features, predicted) : state("No exemplar of any feature is predicted as this class."),
      ),
    );
    document.documentElement.dataset.ready = String(index);
  }

  function noCatalogue() {
    const { checkpoint } = document.body.dataset;
    return state("This checkpoint has no class effects yet.", "They are made by:", `elude catalogue ${checkpoint} --images DIR`);
  }

  page(async () => {
    const features = await parts.all();
    if (!features.data.classes) {
      document.getElementById("classes").replaceChildren(state("This model has no classes.", "Its output is an embedding; its features are in the gallery."));
      document.documentElement.dataset.ready = "yes";
      return;
    }
    const data = await load("classes");
    const list = new ClassList(features, data);
    show(features, data, list);
    document.documentElement.dataset.ready ||= "yes";
    window.addEventListener("hashchange", () => {
      show(features, data, list);
      document.getElementById("class").scrollIntoView({ block: "nearest" });
    });
  });
})();
