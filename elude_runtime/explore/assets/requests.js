/** The documents that the page sends, and the same as text for a terminal and for Python. */

export const TOP_K = 5;
export const TOP_FEATURES = 12;
const PINNED_TOP_K = 1000; // where a class outside the first few is watched

/**
 * @typedef {Object} Scope where edits act
 * @property {"all" | "patches" | "cls" | "box"} kind
 * @property {[number, number, number, number] | null} box  fractions of the upright image, from its top left corner
 */

/** `steer.edits` for factors by feature; a factor of 1 changes nothing and is left out. @param {Map<string, number>} factors */
export function editsOf(factors, scope) {
  const apply = applyOf(scope);
  return [...factors]
    .filter(([, factor]) => factor !== 1)
    .map(([feature, factor]) => ({
      feature,
      ...(factor === 0 ? { mode: "ablate" } : { mode: "scale", value: factor }),
      ...(apply && { apply }),
    }));
}

/** @param {Scope} scope */
function applyOf(scope) {
  if (scope.kind === "box") return scope.box ? { box: scope.box } : null;
  return scope.kind === "all" ? null : { tokens: scope.kind };
}

/**
 * The prediction, steered where there is something to steer.
 * @param {{edits: object[], policies: string[], pinned: boolean, classes: number}} view
 *   pinned: a class outside the first few is looked at
 */
export function predictionRequest({ edits, policies, pinned, classes }) {
  const request = { top_k: pinned ? Math.min(classes || PINNED_TOP_K, PINNED_TOP_K) : TOP_K };
  if (edits.length || policies.length) {
    request.steer = { ...(edits.length && { edits }), ...(policies.length && { policies }) };
  }
  return request;
}

/**
 * What carried a target, with heatmaps; and where the features of the user's own choice are active.
 * @param {{target: any, level: string, method: string, added: string[]}} view
 */
export function explanationRequest({ target, level, method, added }) {
  const explain = { targets: [target], level, method, top_features: TOP_FEATURES, heatmaps: "values" };
  return { top_k: TOP_K, explain, ...(added.length && { activations: { features: added, reduce: "tokens" } }) };
}

/** What a copied request asks: the steered prediction where something is steered, else what carried the target. */
export function copiedRequest(view) {
  if (view.edits.length || view.policies.length) return predictionRequest({ ...view, pinned: false });
  const { targets, level, method, top_features } = explanationRequest({ ...view, added: [] }).explain;
  return { explain: { targets, level, method, top_features } };
}

// --- as text ---------------------------------------------------------------------------------------------------------

/** @param {{url: string, model: string, has_token: boolean}} server */
export function asCurl(server, file, request) {
  const plain = /^[\w./-]+$/.test(file);
  const image = plain ? `image=@${file}` : quoted(`image=@"${file.replace(/[\\"]/g, "\\$&")}"`);
  return [
    "curl",
    ...(server.has_token ? [`  -H "Authorization: Bearer $TOKEN"`] : []),
    `  -F ${image}`,
    `  -F ${quoted(`request=${JSON.stringify(request)};type=application/json`)}`,
    `  ${quoted(`${server.url}/predictions/${encodeURIComponent(server.model)}`)}`,
  ].join(" \\\n");
}

/** In single quotes, where a shell takes every character as it stands. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

export function asPython(server, file, request) {
  const token = server.has_token ? `, token=os.environ["TOKEN"]` : "";
  const { explain, steer, ...rest } = request;
  const fields = Object.entries({ ...(steer ?? explain), ...rest });
  const lines = fields.map(([name, value]) => `        ${name}=${literal(value, 8)},`);
  return [
    ...(server.has_token ? ["import os", ""] : []),
    "from elude_runtime.client import Client",
    "",
    `with Client(${literal(server.url)}, ${literal(server.model)}${token}) as client:`,
    `    reply = client.${steer ? "steer" : "explain"}(`,
    `        ${literal(file)},`,
    ...lines,
    "    )",
    ...(steer
      ? ["print(reply.predictions[:1])", "print(reply.steered.predictions[:1])"]
      : ["print(reply.explanations)"]),
  ].join("\n");
}

/** A value of JSON as Python spells it; lists of objects an item a line. */
function literal(value, indent = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    if (!value.some((item) => typeof item === "object" && item !== null))
      return `[${value.map((v) => literal(v)).join(", ")}]`;
    const room = " ".repeat(indent);
    return `[\n${value.map((item) => `${room}    ${literal(item, indent + 4)},\n`).join("")}${room}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([name, v]) => `${literal(name)}: ${literal(v)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value); // numbers, and strings, whose escapes Python shares
}
