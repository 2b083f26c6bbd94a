/** The explorer: one image, what carried its prediction, and what happens when features are turned up and down. */

import { ask, get, post, Problem } from "./api.js";
import { addedOf, Features, groupsOf } from "./features.js";
import { CopyPanel, PolicyDialog } from "./keep.js";
import { Latest } from "./latest.js";
import { Notices } from "./notices.js";
import { Picker } from "./picker.js";
import { Predictions, rowsOf } from "./predictions.js";
import { editsOf, explanationRequest, predictionRequest, TOP_K } from "./requests.js";
import { decode, Stage } from "./stage.js";

const { el, format, fromHash, pictures } = window.Elude;
const SHOWN_CLASSES = 5;
const POLL = 2000; // milliseconds between looks whether a server is back

const $ = (id) => document.getElementById(id);

class Explorer {
  constructor() {
    this.checkpoint = null; // what /api/checkpoint says
    this.server = null; // what /api/server says, null while it cannot be asked
    this.image = null; // Loaded, see stage.js
    this.target = null; // class index, null for the top one
    this.factors = new Map(); // feature -> factor; 1 is left out
    this.added = []; // features of the user's choice
    this.policies = []; // stored ones that are asked for
    this.scope = { kind: "all", box: null };
    this.reply = null; // the newest prediction
    this.explained = null; // the newest explanation, with the view it was drawn on
    this.embedding = null; // of the image, where the model has no classes
    this.recovering = 0;
    this.turn = 0; // grows with every image
    this.drawing = 0; // grows with every explanation to be drawn

    this.notices = new Notices($("notices"));
    this.stage = new Stage($("stage"), (box) => this.#setScope({ kind: "box", box }));
    this.predictions = new Predictions($("answer"), (index) => this.#setTarget(index));
    this.features = new Features($("features"), {
      onSteer: (feature, factor) => this.#steer(feature, factor),
      onLook: (heat, name, prefix) => this.#look(heat, name, prefix),
      onRemove: (feature) => this.#remove(feature),
    });
    this.copy = new CopyPanel($("copy"));
    const send = (kind) => async (request, signal) => {
      const started = performance.now();
      const reply = await ask(this.image, request(), signal);
      return { reply, kind, took: performance.now() - started };
    };
    const listeners = (kind, onAnswer) => ({
      onAnswer,
      onProblem: (problem) => this.#problem(kind, problem),
      onBusy: (busy) => $(kind === "predicting" ? "answer" : "features").classList.toggle("busy", busy),
      onWait: (seconds) =>
        this.notices.show(kind, { title: "The server has too much to do", detail: `It is asked again in ${seconds} s.`, tone: "warn" }), // prettier-ignore
    });
    this.predicting = new Latest(send("predicting"), listeners("predicting", (answer) => this.#predicted(answer)));
    this.explaining = new Latest(send("explaining"), listeners("explaining", (answer) => this.#explainedBy(answer)));
  }

  async start() {
    try {
      this.checkpoint = await get("api/checkpoint");
    } catch (error) {
      this.#outage(error, () => this.start());
      return;
    }
    this.dialog = new PolicyDialog($("policy"), () => this.#edits(), this.checkpoint.path);
    this.#controls();
    this.#samples();
    window.addEventListener("hashchange", () => this.#fromAddress());
    await this.#connect();
    await this.#fromAddress();
  }

  /** Ask the server what it is; where it does not answer, again and again. */
  async #connect() {
    try {
      this.server = await get("api/server");
    } catch (error) {
      this.server = null;
      this.#outage(error, () => this.#connect());
      return;
    }
    this.notices.clear("outage", "predicting", "explaining");
    this.#drawPolicies();
    this.#askAll();
  }

  /** @param {Problem} problem */
  #outage(problem, again) {
    if (!(problem instanceof Problem)) throw problem;
    clearTimeout(this.recovering);
    this.notices.show("outage", { title: problem.title, detail: problem.detail, action: ["Try again", again] });
    // Another checkpoint or version does not come right in seconds, but a server may be restarted with the right one.
    this.recovering = setTimeout(again, POLL);
  }

  // --- what is looked at -----------------------------------------------------------------------------------------------

  /** Take a new image. @param {Blob} file @param {string} name @param {string} [note] @param {string} [path] */
  async load(file, name, note = "", path = "") {
    this.predicting.cancel();
    this.explaining.cancel();
    this.notices.clear("image", "predicting", "explaining");
    const turn = ++this.turn;
    let bitmap;
    try {
      bitmap = await decode(file);
    } catch {
      this.notices.show("image", { title: `${name} is no image that this browser can show`, detail: "Choose a JPEG, PNG or WebP file." }); // prettier-ignore
      return;
    }
    if (turn !== this.turn) return; // a newer image was chosen meanwhile
    this.image = { file, name, note, path, bitmap, sent: null };
    this.reply = this.explained = this.embedding = null;
    this.drawing++;
    this.stage.show(this.image);
    this.#drawScope({ ...this.scope, box: null }); // it was drawn on the image before
    this.predictions.clear();
    this.features.show({ added: [], groups: [], view: null, layers: [], factors: this.factors, value: null });
    document.body.classList.add("has-image");
    $("seeing").append($("samples"));
    this.#say();
    this.#draw();
    this.#askAll();
  }

  #askAll() {
    if (!this.image || !this.server) return;
    this.#predict();
    this.#explain();
  }

  #predict() {
    if (this.image && this.server) this.predicting.ask(() => predictionRequest(this.#view()));
  }

  #explain() {
    if (!this.image || !this.server) return;
    if (this.checkpoint.output === "embedding" && !this.embedding) return; // asked for once the embedding is known
    this.explaining.ask(() => explanationRequest(this.#view()));
  }

  #predicted({ reply, took }) {
    this.notices.clear("predicting", "image", "outage");
    this.reply = reply;
    this.took = took;
    this.stage.mark(reply.input);
    if (reply.embedding && !this.embedding) {
      const norm = Math.hypot(...reply.embedding);
      this.embedding = reply.embedding.map((value) => value / (norm || 1));
      this.#explain();
    }
    this.#warn(reply.warnings);
    this.#draw();
  }

  async #explainedBy({ reply }) {
    this.notices.clear("explaining");
    const turn = ++this.drawing;
    const groups = groupsOf(reply, this.checkpoint.layers);
    const added = addedOf(reply, this.checkpoint.layers);
    const shown = [...added, ...groups.flatMap((group) => group.features)];
    const names = { features: shown.map((f) => f.feature) };
    const [view, faces] = await Promise.all([this.stage.view(reply.input), post("api/exemplars", names).catch(() => ({}))]);
    if (turn !== this.drawing) return URL.revokeObjectURL(view.thumb); // a newer explanation, or image
    if (this.explained) URL.revokeObjectURL(this.explained.view.thumb);
    this.explained = { reply, view };
    for (const one of shown) one.face = faces[one.feature];
    const [first] = reply.explanations;
    this.features.show({
      added,
      groups,
      view,
      layers: this.checkpoint.layers,
      factors: this.factors,
      value: first.value,
    });
    $("target-name").textContent =
      first.target.label ?? (first.target.direction ? "this image's own embedding" : `class ${first.target.index}`);
    if (this.wanted) this.features.reveal(this.wanted);
    this.wanted = null;
  }

  /** @param {"predicting" | "explaining"} kind @param {Problem} problem */
  #problem(kind, problem) {
    if (problem.isOutage) {
      this.server = null;
      this.#outage(problem, () => this.#connect());
      return;
    }
    const ofImage = ["invalid-image", "image-too-large", "server-too-large"].includes(problem.type);
    if (ofImage) this.explaining.cancel();
    this.notices.show(ofImage ? "image" : kind, { title: problem.title, detail: problem.detail });
  }

  #warn(warnings) {
    if (!warnings?.length) return this.notices.clear("warnings");
    const said = [...new Set(warnings.map((one) => one.detail))];
    this.notices.show("warnings", { title: said.join(" "), tone: "warn" });
  }

  // --- what is changed -------------------------------------------------------------------------------------------------

  #steer(feature, factor) {
    if (factor === 1) this.factors.delete(feature);
    else this.factors.set(feature, factor);
    this.features.update(this.factors);
    this.#changed();
  }

  #changed() {
    this.#draw();
    this.#predict();
  }

  #setScope(scope) {
    this.#drawScope(scope);
    this.#changed();
  }

