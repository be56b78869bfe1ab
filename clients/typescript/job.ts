// A job on its endpoint: asking for it until it has ended.

import {
  type Endpoint,
  type Patience,
  RequestFailed,
  sleep,
  type Status,
  type StreamPart,
} from "./endpoint.ts";
import { JobFailed, type Outcome, parseResult } from "./result.ts";
import type { Delta, Result } from "./types.ts";

/** What is to be remembered of a job: with it any process can ask on. */
export interface JobName {
  endpoint: string;
  id: string;
}

/** How soon a job is asked for again, at first and at last. */
const FIRST_PAUSE_MS = 250;
const LAST_PAUSE_MS = 3000;

const ENDED: readonly Status[] = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];

/** A job on its endpoint. */
export class SubmittedJob implements JobName {
  readonly id: string;
  readonly #endpoint: Endpoint;

  constructor(endpoint: Endpoint, id: string) {
    this.#endpoint = endpoint;
    this.id = id;
  }

  get endpoint(): string {
    return this.#endpoint.id;
  }

  async status(): Promise<Outcome> {
    return parseResult(await this.#endpoint.status(this.id));
  }

  /**
   * Wait for the result, asking ever more rarely, and on through outages of the platform. Throws
   * JobFailed, and once `timeoutMs` is over either that or, where the platform does not answer,
   * RequestFailed.
   */
  async result(timeoutMs = 600_000): Promise<Result> {
    const questions = new Questions(timeoutMs);
    for (;;) {
      const answer = await questions.ask((patience) => this.#endpoint.status(this.id, patience));
      const outcome = answer && parseResult(answer);
      if (outcome?.done) return resultOf(outcome);
      await questions.pause();
    }
  }

  /**
   * A streamed reply, piece by piece, and at its end the result, which has the whole. RunPod tells
   * a piece once: two readers of one job share its pieces, and those in an answer that is lost are
   * lost. What follows them is then held back, and the rest of the reply comes in one piece at its
   * end. Throws as `result` does.
   */
  async *stream(timeoutMs = 600_000): AsyncGenerator<string, Result> {
    const questions = new Questions(timeoutMs);
    let told = "";
    for (;;) {
      const part = await questions.ask((patience) => this.#endpoint.stream(this.id, patience));
      const items = part?.stream ?? [];
      for (const delta of questions.isAnswerLost ? [] : deltasOf(items)) {
        told += delta;
        yield delta;
      }
      if (part && ENDED.includes(part.status) && !items.length) break;
      await questions.pause(items.length > 0);
    }
    const result = await this.result(questions.leftMs);
    const rest = questions.isAnswerLost ? restOf(result, told) : "";
    if (rest) yield rest;
    return result;
  }

  async cancel(): Promise<void> {
    await this.#endpoint.cancel(this.id);
  }

  toJSON(): JobName {
    return { endpoint: this.endpoint, id: this.id };
  }
}

/** Questions about one job, each tried once, until the caller's time is up. */
class Questions {
  readonly #timeoutMs: number;
  readonly #endMs: number;
  #failed?: RequestFailed;
  #pauseMs = FIRST_PAUSE_MS;
  /** Whether a question may have reached the platform whose answer never came. */
  isAnswerLost = false;

  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs;
    this.#endMs = performance.now() + timeoutMs;
  }

  get leftMs(): number {
    return Math.max(this.#endMs - performance.now(), 0);
  }

  /** The answer, or undefined where there is none and a later question may have one. */
  async ask<T>(question: (patience: Patience) => Promise<T>): Promise<T | undefined> {
    try {
      const answer = await question({ retry: { tries: 1 } });
      this.#failed = undefined;
      return answer;
    } catch (error) {
      if (!(error instanceof RequestFailed && error.isTransient)) throw error;
      this.#failed = error;
      this.isAnswerLost ||= error.status === 0 || error.status >= 500;
      return undefined;
    }
  }

  /** Wait before the next question: not at all after news, else ever longer. Throws at the end. */
  async pause(hasNews = false): Promise<void> {
    if (!this.leftMs) throw this.#failed ?? underWay(this.#timeoutMs);
    const pauseMs = Math.max(this.#pauseMs, this.#failed?.retryAfterMs ?? 0);
    this.#pauseMs = hasNews ? FIRST_PAUSE_MS : Math.min(this.#pauseMs * 1.5, LAST_PAUSE_MS);
    if (!hasNews) await sleep(Math.min(pauseMs, this.leftMs));
  }
}

function deltasOf(items: NonNullable<StreamPart["stream"]>): string[] {
  return items.map(({ output }) => (output as Delta | undefined)?.delta)
    .filter((delta) => typeof delta === "string");
}

/** What of a reply follows the part that was told; nothing where that is another text. */
function restOf(result: Result, told: string): string {
  const whole = result.response ?? result.enhanced_prompt ?? "";
  return whole.startsWith(told) ? whole.slice(told.length) : "";
}

/** The failure of who did not wait long enough. */
export function underWay(waitedMs: number): JobFailed {
  return new JobFailed({
    code: "TIMEOUT_ERROR",
    message: `the job is still under way after ${waitedMs} ms`,
    retryable: true,
  });
}

/** A job's result. Throws JobFailed. */
export function resultOf(outcome: Outcome & { done: true }): Result {
  if (outcome.ok) return outcome.result;
  throw new JobFailed(outcome.failure);
}
