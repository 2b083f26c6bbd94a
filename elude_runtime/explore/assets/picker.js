/** A search field with a list of what it finds: arrow keys, Enter, Escape, or a click. */

const { el } = window.Elude;
let count = 0;

export class Picker {
  /**
   * @param {HTMLInputElement} input
   * @param {(text: string) => Promise<Array<{name: string, detail?: string, value: any}>>} find
   *   what fits the text; a rejection is shown in the list
   * @param {(value: any) => void} onPick
   */
  constructor(input, find, onPick) {
    Object.assign(this, { input, find, onPick, found: [], marked: -1, turn: 0 });
    this.list = el("ul", { class: "found", role: "listbox", id: `found-${++count}`, hidden: true });
    input.after(this.list);
    const attributes = {
      role: "combobox",
      "aria-expanded": "false",
      "aria-controls": this.list.id,
      "aria-autocomplete": "list",
      autocomplete: "off",
    };
    for (const [name, value] of Object.entries(attributes)) input.setAttribute(name, value);
    input.addEventListener("input", () => this.#search());
    input.addEventListener("focus", () => this.#search());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("blur", () => this.close());
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
  }

  close() {
    this.turn++;
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }

  async #search() {
    const turn = ++this.turn;
    let found;
    let problem = "";
    try {
      found = await this.find(this.input.value.trim());
    } catch (error) {
      [found, problem] = [[], error.message];
    }
    if (turn !== this.turn) return; // something newer is looked for
    this.found = found;
    const options = found.map((one, i) =>
      el(
        "li",
        { role: "option", id: `${this.list.id}-${i}`, onclick: () => this.#pick(i) },
        el("span", { class: "name" }, one.name),
        one.detail && el("span", { class: "faint small" }, one.detail),
      ),
    );
    this.list.replaceChildren(
      ...(options.length ? options : [el("li", { class: "faint" }, problem || "Nothing fits.")]),
    );
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.#mark(found.length && this.input.value.trim() ? 0 : -1);
  }

  #mark(index) {
    this.marked = index;
    [...this.list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === index)));
    const option = this.list.children[index];
    if (option && this.found.length) this.input.setAttribute("aria-activedescendant", option.id);
    else this.input.removeAttribute("aria-activedescendant");
    option?.scrollIntoView({ block: "nearest" });
  }

  #key(event) {
    if (event.key === "Escape") return this.close();
    if (this.list.hidden && event.key === "ArrowDown") return this.#search();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && this.found.length) {
      event.preventDefault();
      this.#mark((this.marked + step + this.found.length) % this.found.length);
    } else if (event.key === "Enter" && this.marked >= 0 && !this.list.hidden) {
      event.preventDefault();
      this.#pick(this.marked);
    }
  }

  #pick(index) {
    const { value } = this.found[index];
    this.input.value = "";
    this.close();
    this.onPick(value);
  }
}
