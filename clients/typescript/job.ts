// A submitted job: its status, its result, its stream.

import {
  type Endpoint,
  RequestFailed,
  type RequestLimits,
  sleep,
  type Status,
  type StreamPart,
} from "./endpoint.ts";
import { JobFailed, type Outcome, parseResult } from "./result.ts";
import type { Delta, Result } from "./types.ts";

/** What identifies a job. Store it: any process can use the job with it. */
export interface JobName {
  endpoint: string;
  id: string;
}

/** The first and the longest wait between two polls. */
const FIRST_PAUSE_MS = 250;
const LAST_PAUSE_MS = 3000;

const ENDED: readonly Status[] = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];

/** A job on its endpoint, which `Client.submit` and `Client.job` return. */
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
    const polls = new Polls(timeoutMs);
    for (;;) {
      const answer = await polls.ask((limits) => this.#endpoint.status(this.id, limits));
      const outcome = answer && parseResult(answer);
      if (outcome?.done) return resultOf(outcome);
      await polls.pause();
    }
  }

  /**
   * A streamed reply, piece by piece; the generator's value is the result with the complete reply.
   * RunPod sends each piece once, so two readers of one job share its pieces. If an answer is lost,
   * its pieces are lost: then no more pieces are yielded until the end, where the rest of the reply
   * comes in one piece. Throws the errors of `result`.
   */
  async *stream(timeoutMs = 600_000): AsyncGenerator<string, Result> {
    const polls = new Polls(timeoutMs);
    let yielded = "";
    for (;;) {
      const part = await polls.ask((limits) => this.#endpoint.stream(this.id, limits));
      const items = part?.stream ?? [];
      for (const delta of polls.isAnswerLost ? [] : deltasOf(items)) {
        yielded += delta;
        yield delta;
      }
      if (part && ENDED.includes(part.status) && !items.length) break;
      await polls.pause(items.length > 0);
    }
    const result = await this.result(polls.leftMs);
    const rest = polls.isAnswerLost ? restOf(result, yielded) : "";
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

/** Polls for one job until the caller's time is over. Each request is tried once. */
export class Polls {
  readonly #timeoutMs: number;
  readonly #endMs: number;
  #failed?: RequestFailed;
  #pauseMs = FIRST_PAUSE_MS;
  /** Whether the platform may have sent an answer that was lost. */
  isAnswerLost = false;

  constructor(timeoutMs: number) {
    this.#timeoutMs = timeoutMs;
    this.#endMs = performance.now() + timeoutMs;
  }

  get leftMs(): number {
    return Math.max(this.#endMs - performance.now(), 0);
  }

  /** The answer; undefined if there is none and a later poll may get one. */
  async ask<T>(request: (limits: RequestLimits) => Promise<T>): Promise<T | undefined> {
    try {
      const answer = await request({ retry: { tries: 1 } });
      this.#failed = undefined;
      return answer;
    } catch (error) {
      if (!(error instanceof RequestFailed && error.isTransient)) throw error;
      this.#failed = error;
      this.isAnswerLost ||= error.status === 0 || error.status >= 500;
      return undefined;
    }
  }

  /** Wait before the next poll: not at all after news, else longer each time. Throws at the end. */
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

/** The part of a reply after the pieces that were yielded; empty if they do not match it. */
function restOf(result: Result, yielded: string): string {
  const reply = result.response ?? result.enhanced_prompt ?? "";
  return reply.startsWith(yielded) ? reply.slice(yielded.length) : "";
}

/** The failure for a caller whose time is over before the job has ended. */
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
