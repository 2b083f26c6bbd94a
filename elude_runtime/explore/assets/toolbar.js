/** What is asked beside the factors: which class, features and method, where edits act, which stored policies. */

import { post } from "./api.js";
import { Picker } from "./picker.js";

const { el } = window.Elude;
const OFFERED = 20; // classes or features that a search lists

const $ = (id) => document.getElementById(id);

export class Toolbar {
  /**
   * @param {Object} listeners
   * @param {() => void} listeners.onView    another class, level or method is to be explained
   * @param {() => void} listeners.onChange  edits act elsewhere, or policies changed
   * @param {(feature: string) => void} listeners.onAdd
   * @param {() => void} listeners.onReset
   * @param {() => void} listeners.onSave
   * @param {(scope: import("./requests.js").Scope) => void} listeners.onScope  to be drawn
   */
  constructor(listeners) {
    Object.assign(this, listeners);
    this.target = null; // class index, null for the top one
    this.policies = []; // names of stored ones that are asked for
    this.scope = { kind: "all", box: null };
    this.boxFields = [...$("box-fields").querySelectorAll("input")];
  }

  get level() {
    return document.querySelector("input[name=level]:checked").value;
  }

  get method() {
    return $("method").value;
  }

  /** @param {{layers: object[], labels: string[], output: string}} checkpoint */
  setUp({ layers, labels, output }) {
    const on = (nodes, act) => [...nodes].forEach((node) => node.addEventListener("change", () => act(node)));
    on(document.querySelectorAll("input[name=level], #method"), () => this.onView());
    on(document.querySelectorAll("input[name=scope]"), (input) => this.setScope({ ...this.scope, kind: input.value }));
    on(this.boxFields, () => this.#boxFromFields());
    $("reset").addEventListener("click", () => this.onReset());
    $("save").addEventListener("click", () => this.onSave());
    $("target-reset").addEventListener("click", () => this.setTarget(null));
    $("scope-cls").hidden = !layers.some((layer) => layer.prefix > 0);
    $("scope-box").hidden = !layers.some((layer) => layer.grid);
    $("scope").hidden = $("scope-cls").hidden && $("scope-box").hidden;
    $("target").hidden = output !== "logits";
    const classes = async (text) => classesLike(labels, text);
    new Picker($("target-search"), classes, (index) => this.setTarget(index));
    new Picker($("feature-search"), featuresLike, (feature) => this.onAdd(feature));
  }

  /** @param {number | null} index */
  setTarget(index) {
    this.target = index;
    $("target-reset").hidden = index === null;
    this.onView();
  }

  /** @param {import("./requests.js").Scope} scope */
  setScope(scope) {
    this.showScope(scope);
    this.onChange();
  }

  /** The same where nothing is to be asked for it. */
  showScope(scope) {
    this.scope = scope;
    $("box-fields").hidden = scope.kind !== "box";
    $("box-hint").hidden = Boolean(scope.box);
    this.boxFields.forEach((field, i) => (field.value = scope.box ? Math.round(100 * scope.box[i]) : ""));
    this.onScope(scope);
  }

  #boxFromFields() {
    const box = this.boxFields.map((field) => Number(field.value || NaN) / 100);
    const fits = box.every((v) => v >= 0 && v <= 1) && box[0] < box[2] && box[1] < box[3];
    if (fits) this.setScope({ kind: "box", box });
  }

  /** The stored policies of a server, to ask for. @param {Array<{name: string, mode: string, description: string | null}>} stored */
  showPolicies(stored) {
    this.policies = this.policies.filter((name) => stored.some((one) => one.name === name));
    $("policies").hidden = !stored.length;
    $("policies").replaceChildren(
      el("span", { class: "small faint" }, "Policies of the server:"),
      ...stored.map(({ name, mode, description }) => {
        const checked = mode === "default" || this.policies.includes(name);
        const box = el("input", { type: "checkbox", checked, disabled: mode === "default" || mode === "off" });
        box.addEventListener("change", () => {
          this.policies = box.checked ? [...this.policies, name] : this.policies.filter((one) => one !== name);
          this.onChange();
        });
        const said = mode === "on request" ? name : `${name} (${mode})`;
        return el("label", { class: "labelled small", title: description ?? "" }, box, said);
      }),
    );
  }

  /** @param {number} changed  features @param {number} edits  those of them that are in force */
  showCount(changed, edits) {
    $("reset").disabled = !changed && !this.policies.length;
    $("save").disabled = !edits;
    $("reset").textContent = changed ? `Reset (${changed})` : "Reset";
  }
}

/** Classes whose name holds the text, those that begin with it first; by number, too, where there are no names. */
function classesLike(labels, text) {
  const wanted = text.toLowerCase();
  const all = labels.map((label, index) => ({ name: label, detail: `class ${index}`, value: index }));
  const found = all.filter(({ name, value }) => name.toLowerCase().includes(wanted) || String(value) === wanted);
  if (!labels.length && /^\d{1,6}$/.test(wanted)) return [{ name: `class ${wanted}`, value: Number(wanted) }];
  const begins = ({ name }) => (name.toLowerCase().startsWith(wanted) ? 0 : 1);
  return found.sort((a, b) => begins(a) - begins(b)).slice(0, OFFERED);
}

async function featuresLike(text) {
  const found = await post("api/features", { limit: OFFERED, ...(text && { query: text }) });
  const named = ({ feature, label, kind }) => ({
    name: label || feature,
    detail: label ? feature : kind,
    value: feature,
  });
  return found.features.map(named);
}
