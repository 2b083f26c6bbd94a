/** The gallery: filters, sorting and search over all features, a page of cards at a time; the view is in the address. */
(function () {
  "use strict";
  const { el, format, page, state } = Elude;
  const PAGE = 48;
  const DEFAULTS = { q: "", kind: "concept", layer: "", tokens: "", alive: "live", labelled: "", sort: "", page: "1" };
  const SORTS = [
    ["share", "share of variance"],
    ["std", "standard deviation"],
    ["density", "density"],
    ["stability", "stability"],
    ["size", "size"],
    ["name", "name"],
    ["label", "label"],
  ];

  /** What the address asks for; nothing but known fields. */
  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    return Object.fromEntries(Object.entries(DEFAULTS).map(([key, value]) => [key, asked.get(key) ?? value]));
  }

  function address(view) {
    const kept = Object.entries(view).filter(([key, value]) => value !== DEFAULTS[key]);
    return "#" + new URLSearchParams(kept).toString();
  }

  /** Rows that the filters let through, in the table's order. */
  function filtered(features, view) {
    const tests = [];
    if (view.kind) tests.push((row) => features.isConcept(row) === (view.kind === "concept"));
    if (view.layer) tests.push((row) => features.layer(row).name === view.layer);
    if (view.tokens) tests.push((row) => features.tokens(row) === view.tokens);
    if (view.alive) tests.push((row) => features.isLive(row) === (view.alive === "live"));
    if (view.labelled) tests.push((row) => (features.label(row) !== "") === (view.labelled === "yes"));
    const rows = [];
    for (let row = 0; row < features.count; row++) if (tests.every((test) => test(row))) rows.push(row);
    return rows;
  }

  const order = new Intl.Collator("en", { numeric: true });

  function sorted(features, rows, by) {
    if (by === "name") return [...rows].sort((a, b) => order.compare(features.names[a], features.names[b]));
    if (by === "label") {
      const key = (row) => features.label(row) || "\uffff"; // those without one last
      return [...rows].sort((a, b) => order.compare(key(a), key(b)));
    }
    const column = features.data[by] || [];
    return [...rows].sort((a, b) => (column[b] ?? -Infinity) - (column[a] ?? -Infinity));
  }

  class Gallery {
    constructor(features) {
      this.features = features;
      this.search = new Elude.Search(features);
      this.form = document.getElementById("filters");
      this.cards = document.getElementById("cards");
      this.summary = document.getElementById("summary");
      this.pager = document.getElementById("pager");
      this.offer();
      this.take(read());
      this.form.addEventListener("input", () => this.change());
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.cards.addEventListener("keydown", (event) => this.walk(event));
      window.addEventListener("hashchange", () => {
        if (address(this.view) !== address(read())) this.take(read());
      });
    }

    /** Fill the choices that depend on the checkpoint. */
    offer() {
      const { layers, data } = this.features;
      const { layer, sort, tokens } = this.form.elements;
      for (const { name } of layers) layer.append(el("option", { value: name }, name));
      layer.closest("label").hidden = layers.length < 2;
      tokens.closest("label").hidden = !layers.some((one) => one.prefix > 0);
      sort.append(el("option", { value: "" }, "best match, else share"));
      for (const [value, text] of SORTS) {
        const known = !["stability"].includes(value) || (data.stability && data.stability.some((v) => v !== null));
        if (known) sort.append(el("option", { value }, text));
      }
    }

    /** Show a view that the address asks for. */
    take(view) {
      for (const [name, value] of Object.entries(view)) if (this.form.elements[name]) this.form.elements[name].value = value;
      this.show(view);
    }

    change() {
      const view = Object.fromEntries(Object.keys(DEFAULTS).map((key) => [key, this.form.elements[key]?.value ?? DEFAULTS[key]]));
      this.show({ ...view, page: "1" });
    }

    show(view) {
      this.view = view;
      const { features } = this;
      const allowed = filtered(features, view);
      const found = this.search.find(view.q, allowed);
      const ranked = view.q.trim() && !view.sort;
      this.rows = ranked ? found : sorted(features, found, view.sort || "share");
      this.draw();
      clearTimeout(this.settling); // addresses change when typing rests, since browsers limit how often they may
      this.settling = setTimeout(() => this.keep(), 250);
    }

    keep() {
      if (address(read()) !== address(this.view)) location.replace(address(this.view));
    }

    draw() {
      const pages = Math.max(1, Math.ceil(this.rows.length / PAGE));
      const at = Math.min(pages, Math.max(1, Number.parseInt(this.view.page, 10) || 1));
      const shown = this.rows.slice((at - 1) * PAGE, at * PAGE);
      this.cards.replaceChildren(...shown.map((row) => el("li", null, Elude.features.card(this.features, row))));
      if (!shown.length) this.cards.append(el("li", { class: "nothing" }, this.nothing()));
      const range = pages > 1 ? `${format.count((at - 1) * PAGE + 1)}–${format.count((at - 1) * PAGE + shown.length)} of ` : "";
      this.summary.textContent = `${range}${format.count(this.rows.length)} features`;
      this.pager.replaceChildren(...(pages > 1 ? this.turns(at, pages) : []));
    }

    turns(at, pages) {
      const turn = (to, text) =>
        el("button", { class: "button", type: "button", disabled: to < 1 || to > pages, onclick: () => this.turn(to) }, text);
      return [turn(at - 1, "Previous"), el("span", { class: "soft number" }, `Page ${at} of ${pages}`), turn(at + 1, "Next")];
    }

    turn(to) {
      this.view = { ...this.view, page: String(to) };
      this.keep();
      this.draw();
      document.getElementById("filters").scrollIntoView({ block: "start" });
      this.cards.querySelector("a")?.focus({ preventScroll: true });
    }

    nothing() {
      const clear = el("button", { class: "button", type: "button", onclick: () => this.take({ ...DEFAULTS }) }, "Clear the filters");
      const box = state("Nothing fits these filters.", "Sub-units and dead features are left out unless the filters ask for them.");
      box.append(el("p", null, clear));
      return box;
    }

    /** Arrow keys go from card to card. */
    walk(event) {
      const cards = [...this.cards.querySelectorAll("a.feature")];
      const at = cards.indexOf(document.activeElement);
      if (at < 0) return;
      const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: cards.length - 1 - at };
      const to = cards[at + step[event.key]];
      if (to) {
        event.preventDefault();
        to.focus();
      }
    }
  }

  page(async () => {
    Elude.gallery = new Gallery(await Elude.features.all());
    document.documentElement.dataset.ready = "yes";
  });
})();
