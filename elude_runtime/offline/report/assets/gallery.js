/** The gallery: filters, sorting and search over all features, a page of cards at a time; the view is in the address. */
(function () {
  "use strict";
  const { el, format, page, state } = Elude;
  const PAGE = 48;
  const AT_ONCE = 12; // cards drawn before the screen is; the others follow
  const KEPT = 600; // cards that are kept for when they are shown again
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
    if (view.labelled === "no") tests.push((row) => features.label(row) === "");
    else if (view.labelled) tests.push((row) => features.label(row) !== "");
    if (view.labelled === "automatic") tests.push((row) => features.isAutomatic(row));
    if (view.labelled === "user") tests.push((row) => !features.isAutomatic(row));
    const rows = [];
    for (let row = 0; row < features.count; row++) if (tests.every((test) => test(row))) rows.push(row);
    return rows;
  }

  const alphabet = new Intl.Collator("en", { numeric: true });

  /** The place of every row in one order: numbers from the largest on, texts from A on, what is missing last. */
  function places(features, by) {
    const rows = Array.from({ length: features.count }, (_, row) => row);
    if (by === "name") rows.sort((a, b) => alphabet.compare(features.names[a], features.names[b]));
    else if (by === "label") {
      const key = (row) => features.label(row) || "\uffff";
      rows.sort((a, b) => alphabet.compare(key(a), key(b)));
    } else {
      const column = features.data[by] || [];
      rows.sort((a, b) => (column[b] ?? -Infinity) - (column[a] ?? -Infinity));
    }
    const found = new Int32Array(rows.length);
    rows.forEach((row, at) => (found[row] = at));
    return found;
  }

  class Gallery {
    constructor(features) {
      this.features = features;
      this.search = new Elude.Search(features);
      this.form = document.getElementById("filters");
      this.cards = document.getElementById("cards");
      this.summary = document.getElementById("summary");
      this.pager = document.getElementById("pager");
      this.drawn = new Map(); // cards by row
      this.orders = new Map();
      this.offer();
      this.take(read());
      this.form.addEventListener("input", () => this.change());
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.cards.addEventListener("keydown", (event) => this.walk(event));
      window.addEventListener("hashchange", () => {
        if (address(read()) !== this.kept) this.take(read()); // what we wrote there may be older than what is typed
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
        const known = value !== "stability" || data.stability?.some((v) => v !== null);
        if (known) sort.append(el("option", { value }, text));
      }
    }

    /** Show a view that the address asks for. */
    take(view) {
      for (const [name, value] of Object.entries(view))
        if (this.form.elements[name]) this.form.elements[name].value = value;
      this.show(view);
    }

    change() {
      const view = Object.fromEntries(
        Object.keys(DEFAULTS).map((key) => [key, this.form.elements[key]?.value ?? DEFAULTS[key]]),
      );
      this.show({ ...view, page: "1" });
    }

    show(view) {
      this.view = view;
      const key = address({ ...view, q: "", sort: "", page: "1" });
      if (this.allowed?.key !== key) this.allowed = { key, rows: filtered(this.features, view) };
      const found = this.search.find(view.q, this.allowed.rows);
      const ranked = view.q.trim() && !view.sort;
      this.rows = ranked ? found : this.sorted(found, view.sort || "share");
      this.draw();
      clearTimeout(this.settling); // addresses change when typing rests, since browsers limit how often they may
      this.settling = setTimeout(() => this.keep(), 250);
    }

    sorted(rows, by) {
      if (!this.orders.has(by)) this.orders.set(by, places(this.features, by));
      const at = this.orders.get(by);
      return [...rows].sort((a, b) => at[a] - at[b]);
    }

    /** Keep the view in the address. */
    keep() {
      this.kept = address(this.view);
      if (address(read()) !== this.kept) location.replace(this.kept);
    }

    draw() {
      const pages = Math.max(1, Math.ceil(this.rows.length / PAGE));
      const at = Math.min(pages, Math.max(1, Number.parseInt(this.view.page, 10) || 1));
      const shown = this.rows.slice((at - 1) * PAGE, at * PAGE);
      this.fill(shown);
      const range =
        pages > 1 ? `${format.count((at - 1) * PAGE + 1)}–${format.count((at - 1) * PAGE + shown.length)} of ` : "";
      this.summary.textContent = `${range}${format.count(this.rows.length)} features`;
      this.pager.replaceChildren(...(pages > 1 ? this.turns(at, pages) : []));
    }

    /** The first cards at once, the others after the screen has shown these. */
    fill(rows) {
      cancelAnimationFrame(this.following);
      clearTimeout(this.rest);
      if (!rows.length) return this.cards.replaceChildren(el("li", { class: "nothing" }, this.nothing()));
      if (this.drawn.size > KEPT) this.drawn.clear();
      this.cards.replaceChildren(...rows.slice(0, AT_ONCE).map((row) => this.card(row)));
      const others = rows.slice(AT_ONCE);
      const follow = () => this.cards.append(...others.map((row) => this.card(row)));
      if (others.length) this.following = requestAnimationFrame(() => (this.rest = setTimeout(follow, 0)));
    }

    card(row) {
      if (!this.drawn.has(row)) this.drawn.set(row, el("li", null, Elude.features.card(this.features, row)));
      return this.drawn.get(row);
    }

    turns(at, pages) {
      const turn = (to, text) =>
        el(
          "button",
          { class: "button", type: "button", disabled: to < 1 || to > pages, onclick: () => this.turn(to) },
          text,
        );
      return [
        turn(at - 1, "Previous"),
        el("span", { class: "soft number" }, `Page ${at} of ${pages}`),
        turn(at + 1, "Next"),
      ];
    }

    turn(to) {
      this.view = { ...this.view, page: String(to) };
      this.keep();
      this.draw();
      document.getElementById("filters").scrollIntoView({ block: "start" });
      this.cards.querySelector("a")?.focus({ preventScroll: true });
    }

    nothing() {
      const clear = el(
        "button",
        { class: "button", type: "button", onclick: () => this.take({ ...DEFAULTS }) },
        "Clear the filters",
      );
      const box = state(
        "Nothing fits these filters.",
        "Sub-units and dead features are left out unless the filters ask for them.",
      );
      box.append(el("p", null, clear));
      return box;
    }

    /** Arrow keys go from card to card. */
    walk(event) {
      const cards = [...this.cards.querySelectorAll("a.feature")];
      const at = cards.indexOf(document.activeElement);
      if (at < 0) return;
      const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
      const step = {
        ArrowRight: 1,
        ArrowLeft: -1,
        ArrowDown: columns,
        ArrowUp: -columns,
        Home: -at,
        End: cards.length - 1 - at,
      };
      const to = cards[at + step[event.key]];
      if (to) {
        event.preventDefault();
        to.focus();
      }
    }
  }

  page(async () => {
    Elude.gallery = new Gallery(await Elude.features.all());
    Elude.ready();
  });
})();
