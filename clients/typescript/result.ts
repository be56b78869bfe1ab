// Reads RunPod's status of a job.

import type { RunStatus } from "./endpoint.ts";
import type { Failure, Result } from "./types.ts";

/** A job's state: under way, completed, or failed. */
export type Outcome =
  | { done: false; status: string; progress?: Progress }
  | { done: true; ok: true; result: Result }
  | { done: true; ok: false; failure: Failure; result?: Result };

export interface Progress {
  stage: string;
  step: number;
  steps: number;
  progress: number;
}

/** Thrown for a job that failed. `failure.retryable` says whether the job may be tried again. */
export class JobFailed extends Error {
  override name = "JobFailed";
  readonly failure: Failure;
  constructor(failure: Failure) {
    super(failure.message);
    this.failure = failure;
  }
}

/**
 * The outcome in an answer of `/status` or `/runsync`. The output is the document, or, if the worker
 * serves chat, a list that ends with the document.
 */
export function parseResult(answer: RunStatus): Outcome {
  const result = documentOf(answer.output);
  if (answer.status === "COMPLETED" && result?.status === "completed") {
    return { done: true, ok: true, result };
  }
  if (answer.status === "IN_QUEUE" || answer.status === "IN_PROGRESS") {
    const progress = progressOf(answer.output);
    return { done: false, status: answer.status, ...(progress ? { progress } : {}) };
  }
  const failure = result?.failure ?? failureOf(answer);
  return { done: true, ok: false, failure, ...(result ? { result } : {}) };
}

function documentOf(output: unknown): Result | undefined {
  const last = Array.isArray(output) ? output.at(-1) : output;
  return isObject(last) && typeof last.job_id === "string" ? last as Result : undefined;
}

function progressOf(output: unknown): Progress | undefined {
  return isObject(output) && typeof output.step === "number"
    ? output as unknown as Progress
    : undefined;
}

/** The failure: the worker's, as JSON in RunPod's `error`, or else the platform's own. */
function failureOf(answer: RunStatus): Failure {
  try {
    const failure = JSON.parse(String(answer.error));
    if (isObject(failure) && typeof failure.code === "string") return failure as Failure;
  } catch {
    // Not the worker's JSON: the platform's own text.
  }
  if (answer.status === "CANCELLED") {
    return { code: "CANCELLED", message: "the job was cancelled", retryable: false };
  }
  if (answer.status === "TIMED_OUT") {
    return { code: "TIMEOUT_ERROR", message: "the platform ended the job", retryable: true };
  }
  const message = typeof answer.error === "string" ? answer.error : "the job has no result";
  return { code: "INTERNAL_ERROR", message, retryable: true };
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
