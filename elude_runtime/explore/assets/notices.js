/** What keeps the page from going on, or is worth knowing: one notice of a kind, gone when it is over. */

const { el } = window.Elude;

export class Notices {
  /** @param {HTMLElement} place  a live region */
  constructor(place) {
    this.place = place;
    this.kinds = new Map();
  }

  /**
   * @param {string} kind  a new notice takes the place of the one of its kind
   * @param {{title: string, detail?: string, tone?: "bad" | "warn" | "plain", command?: string, action?: [string, () => void]}} content
   */
  show(kind, { title, detail, tone = "bad", command, action }) {
    const notice = el(
      "div",
      { class: `state slim notice ${tone}`, "data-kind": kind },
      el("strong", null, title),
      detail && el("p", null, detail),
      command && el("code", { class: "command" }, command),
      action && el("p", null, el("button", { type: "button", class: "button", onclick: action[1] }, action[0])),
    );
    const text = notice.textContent;
    if (this.kinds.get(kind)?.textContent === text) return; // said already: a live region must not repeat itself
    this.kinds.get(kind)?.remove();
    this.kinds.set(kind, notice);
    this.place.append(notice);
  }

  clear(...kinds) {
    for (const kind of kinds) {
      this.kinds.get(kind)?.remove();
      this.kinds.delete(kind);
    }
  }
}
