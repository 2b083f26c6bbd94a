/** The image: what of it the model saw, the heat of the feature that is looked at, and the box that edits are kept to. */

const { el, format, pictures } = window.Elude;
const THUMBNAIL = 320; // pixels of the longer side of the view that the feature list shows

/**
 * @typedef {Object} Loaded an image of the page
 * @property {string} name            of the file
 * @property {Blob} file              as it is sent
 * @property {string | null} sent     by which the explorer knows it
 * @property {ImageBitmap} bitmap     upright
 * @property {string} [note]          what is said about it
 */

/** Read an image file as the browser does, upright. @returns {Promise<ImageBitmap>} */
export function decode(file) {
  return createImageBitmap(file, { imageOrientation: "from-image" });
}

export class Stage {
  /**
   * @param {HTMLElement} frame  holds the picture
   * @param {(box: [number, number, number, number] | null) => void} onBox  a box was drawn, in fractions of the image
   */
  constructor(frame, onBox) {
    this.frame = frame;
    this.onBox = onBox;
    this.canvas = el("canvas", { class: "whole", role: "img" });
    this.heat = el("span", { class: "heat" });
    this.window = el("span", { class: "window" });
    this.box = el("span", { class: "box", hidden: true });
    this.area = el("span", { class: "area", hidden: true }, this.canvas, this.heat, this.window, this.box);
    frame.prepend(this.area);
    this.image = null;
    this.drawing = false;
    this.#listen();
  }

  /** Show an image, at first all of it alike. @param {Loaded | null} image */
  show(image) {
    this.image = image;
    this.seen = null;
    this.area.hidden = !image;
    this.frame.classList.toggle("empty", !image);
    this.lookAt(null);
    if (!image) return;
    const { bitmap } = image;
    const scale = Math.min(1, 1024 / Math.max(bitmap.width, bitmap.height));
    this.canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    this.canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    this.canvas.getContext("2d").drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    this.canvas.setAttribute("aria-label", `${image.name}, the image asked about`);
    this.area.style.aspectRatio = `${bitmap.width} / ${bitmap.height}`;
    this.area.style.setProperty("--aspect", bitmap.width / bitmap.height);
    this.window.hidden = true;
  }

  /**
   * Mark what the model saw. The window may reach beyond the image, where that was padded.
   * @param {{width: number, height: number, window: number[]}} input  of a reply
   */
  mark(input) {
    const [x0, y0, x1, y1] = input.window;
    this.seen = [x0 / input.width, y0 / input.height, x1 / input.width, y1 / input.height];
    this.window.hidden = false;
    place(this.window, this.seen);
    place(this.heat, this.seen);
  }

  /**
   * The model's view as a small picture, for the feature list.
   * @param {{width: number, height: number, window: number[]}} input
   * @returns {Promise<{thumb: string, aspect: number}>} an object address, to be revoked by the caller
   */
  async view(input) {
    const [x0, y0, x1, y1] = input.window;
    const aspect = (x1 - x0) / (y1 - y0);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(aspect >= 1 ? THUMBNAIL : THUMBNAIL * aspect));
    canvas.height = Math.max(1, Math.round(aspect >= 1 ? THUMBNAIL / aspect : THUMBNAIL));
    const context = canvas.getContext("2d");
    const across = canvas.width / (x1 - x0);
    const down = canvas.height / (y1 - y0);
    const { bitmap } = this.image;
    context.drawImage(bitmap, -x0 * across, -y0 * down, input.width * across, input.height * down);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.9));
    return { thumb: URL.createObjectURL(blob), aspect };
  }

  /**
   * Lay a feature's heat over the image, or take it away.
   * @param {{values: number[], grid: [number, number], largest: number} | null} heat
   */
  lookAt(heat) {
    this.heat.replaceChildren();
    this.frame.classList.toggle("heated", Boolean(heat));
    if (heat && this.seen) this.heat.append(pictures.heat(heat.values, heat.grid, heat.largest));
  }

  /** Whether a box can be drawn, and the one there is. @param {boolean} drawing @param {number[] | null} box */
  setBox(drawing, box) {
    this.drawing = drawing;
    this.frame.classList.toggle("drawing", drawing);
    this.box.hidden = !(drawing && box);
    if (drawing && box) {
      place(this.box, box);
      this.box.setAttribute("title", `${box.map((v) => format.percent(v)).join(", ")}`);
    }
  }

  #listen() {
    let from = null;
    const at = (event) => {
      const area = this.area.getBoundingClientRect();
      const fraction = (value, start, size) => Math.min(1, Math.max(0, (value - start) / size));
      return [fraction(event.clientX, area.left, area.width), fraction(event.clientY, area.top, area.height)];
    };
    this.area.addEventListener("pointerdown", (event) => {
      if (!this.drawing || event.button !== 0) return;
      event.preventDefault();
      this.area.setPointerCapture(event.pointerId);
      from = at(event);
    });
    this.area.addEventListener("pointermove", (event) => {
      if (from) this.setBox(true, between(from, at(event)));
    });
    const end = (event) => {
      if (!from) return;
      const box = between(from, at(event));
      from = null;
      if (event.type === "pointerup" && box[2] - box[0] > 0.01 && box[3] - box[1] > 0.01) this.onBox(box);
      else this.onBox(null);
    };
    this.area.addEventListener("pointerup", end);
    this.area.addEventListener("pointercancel", end);
  }
}

function between([ax, ay], [bx, by]) {
  const round = (value) => Math.round(1000 * value) / 1000;
  return [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)].map(round);
}

/** Put an element over fractions of its parent. */
function place(node, [x0, y0, x1, y1]) {
  const style = { left: x0, top: y0, width: x1 - x0, height: y1 - y0 };
  for (const [name, value] of Object.entries(style)) node.style.setProperty(name, `${100 * value}%`);
}
