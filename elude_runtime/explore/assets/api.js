/**
 * Talks to the address that the page came from, and to no other. Every failure is a Problem.
 */

const HEADERS = { "X-Elude-Explore": "1" };
const LONGEST = 100_000; // milliseconds; above the explorer's own timeout, so that its answer says the reason

/** What went wrong with a request: the server's problem document, or the page's own words where there is no answer. */
export class Problem extends Error {
  /**
   * @param {{type: string, title: string, detail: string, status?: number}} document
   * @param {number | null} [retryAfter]  seconds after which it is worth asking again
   */
  constructor(document, retryAfter = null) {
    super(document.detail);
    this.type = document.type;
    this.title = document.title;
    this.detail = document.detail;
    this.status = document.status ?? 0;
    this.retryAfter = retryAfter;
  }

  /** Whether the way to the model is broken, and not this one request. */
  get isOutage() {
    return [
      "explorer-gone",
      "explorer-locked",
      "server-unreachable",
      "server-timeout",
      "server-unauthorized",
      "server-unknown-model",
      "server-other-version",
      "server-reply",
      "server-error",
      "server-unavailable",
      "other-checkpoint",
    ].includes(this.type);
  }
}

/**
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<any>} the JSON of the reply; rejected with a Problem, or an AbortError where `options.signal` aborts
 */
async function call(path, options = {}) {
  const timeout = AbortSignal.timeout(LONGEST);
  const signal = options.signal ? AbortSignal.any([options.signal, timeout]) : timeout;
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...HEADERS, ...options.headers }, signal });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem({
      type: "explorer-gone",
      title: "The explorer does not answer",
      detail: "Is `elude explore` still running in its terminal? This page goes on as soon as it answers.",
    });
  }
  if (response.ok) return response.json();
  throw await problemOf(response);
}

async function problemOf(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const text = await response.text();
  if ((response.headers.get("Content-Type") ?? "").startsWith("application/problem+json")) {
    return new Problem(JSON.parse(text), Number.isFinite(seconds) ? seconds : null);
  }
  const locked = response.status === 403;
  return new Problem({
    type: locked ? "explorer-locked" : "explorer-error",
    title: locked ? "The explorer was started anew" : `The explorer failed (${response.status})`,
    detail: text.trim() || "It gave no reason.",
    status: response.status,
  });
}

/** @param {object} document @param {AbortSignal} [signal] */
export function post(path, document, signal) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(document),
    signal,
  });
}

export function get(path, signal) {
  return call(path, { signal });
}

/** Send an encoded image. @returns {Promise<string>} the name by which questions refer to it */
async function send(file, signal) {
  const sent = await call("api/images", {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
    signal,
  });
  return sent.image;
}

/**
 * Ask about an image, which is sent where the explorer does not have it (any more).
 * @param {{file: Blob, sent: string | null}} image  `sent` is kept up to date
 * @param {object} request  as the API takes it
 * @param {AbortSignal} [signal]
 */
export async function ask(image, request, signal) {
  if (image.sent === null) image.sent = await send(image.file, signal);
  try {
    return await post("api/ask", { image: image.sent, request }, signal);
  } catch (error) {
    if (!(error instanceof Problem) || error.type !== "unknown-image") throw error;
    image.sent = await send(image.file, signal);
    return post("api/ask", { image: image.sent, request }, signal);
  }
}