  #drawScope(scope) {
    this.scope = scope;
    this.stage.setBox(scope.kind === "box", scope.box);
    $("box-hint").hidden = scope.kind !== "box" || Boolean(scope.box);
    $("box-fields").hidden = scope.kind !== "box";
    for (const [i, field] of [...$("box-fields").querySelectorAll("input")].entries()) {
      field.value = scope.box ? Math.round(100 * scope.box[i]) : "";
    }
  }

  #setTarget(index) {
    this.target = index;
    $("target-reset").hidden = index === null;
    this.#changed();
    this.#explain();
  }

  #add(feature) {
    if (!this.added.includes(feature)) this.added = [...this.added, feature];
    this.wanted = feature;
    if (this.features.rows.has(feature)) this.features.reveal(feature);
    else this.#explain();
  }

  #remove(feature) {
    this.added = this.added.filter((one) => one !== feature);
    this.#steer(feature, 1);
    this.#explain();
  }

  #reset() {
    this.factors.clear();
    this.policies = [];
    this.#drawPolicies();
    this.features.update(this.factors);
    this.#changed();
  }

  /** Look at a feature's heat over the whole image. */
  #look(heat, name, prefix) {
    this.stage.lookAt(heat);
    const said = heat ? [name, pictures.scale(heat.largest)] : [`${name}: ${prefix ? "on the class token" : "no place in the image"}`];
    $("looking").replaceChildren(...(name ? said : []));
  }

  // --- what is drawn ---------------------------------------------------------------------------------------------------

  #edits() {
    return editsOf(this.factors, this.scope);
  }

  #view() {
    const classes = this.checkpoint.labels.length;
    const known = this.reply ? rowsOf({ ...this.reply, predictions: this.reply.predictions.slice(0, TOP_K), steered: null }) : null;
    return {
      edits: this.#edits(),
      policies: this.policies,
      target: this.embedding ? { direction: this.embedding } : (this.target ?? "top1"),
      pinned: this.target !== null && !known?.has(this.target),
      classes,
      level: document.querySelector("input[name=level]:checked").value,
      method: $("method").value,
      added: this.added,
    };
  }

  #draw() {
    const edits = this.#edits();
    const steering = edits.length + this.policies.length > 0;
    $("reset").disabled = $("save").disabled = !steering;
    $("save").disabled = !edits.length;
    $("reset").textContent = edits.length ? `Reset (${edits.length})` : "Reset";
    if (this.reply) {
      // An answer that is steered by what was just taken back is not shown as if it still were.
      const inForce = this.reply.answer.policies.length > 0;
      const reply = steering || inForce ? this.reply : { ...this.reply, steered: null };
      const target = this.target;
      this.predictions.show(reply, { target, count: SHOWN_CLASSES, facts: this.#facts(reply) });
    }
    const file = this.image?.path || this.image?.name;
    this.copy.show(this.image && this.server ? { server: this.server, view: this.#view(), file, note: this.#copyNote() } : null);
  }

  #facts(reply) {
    const said = [`answered in ${format.number(this.took, 2)} ms`];
    if (reply.steered) {
      const norms = Object.values(reply.steered.relative_norm);
      said.unshift(`the layer's output moved by ${format.percent(Math.max(0, ...norms))} of its norm`);
    }
    if (reply.answer.policies.length) said.unshift(`policies in force: ${reply.answer.policies.join(", ")}`);
    return said.join("; ");
  }

  #copyNote() {
    if (this.image.path) return "";
    const link = el("a", { download: this.image.name, href: "#" }, "save the image");
    link.addEventListener("click", () => {
      const address = URL.createObjectURL(this.image.file);
      link.href = address;
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    });
    return el("span", null, "Run it in the folder that holds the image (", link, ").");
  }

  #say() {
    const { name, bitmap, note } = this.image;
    $("caption").textContent = `${name}, ${bitmap.width} × ${bitmap.height}${note ? `. ${note}` : ""}`;
  }

  #drawPolicies() {
    const stored = this.server?.policies ?? [];
    $("policies").hidden = !stored.length;
    $("policies").replaceChildren(
      el("span", { class: "small faint" }, "Policies of the server:"),
      ...stored.map((one) => {
        const on = one.mode === "default" || this.policies.includes(one.name);
        const box = el("input", { type: "checkbox", checked: on, disabled: one.mode === "default" || one.mode === "off" });
        box.addEventListener("change", () => {
          this.policies = box.checked ? [...this.policies, one.name] : this.policies.filter((name) => name !== one.name);
          this.#changed();
        });
        const mode = one.mode === "on request" ? "" : ` (${one.mode})`;
        return el("label", { class: "labelled small", title: one.description ?? "" }, box, one.name + mode);
      }),
    );
  }

  // --- controls --------------------------------------------------------------------------------------------------------

  #controls() {
    const { layers, labels, output } = this.checkpoint;
    const take = (file, note) => file && this.load(file, file.name || "pasted.png", note);
    $("choose").addEventListener("change", (event) => {
      take(event.target.files[0]);
      event.target.value = ""; // the same file again is a choice, too
    });
    for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
    document.addEventListener("dragenter", () => document.body.classList.add("dragging"));
    document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dragging"));
    document.addEventListener("drop", (event) => {
      document.body.classList.remove("dragging");
      const file = [...event.dataTransfer.files].find((one) => one.type.startsWith("image/")) ?? event.dataTransfer.files[0];
      if (file) take(file);
    });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
      if (file) this.load(file, file.name || "pasted.png", "Pasted.");
    });
    for (const input of document.querySelectorAll("input[name=level]")) input.addEventListener("change", () => this.#explain());
    $("method").addEventListener("change", () => this.#explain());
    $("reset").addEventListener("click", () => this.#reset());
    $("save").addEventListener("click", () => this.dialog.open());
    $("target-reset").addEventListener("click", () => this.#setTarget(null));
    for (const input of document.querySelectorAll("input[name=scope]")) {
      input.addEventListener("change", () => this.#setScope({ kind: input.value, box: this.scope.box }));
    }
    for (const field of $("box-fields").querySelectorAll("input")) field.addEventListener("change", () => this.#boxFromFields());
    $("scope-cls").hidden = !layers.some((layer) => layer.prefix > 0);
    $("scope-box").hidden = !layers.some((layer) => layer.grid);
    $("scope").hidden = $("scope-cls").hidden && $("scope-box").hidden;
    $("target").hidden = output !== "logits";
    new Picker($("target-search"), async (text) => classesLike(labels, text), (index) => this.#setTarget(index)); // prettier-ignore
    new Picker($("feature-search"), (text) => this.#featuresLike(text), (feature) => this.#add(feature)); // prettier-ignore
  }

  async #featuresLike(text) {
    const found = await post("api/features", { limit: 20, ...(text && { query: text }) });
    return found.features.map((f) => ({ name: f.label || f.feature, detail: f.label ? f.feature : f.kind, value: f.feature }));
  }

  #boxFromFields() {
    const values = [...$("box-fields").querySelectorAll("input")].map((field) => Number(field.value || NaN) / 100);
    const fits = values.every((v) => v >= 0 && v <= 1) && values[0] < values[2] && values[1] < values[3];
    if (fits) this.#setScope({ kind: "box", box: values });
  }

  /** Exemplar images of the catalogue, or why there are none. @param {string} [feature] those of this feature */
  #samples(samples = this.checkpoint.samples, title = "Or one of the catalogue's images:") {
    const { catalogue_missing: missing, path } = this.checkpoint;
    if (!samples.length) {
      $("samples").replaceChildren(
        el("p", { class: "small faint" }, missing ? "No exemplar images or labels yet: " : "The catalogue holds no pictures.", missing && el("code", null, `elude catalogue ${path} --images DIR`)),
      ); // prettier-ignore
      return;
    }
    $("samples").replaceChildren(
      el("p", { class: "small faint" }, title),
      el(
        "div",
        { class: "strip" },
        samples.map((sample) => {
          const picture = el("img", { src: `api/samples/${sample.number}`, alt: sample.name, loading: "lazy" });
          picture.addEventListener("error", () => picture.closest("button").remove());
          return el("button", { type: "button", title: sample.name, onclick: () => this.#useSample(sample) }, picture);
        }),
      ),
    );
  }

  async #useSample(sample) {
    const reply = await fetch(`api/samples/${sample.number}`).catch(() => null);
    if (!reply?.ok) {
      this.notices.show("image", { title: `${sample.name} is not there any more`, detail: "Make the catalogue again, or choose a file." }); // prettier-ignore
      return;
    }
    const note = "A small copy from the catalogue: the full image may be answered a little differently.";
    await this.load(await reply.blob(), sample.name, note, sample.path);
  }

  /** `#feature=LAYER/P17`: steer this feature, on one of its own exemplars where there is no image yet. */
  async #fromAddress() {
    const feature = new URLSearchParams(fromHash()).get("feature");
    if (!feature) return;
    const { [feature]: face } = await post("api/exemplars", { features: [feature] }).catch(() => ({}));
    this.#add(feature);
    const own = Object.values(face?.ends ?? {}).flat().filter((one) => one.path);
    if (!own.length) return;
    this.#samples(own, `Images where ${face.label || feature} is most active:`);
    if (!this.image) await this.#useSample(own[0]);
  }
}

/** Classes whose name holds the text, those that begin with it first. */
function classesLike(labels, text) {
  const wanted = text.toLowerCase();
  const all = labels.map((label, index) => ({ name: label, detail: `class ${index}`, value: index }));
  const found = all.filter(({ name, value }) => name.toLowerCase().includes(wanted) || String(value) === wanted);
  const begins = ({ name }) => (name.toLowerCase().startsWith(wanted) ? 0 : 1);
  return found.sort((a, b) => begins(a) - begins(b)).slice(0, 20);
}

const explorer = new Explorer();
explorer.start();
