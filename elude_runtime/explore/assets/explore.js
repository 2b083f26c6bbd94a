/** The explorer: one image, what carried its prediction, and what happens when features are turned up and down. */

import { ask, get, post, Problem } from "./api.js";
import { addedOf, Features, fits, groupsOf } from "./features.js";
import { CopyPanel, PolicyDialog } from "./keep.js";
import { Latest } from "./latest.js";
import { Notices } from "./notices.js";
import { Predictions, rowsOf } from "./predictions.js";
import { editsOf, explanationRequest, predictionRequest, TOP_K } from "./requests.js";
import { Sources } from "./source.js";
import { decode, Stage } from "./stage.js";
import { Toolbar } from "./toolbar.js";

const { el, format, fromHash, pictures, ready } = window.Elude;
const POLL = 2000; // milliseconds between looks whether a server is back

const $ = (id) => document.getElementById(id);

class Explorer {
  constructor() {
    this.checkpoint = null; // what /api/checkpoint says
    this.server = null; // what /api/server says, null while it cannot be asked
    this.image = null; // Loaded, see stage.js
    this.factors = new Map(); // feature -> factor; 1 is left out
    this.added = []; // features of the user's choice
    this.reply = null; // the newest prediction
    this.explained = null; // the newest explanation, with the view it was drawn on
    this.embedding = null; // of the image, where the model has no classes
    this.recovering = 0;
    this.turn = 0; // grows with every image
    this.drawing = 0; // grows with every explanation to be drawn

    this.notices = new Notices($("notices"));
    this.stage = new Stage($("stage"), (box) => this.toolbar.setScope({ kind: "box", box }));
    this.toolbar = new Toolbar({
      onView: () => this.#askAll(),
      onChange: () => this.#changed(),
      onAdd: (feature) => this.#add(feature),
      onReset: () => this.#reset(),
      onSave: () => this.dialog.open(),
      onScope: (scope) => this.stage.setBox(scope.kind === "box", scope.box),
    });
    this.predictions = new Predictions($("answer"), (index) => this.toolbar.setTarget(index));
    this.features = new Features($("features"), {
      onSteer: (feature, factor) => this.#steer(feature, factor),
      onLook: (heat, name, prefix) => this.#look(heat, name, prefix),
      onRemove: (feature) => this.#remove(feature),
    });
    this.copy = new CopyPanel($("copy"));
    this.sources = new Sources($("choose"), $("samples"), {
      onImage: (file, about) => this.load(file, about),
      onMissing: (title, detail) => this.notices.show("image", { title, detail }),
    });
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
        this.notices.show(kind, {
          title: "The server has too much to do",
          detail: `It is asked again in ${seconds} s.`,
          tone: "warn",
        }),
    });
    this.predicting = new Latest(
      send("predicting"),
      listeners("predicting", (answer) => this.#predicted(answer)),
    );
    this.explaining = new Latest(
      send("explaining"),
      listeners("explaining", (answer) => this.#explainedBy(answer)),
    );
  }

  async start() {
    try {
      this.checkpoint = await get("api/checkpoint");
    } catch (error) {
      this.#outage(error, () => this.start());
      ready();
      return;
    }
    this.dialog = new PolicyDialog($("policy"), () => this.#edits(), this.checkpoint.path);
    this.toolbar.setUp(this.checkpoint);
    this.sources.listen();
    const { samples, catalogue_missing: missing, path } = this.checkpoint;
    if (samples.length) this.sources.show(samples, "Or one of the catalogue's images:");
    else this.sources.hint(missing ? "No exemplar images or labels yet:" : "The catalogue holds no pictures:", path);
    window.addEventListener("hashchange", () => this.#fromAddress());
    await this.#connect();
    await this.#fromAddress();
    ready();
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
    this.toolbar.showPolicies(this.server.policies);
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

  /** Take a new image. @param {Blob} file @param {import("./source.js").About} about */
  async load(file, { name, note = "", path = "" }) {
    this.notices.clear("image");
    const turn = ++this.turn;
    let bitmap;
    try {
      bitmap = await decode(file);
    } catch {
      this.notices.show("image", {
        title: `${name} is no image that this browser can show`,
        detail: "Choose a JPEG, PNG or WebP file.",
      });
      return;
    }
    if (turn !== this.turn) return; // a newer image was chosen meanwhile
    this.predicting.cancel();
    this.explaining.cancel();
    this.notices.clear("predicting", "explaining");
    this.image = { file, name, note, path, bitmap, sent: null };
    this.reply = this.explained = this.embedding = null;
    this.drawing++;
    this.stage.show(this.image);
    this.toolbar.showScope({ ...this.toolbar.scope, box: null }); // it was drawn on the image before
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
    const [view, faces] = await Promise.all([
      this.stage.view(reply.input),
      post("api/exemplars", names).catch(() => ({})),
    ]);
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
    const unknown = kind === "explaining" && problem.type === "unknown-feature" && this.added.length > 0;
    this.notices.show(ofImage ? "image" : unknown ? "feature" : kind, { title: problem.title, detail: problem.detail });
    if (unknown) {
      this.added = this.wanted ? this.added.filter((feature) => feature !== this.wanted) : [];
      this.wanted = null;
      this.#explain();
    }
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

  #add(feature) {
    this.notices.clear("feature");
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
    this.toolbar.policies = [];
    this.toolbar.showPolicies(this.server?.policies ?? []);
    this.features.update(this.factors);
    this.#changed();
  }

  /** Look at a feature's heat over the whole image. */
  #look(heat, name, prefix) {
    this.stage.lookAt(heat);
    const where = prefix ? "on the class token" : "no place in the image";
    const said = el("span", null, heat ? name : `${name}: ${where}`);
    $("looking").replaceChildren(...(name ? [said, heat ? pictures.scale(heat.largest) : ""] : []));
  }

  // --- what is drawn ---------------------------------------------------------------------------------------------------

  /** The edits in force: those that the scope leaves some tokens. */
  #edits() {
    const { scope } = this.toolbar;
    if (scope.kind === "box" && !scope.box) return []; // none is drawn on this image yet
    const acting = [...this.factors].filter(([feature]) => fits(feature, scope, this.checkpoint.layers));
    return editsOf(new Map(acting), scope);
  }

  #sayIdle(acting) {
    const idle = [...this.factors.keys()].filter((feature) => !acting.some((edit) => edit.feature === feature));
    if (!idle.length) return this.notices.clear("scope");
    if (this.toolbar.scope.kind === "box" && !this.toolbar.scope.box) {
      const title = "Nothing is changed until a box is drawn on this image";
      return this.notices.show("scope", { title, detail: "Or let the features act everywhere.", tone: "warn" });
    }
    const where = { cls: "the class token", patches: "patches", box: "the box" }[this.toolbar.scope.kind];
    const title = `Kept to ${where}, ${idle.join(" and ")} ${idle.length > 1 ? "change" : "changes"} nothing`;
    this.notices.show("scope", { title, detail: "Features of other tokens are left as they are.", tone: "warn" });
  }

  #view() {
    const { target, level, method, policies } = this.toolbar;
    const first = this.reply ? rowsOf({ predictions: this.reply.predictions.slice(0, TOP_K) }) : new Map();
    return {
      edits: this.#edits(),
      policies,
      target: this.embedding ? { direction: this.embedding } : (target ?? "top1"),
      pinned: target !== null && !first.has(target),
      classes: this.checkpoint.labels.length,
      level,
      method,
      added: this.added,
    };
  }

  #draw() {
    const view = this.#view();
    this.toolbar.showCount(this.factors.size, view.edits.length);
    this.#sayIdle(view.edits);
    if (this.reply) {
      // An answer that is steered by what was just taken back is not shown as if it still were.
      const steering = view.edits.length + view.policies.length + this.reply.answer.policies.length > 0;
      const reply = steering ? this.reply : { ...this.reply, steered: null };
      this.predictions.show(reply, { target: this.toolbar.target, count: TOP_K, facts: this.#facts(reply) });
    }
    const file = this.image?.path || this.image?.name;
    this.copy.show(this.image && this.server ? { server: this.server, view, file, note: this.#copyNote() } : null);
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

  /** `#feature=LAYER/P17`: steer this feature, on one of its own exemplars where there is no image yet. */
  async #fromAddress() {
    const feature = new URLSearchParams(fromHash()).get("feature");
    if (!feature) return;
    const { [feature]: face } = await post("api/exemplars", { features: [feature] }).catch(() => ({}));
    this.#add(feature);
    const own = Object.values(face?.ends ?? {})
      .flat()
      .filter((one) => one.thumbnail);
    own.sort((a, b) => Math.abs(b.activation) - Math.abs(a.activation));
    if (!own.length) return;
    this.sources.show(own, `Images where ${face.label || feature} is most active:`);
    if (!this.image) await this.sources.use(own[0]);
  }
}

const explorer = new Explorer();
explorer.start();
