/** Exemplars of one feature: tiles that show a part, the whole or its heat, and one of them enlarged. */
(function () {
  "use strict";
  const { el, format, hash, pictures } = Elude;
  const KEY = "elude-view";

  function stored() {
    try {
      return sessionStorage.getItem(KEY);
    } catch {
      return null;
    }
  }

  /** Where a token is, in words. */
  function where(layer, token) {
    const at = pictures.place(layer, token);
    if (at) return `patch in row ${at[0] + 1}, column ${at[1] + 1}`;
    return token < layer.prefix ? (token === 0 ? "class token" : `register token ${token}`) : `token ${token}`;
  }

  /**
   * The exemplars of one feature or neuron, all drawn alike: one view, one scale of heat.
   * `largest` is the strongest heat among the top exemplars, so that rows of weak ones look weak.
   */
  class Exemplars {
    constructor(features, layer, exemplars) {
      Object.assign(this, { features, layer, exemplars });
      this.largest = Math.max(0, ...exemplars.filter((e) => e.heat && e.role === "top").map((e) => e.scale));
      this.view = this.largest ? stored() || "heat" : "whole";
      this.tiles = [];
    }

    values(e) {
      return e.heat && Float32Array.from(pictures.unpack(e.heat), (v) => (v / 127) * e.scale);
    }

    alt(e) {
      const image = this.features.images[e.image];
      const [best] = image.predicted;
      const says = best ? `, predicted ${this.features.className(best[0])}` : "";
      return `${image.name}${says}; activation ${format.signed(e.activation)} at the ${where(this.layer, e.token)}`;
    }

    picture(e, mode = this.view) {
      return pictures.picture(this.features.images[e.image], {
        layer: this.layer, token: e.token, mode, alt: this.alt(e), largest: this.largest,
        values: mode === "heat" ? this.values(e) : null,
      }); // prettier-ignore
    }

    /** Those of one role and end, by rank; of all ends where `end` is left out. */
    of(role, end) {
      return this.exemplars.filter((e) => e.role === role && (end === undefined || e.end === end));
    }

    /** Tiles side by side; each opens large. */
    row(exemplars) {
      const tiles = exemplars.map((e) => {
        const [best] = this.features.images[e.image].predicted;
        const tile = el(
          "button",
          { class: "tile", type: "button", onclick: () => this.open(exemplars, exemplars.indexOf(e)) },
          this.picture(e),
          el("span", { class: "number" }, format.signed(e.activation)),
          el("span", { class: "says", dir: "auto" }, best ? this.features.className(best[0]) : "\u00a0"),
        );
        this.tiles.push([tile, e]);
        return tile;
      });
      return el("div", { class: "tiles", style: { "--count": tiles.length } }, tiles);
    }

    /** The control that changes the view of all tiles; nothing where there is but one. */
    control() {
      if (!this.exemplars.some((e) => pictures.place(this.layer, e.token))) return null;
      const choices = [["crop", "Part"], ["whole", "Whole"], ...(this.largest ? [["heat", "Heat"]] : [])];
      return el(
        "fieldset",
        { class: "segments controls", onchange: (event) => this.change(event.target.value) },
        el("legend", { class: "hidden" }, "How exemplars are shown"),
        choices.map(([value, text]) =>
          el(
            "label",
            null,
            el("input", { type: "radio", name: "view", value, checked: value === this.view }),
            el("span", null, text),
          ),
        ),
      );
    }

    change(view) {
      this.view = view;
      try {
        sessionStorage.setItem(KEY, view);
      } catch {
        // it holds for this page
      }
      for (const [tile, e] of this.tiles) tile.querySelector(".picture").replaceWith(this.picture(e));
      document.querySelectorAll("[data-heat-only]").forEach((node) => (node.hidden = view !== "heat"));
    }

    /** One exemplar large, with what the model says about its image; arrow keys go on to the next. */
    open(exemplars, at) {
      const dialog = el("dialog", { class: "large", "aria-label": "Exemplar" });
      const show = (to) => {
        at = (to + exemplars.length) % exemplars.length;
        dialog.replaceChildren(this.enlarged(exemplars[at], at, exemplars.length, show, () => dialog.close()));
      };
      dialog.addEventListener("keydown", (event) => {
        if (event.key === "ArrowRight") show(at + 1);
        if (event.key === "ArrowLeft") show(at - 1);
      });
      dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
      dialog.addEventListener("close", () => dialog.remove());
      document.body.append(dialog);
      show(at);
      dialog.showModal();
      dialog.scrollTop = 0; // the focus is on the button at its foot
    }

    enlarged(e, at, count, show, close) {
      const image = this.features.images[e.image];
      const heated = Boolean(e.heat);
      return el(
        "div",
        null,
        el("div", { class: "large-pictures" }, this.picture(e, "whole"), heated && this.picture(e, "heat")),
        heated && pictures.scale(this.largest),
        el("h3", { dir: "auto" }, image.name),
        el("p", { class: "soft" }, `Activation ${format.signed(e.activation)} at the ${where(this.layer, e.token)}.`),
        image.predicted.length > 0 &&
          Elude.charts.bars(
            image.predicted.map(([index, probability]) => ({
              name: el("a", { href: "class.html" + hash(String(index)), dir: "auto" }, this.features.className(index)),
              value: probability,
              text: format.percent(probability),
            })),
            { largest: 1 },
          ),
        el(
          "div",
          { class: "row spread" },
          el("button", { class: "button", type: "button", onclick: () => show(at - 1) }, "Previous"),
          el("span", { class: "faint number" }, `${at + 1} of ${count}`),
          el("button", { class: "button", type: "button", onclick: () => show(at + 1) }, "Next"),
          el("button", { class: "button primary", type: "button", autofocus: true, onclick: close }, "Close"),
        ),
      );
    }
  }

  Elude.Exemplars = Exemplars;
})();
