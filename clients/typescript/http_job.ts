// A job of any type on a worker's HTTP service.

import type { RequestLimits } from "./endpoint.ts";
import { Polls, resultOf } from "./job.ts";
import type { Outcome, Progress } from "./result.ts";
import type { Failure, Result } from "./types.ts";

/**
 * What identifies a job over HTTP. Store it: any process can use the job with it. `worker` is the one
 * of several workers that has the job, if a load balancer has named it.
 */
export interface FaceJobName {
  id: string;
  userId?: string;
  worker?: string;
}

/** What the service says of a job: its status, or its document. */
export interface HttpStatus {
  status: "queued" | "processing" | "completed" | "failed";
  progress?: Progress;
  error?: string;
  code?: Failure["code"];
  retryable?: boolean;
  retry_after?: number;
  [key: string]: unknown;
}

/** Asks the job's worker: the method, and the rest of the path after `job/{id}`. */
export type Ask = (method: string, rest: string, limits?: RequestLimits) => Promise<HttpStatus>;

/** A job on the worker that has it, which `Face.submit` and `Face.job` return. */
export class FaceJob implements FaceJobName {
  readonly id: string;
  readonly userId?: string;
  readonly worker?: string;
  readonly #ask: Ask;

  constructor({ id, userId, worker }: FaceJobName, ask: Ask) {
    this.id = id;
    this.userId = userId;
    this.worker = worker;
    this.#ask = ask;
  }

  async status(): Promise<Outcome> {
    return outcomeOf(await this.#ask("GET", ""));
  }

  /** Wait for the result, asking ever more rarely. Throws what `SubmittedJob.result` throws. */
  async result(timeoutMs = 600_000): Promise<Result> {
    const polls = new Polls(timeoutMs);
    for (;;) {
      const answer = await polls.ask((limits) => this.#ask("GET", "", limits));
      const outcome = answer && outcomeOf(answer);
      if (outcome?.done) return resultOf(outcome);
      await polls.pause();
    }
  }

  /** Stop the job at its next step. */
  async cancel(): Promise<void> {
    await this.#ask("POST", "/cancel");
  }

  toJSON(): FaceJobName {
    return { id: this.id, userId: this.userId, worker: this.worker };
  }
}

/** The state in an answer of `/job/{id}`. */
function outcomeOf(answer: HttpStatus): Outcome {
  const { status, progress } = answer;
  if (status === "queued" || status === "processing") {
    return { done: false, status, ...(progress ? { progress } : {}) };
  }
  const { success: _, error, code, retryable, retry_after, ...document } = answer;
  if (status === "completed") {
    return { done: true, ok: true, result: document as unknown as Result };
  }
  const failure: Failure = {
    code: code ?? "INTERNAL_ERROR",
    message: error ?? "the job has no result",
    retryable: retryable ?? true,
    ...(retry_after === undefined ? {} : { retry_after }),
  };
  return { done: true, ok: false, failure, result: { ...document, failure } as unknown as Result };
}
