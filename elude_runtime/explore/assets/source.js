/** Where images come from: a file that is chosen, dropped or pasted, or an exemplar of the catalogue. */

const { el } = window.Elude;

/**
 * @typedef {Object} About what is known of an image beside its content
 * @property {string} name
 * @property {string} [note]  said about it
 * @property {string} [path]  where it lies for whoever started the explorer; a browser tells no path of a chosen file
 */

export class Sources {
  /**
   * @param {HTMLInputElement} field  of type file
   * @param {HTMLElement} place       of the exemplars
   * @param {{onImage: (file: Blob, about: About) => void, onMissing: (title: string, detail: string) => void}} listeners
   */
  constructor(field, place, { onImage, onMissing }) {
    Object.assign(this, { field, place, onImage, onMissing });
  }

  /** Take files that are chosen, dropped anywhere on the page, or pasted. */
  listen() {
    this.field.addEventListener("change", () => {
      this.#take(this.field.files);
      this.field.value = ""; // the same file again is a choice, too
    });
    const { body } = document;
    for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
    document.addEventListener("dragenter", () => body.classList.add("dragging"));
    document.addEventListener("dragleave", (event) => event.relatedTarget || body.classList.remove("dragging"));
    document.addEventListener("drop", (event) => {
      body.classList.remove("dragging");
      this.#take(event.dataTransfer.files);
    });
    document.addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
      this.#take(files, "Pasted.");
    });
  }

  /** The first image of some files; the first file where none says that it is one, so that the page can say why not. */
  #take(files, note) {
    const file = [...files].find((one) => one.type.startsWith("image/")) ?? files[0];
    if (file) this.onImage(file, { name: file.name || "pasted.png", note });
  }

  /** Offer exemplars. @param {Array<import("./features.js").Exemplar>} samples @param {string} title */
  show(samples, title) {
    const buttons = samples.map((sample) => {
      const picture = el("img", { src: `api/samples/${sample.number}`, alt: sample.name, loading: "lazy" });
      picture.addEventListener("error", () => picture.closest("button").remove());
      return el("button", { type: "button", title: sample.name, onclick: () => this.use(sample) }, picture);
    });
    this.place.replaceChildren(el("p", { class: "small faint" }, title), el("div", { class: "strip" }, buttons));
  }

  /** Say why there are none. @param {string} path  of the checkpoint */
  hint(title, path) {
    const command = el("code", null, `elude catalogue ${path} --images DIR`);
    this.place.replaceChildren(el("p", { class: "small faint" }, `${title} `, command));
  }

  /** Take an exemplar itself, or its thumbnail where it has moved. */
  async use(sample) {
    const { number, name, file, thumbnail } = sample;
    const original = file && (await blobOf(`api/samples/${number}/original`));
    if (original) return this.onImage(original, { name, path: file });
    const copy = await blobOf(`api/samples/${number}`);
    const note =
      "The image itself has moved: this is the small copy of what the model saw, and is answered differently.";
    if (copy) return this.onImage(copy, { name, note, path: thumbnail });
    this.onMissing(`${name} is not there any more`, "Make the catalogue again, or choose a file.");
  }
}

/** @returns {Promise<Blob | null>} */
async function blobOf(address) {
  const reply = await fetch(address).catch(() => null);
  return reply?.ok ? reply.blob() : null;
}
