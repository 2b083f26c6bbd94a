/** What one takes along: the present request as text, and the edits as a policy beside the checkpoint. */

import { post } from "./api.js";
import { asCurl, asPython, copiedRequest } from "./requests.js";

const { el } = window.Elude;

export class CopyPanel {
  /** @param {HTMLElement} place  with a <pre>, a note and buttons by their data-kind */
  constructor(place) {
    this.place = place;
    this.text = place.querySelector("pre");
    this.note = place.querySelector(".note");
    this.content = null;
    for (const input of place.querySelectorAll("input[name=copy-kind]"))
      input.addEventListener("change", () => this.#draw());
    place.querySelector(".copy").addEventListener("click", (event) => this.#copy(event.target));
  }

  /**
   * @param {{server: object, view: object, file: string, note: Node | string | null} | null} content
   *   view: as `copiedRequest` takes it; null while there is nothing to ask
   */
  show(content) {
    this.content = content;
    this.#draw();
  }

  #draw() {
    this.place.hidden = !this.content;
    if (!this.content) return;
    const { server, view, file, note } = this.content;
    const kind = this.place.querySelector("input[name=copy-kind]:checked").value;
    this.text.textContent = (kind === "curl" ? asCurl : asPython)(server, file, copiedRequest(view));
    const token = "$TOKEN is the server's inference key: the terminal that runs this explorer says how to read it.";
    this.note.replaceChildren(...[server.has_token ? `${token} ` : "", note ?? ""]);
  }

  async #copy(button) {
    const said = button.textContent;
    try {
      await navigator.clipboard.writeText(this.text.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(this.text); // a browser that keeps the clipboard to itself
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => (button.textContent = said), 1500);
  }
}

export class PolicyDialog {
  /** @param {HTMLDialogElement} dialog @param {() => object[]} edits  the present ones @param {string} checkpoint */
  constructor(dialog, edits, checkpoint) {
    Object.assign(this, { dialog, edits, checkpoint });
    this.name = dialog.querySelector("#policy-name");
    this.description = dialog.querySelector("#policy-description");
    this.said = dialog.querySelector(".said");
    this.save = dialog.querySelector(".save");
    this.save.addEventListener("click", () => this.#save());
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    for (const field of [this.name, this.description]) {
      field.addEventListener("keydown", (event) => event.key === "Enter" && this.#save());
    }
  }

  open() {
    const list = this.dialog.querySelector(".edits");
    list.replaceChildren(...this.edits().map((edit) => el("li", { class: "mono small" }, words(edit))));
    this.said.replaceChildren();
    this.dialog.showModal();
    this.name.focus();
  }

  async #save() {
    if (!/^[A-Za-z0-9._-]{1,64}$/.test(this.name.value)) {
      this.#say("bad", "A name has 1 to 64 letters, digits, dots, dashes and underscores.");
      return;
    }
    this.save.disabled = true;
    try {
      const wish = { name: this.name.value, change: { edits: this.edits() } };
      const description = this.description.value.trim();
      const stored = await post("api/policies", { ...wish, ...(description && { description }) });
      const done = stored.replaced ? "Replaced" : "Stored";
      this.#say(
        "plain",
        `${done} in ${stored.file}. A server has it after the next archive and a restart; then requests may name it: {"policies": ["${stored.name}"]}.`,
        `elude archive ${this.checkpoint} --force`,
      );
    } catch (error) {
      this.#say("bad", error.message);
    } finally {
      this.save.disabled = false;
    }
  }

  #say(tone, text, command) {
    this.said.replaceChildren(
      el("div", { class: `state slim notice ${tone}` }, text, command && el("code", { class: "command" }, command)),
    );
  }
}

/** An edit as a short line. */
export function words({ feature, mode, value, apply }) {
  const scope = !apply ? "" : apply.box ? ` in box ${apply.box.join(", ")}` : ` on ${apply.tokens}`;
  return `${feature} ${mode}${value === undefined ? "" : ` ${value}`}${scope}`;
}
