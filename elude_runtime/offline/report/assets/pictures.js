/**
 * Exemplars as pictures: the part of a thumbnail around a patch, or all of what the model saw, with the heat over it.
 *
 * One thumbnail an image is all there is on disk; parts are cut by CSS, heat is a canvas with a pixel a patch.
 */
(function () {
  "use strict";
  const { el, format } = Elude;
  const POSITIVE = [200, 16, 46];
  const NEGATIVE = [16, 92, 190];
  const STRONGEST = 0.85; // opacity of the largest value, so that the picture still shows through it
  const PART = 0.42; // of the shorter side of the view that a part shows

  /**
   * @typedef {Object} Seen an image of the report
   * @property {string} name
   * @property {string | null} thumb   file, relative to the page
   * @property {number} aspect         width over height of what the model saw
   * @property {Array<[number, number]>} predicted  class and probability, best first
   */

  /**
   * @typedef {Object} Grid the patches of a layer
   * @property {[number, number] | null} grid  rows and columns; null where patches have no place
   * @property {number} prefix                 tokens before the first patch
   */

  /** The heat of an exemplar: int8 values [rows * columns], packed in base64. @returns {Int8Array} */
  function unpack(text) {
    const bytes = atob(text);
    const values = new Int8Array(bytes.length);
    for (let i = 0; i < bytes.length; i++) values[i] = bytes.charCodeAt(i);
    return values;
  }

  /** Row and column of a token, null where it is no patch. @param {Grid} layer */
  function place(layer, token) {
    if (!layer.grid || token < layer.prefix) return null;
    const [, columns] = layer.grid;
    return [Math.floor((token - layer.prefix) / columns), (token - layer.prefix) % columns];
  }

  /** Where the thumbnail stands in a square frame, in fractions of it: left, top, width, height. */
  function whole(aspect) {
    const width = Math.min(1, aspect);
    const height = Math.min(1, 1 / aspect);
    return [(1 - width) / 2, (1 - height) / 2, width, height];
  }

  /** The same where a square part around a patch fills the frame. */
  function part(aspect, grid, [row, column]) {
    const side = PART * Math.min(aspect, 1); // in heights of the view
    const clamp = (centre, size) => Math.max(0, Math.min(size - side, centre - side / 2));
    const left = clamp(((column + 0.5) / grid[1]) * aspect, aspect);
    const top = clamp((row + 0.5) / grid[0], 1);
    return [-left / side, -top / side, aspect / side, 1 / side];
  }

  function put(node, [left, top, width, height]) {
    const percent = { left, top, width, height };
    for (const [key, value] of Object.entries(percent)) node.style.setProperty(key, `${(100 * value).toFixed(3)}%`);
    return node;
  }

  /**
   * A canvas with a pixel a patch: red above zero, blue below, opacity by size over `largest`.
   * @param {ArrayLike<number>} values  [rows * columns], row by row
   * @param {[number, number]} grid
   * @param {number} largest  the value that is drawn strongest
   */
  function heat(values, [rows, columns], largest) {
    const canvas = el("canvas", { width: columns, height: rows, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const strength = largest > 0 ? Math.min(1, Math.abs(values[i]) / largest) : 0;
      pixels.data.set(values[i] < 0 ? NEGATIVE : POSITIVE, 4 * i);
      pixels.data[4 * i + 3] = Math.round(255 * STRONGEST * strength);
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  /**
   * A square picture of an image.
   * @param {Seen | null} image
   * @param {Object} [options]
   * @param {Grid} [options.layer]
   * @param {number} [options.token]  the patch that it is about
   * @param {"crop" | "whole" | "heat"} [options.mode]  a part around the patch, all of it, or all of it under its heat
   * @param {ArrayLike<number> | null} [options.values]  the heat, row by row
   * @param {number} [options.largest]
   * @param {boolean} [options.spot]  outline the patch (in `whole` and `heat`)
   * @param {string} [options.alt]
   * @returns {HTMLElement}
   */
  function picture(image, { layer, token, mode = "crop", values = null, largest = 0, spot = true, alt = "" } = {}) {
    const frame = el("span", { class: "picture" });
    const missing = () => {
      frame.replaceChildren();
      frame.classList.add("missing");
      if (alt) {
        frame.setAttribute("role", "img");
        frame.setAttribute("aria-label", `${alt} (its thumbnail is missing)`);
      }
    };
    if (!image || !image.thumb) {
      missing();
      return frame;
    }
    const at = layer ? place(layer, token) : null;
    const cut = mode === "crop" && at ? part(image.aspect, layer.grid, at) : whole(image.aspect);
    const shown = el("img", { src: image.thumb, alt, loading: "lazy", decoding: "async", draggable: "false" });
    shown.addEventListener("error", missing);
    frame.append(put(shown, cut));
    if (mode === "heat" && values && layer.grid) {
      frame.classList.add("heated");
      frame.append(put(heat(values, layer.grid, largest), cut));
    }
    if (mode !== "crop" && at && spot) {
      const [left, top, width, height] = cut;
      const [rows, columns] = layer.grid;
      const box = [left + (at[1] / columns) * width, top + (at[0] / rows) * height, width / columns, height / rows];
      frame.append(put(el("i", { class: "spot" }), box));
    }
    return frame;
  }

  /** What the colours of heat mean: from -largest to largest. */
  function scale(largest) {
    const end = format.number(largest);
    return el(
      "span",
      { class: "heat-scale" },
      el("span", { class: "negative" }, "\u2212" + end),
      el("i", { "aria-hidden": "true" }),
      el("span", { class: "positive" }, "+" + end),
    );
  }

  Elude.pictures = { picture, heat, scale, unpack, place };
})();
