/**
 * Many questions in quick succession, as a moving slider asks them: one is in flight at a time, and when its answer is
 * there, the newest of those that came meanwhile goes out; the others never do. Answers so come in the order of their
 * questions, and an answer to what is no longer asked is dropped.
 */

import { Problem } from "./api.js";

export class Latest {
  /**
   * @param {(question: any, signal: AbortSignal) => Promise<any>} send
   * @param {Object} listeners
   * @param {(answer: any, question: any) => void} listeners.onAnswer
   * @param {(problem: Problem, question: any) => void} listeners.onProblem
   * @param {(busy: boolean) => void} [listeners.onBusy]
   * @param {(seconds: number, problem: Problem) => void} [listeners.onWait]  the server asked to come again later
   */
  constructor(send, { onAnswer, onProblem, onBusy = () => {}, onWait = () => {} }) {
    Object.assign(this, { send, onAnswer, onProblem, onBusy, onWait });
    this.waiting = null; // {question} that is sent next
    this.flight = null; // AbortController of the one under way
    this.timer = 0;
  }

  /** Ask this, as soon as it can be, in place of what waits. */
  ask(question) {
    this.waiting = { question };
    if (!this.flight && !this.timer) this.#next();
  }

  /** Forget what waits and what is under way: its answer will not be shown. */
  cancel() {
    this.waiting = null;
    clearTimeout(this.timer);
    this.timer = 0;
    this.flight?.abort();
    if (this.flight) this.onBusy(false);
    this.flight = null;
  }

  async #next() {
    if (!this.waiting) return;
    const { question } = this.waiting;
    const flight = new AbortController();
    this.waiting = null;
    this.flight = flight;
    this.onBusy(true);
    let settle;
    try {
      const answer = await this.send(question, flight.signal);
      settle = () => this.onAnswer(answer, question);
    } catch (error) {
      settle = () => this.#failed(error, question);
    }
    if (this.flight !== flight) return; // stale: it was cancelled, and perhaps something else is under way
    this.flight = null;
    this.onBusy(false);
    settle();
    if (!this.flight && !this.timer) this.#next();
  }

  #failed(error, question) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 503 && error.retryAfter !== null) {
      this.waiting ??= { question };
      this.onWait(error.retryAfter, error);
      this.timer = setTimeout(
        () => {
          this.timer = 0;
          this.#next();
        },
        1000 * Math.min(30, Math.max(0.2, error.retryAfter)),
      );
      return;
    }
    this.onProblem(error, question);
  }
}
