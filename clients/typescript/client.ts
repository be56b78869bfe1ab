// Jobs by their type: which endpoint serves one, and the way from submission to result.

import { type Connection, Endpoint, type Health, sleep, type Status } from "./endpoint.ts";
import { JobFailed, type Outcome, parseResult } from "./result.ts";
import {
  type Delta,
  type Family,
  FAMILY_OF,
  type Job,
  type JobType,
  type Result,
  SYNONYMS,
} from "./types.ts";

export interface ClientOptions extends Connection {
  /** The endpoint of each family; several share its jobs by their load. */
  endpoints: Partial<Record<Family, string | readonly string[]>>;
  /** The worker's own key, where it has WORKER_API_KEY. */
  workerKey?: string;
}

/** What is to be remembered of a job: with it any process can ask on. */
export interface JobName {
  endpoint: string;
  id: string;
}

/**
 * A payload whose type is any string to the compiler, such as one that the application builds for
 * either of two families. A payload whose type the compiler knows has to be a `Job`.
 */
export type Untyped<T extends { type: string }> = string extends T["type"] ? T : never;

const ENDED: readonly Status[] = ["COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"];

/** The family that does a job, whichever field names its type. Throws TypeError for no type. */
export function familyOf(job: Job): Family;
export function familyOf<const T extends { type: string }>(job: T & Untyped<T>): Family;
export function familyOf(job: object): Family {
  const { type, job_type, config } = job as Job;
  // The application's older chat payloads name it in `config` alone.
  const name = type ?? job_type ?? (config as { job_type?: string } | undefined)?.job_type;
  const family = FAMILY_OF[SYNONYMS[name as keyof typeof SYNONYMS] ?? name as JobType];
  if (family === undefined) throw new TypeError(`${name} is no job type`);
  return family;
}

export class Client {
  readonly #options: ClientOptions;

  constructor(options: ClientOptions) {
    this.#options = options;
  }

  /** Queue a job on its family's endpoint. Throws RequestFailed. */
  submit(job: Job, s3Config?: object): Promise<SubmittedJob>;
  submit<const T extends { type: string }>(
    job: T & Untyped<T>,
    s3Config?: object,
  ): Promise<SubmittedJob>;
  async submit(job: object, s3Config?: object): Promise<SubmittedJob> {
    const endpoint = await this.#choose(job as Job);
    const { id } = await endpoint.run(this.#body(job as Job, s3Config));
    return new SubmittedJob(endpoint, id);
  }

  /** Submit a job and wait for its result. Throws JobFailed. */
  run(job: Job, timeoutMs?: number): Promise<Result>;
  run<const T extends { type: string }>(job: T & Untyped<T>, timeoutMs?: number): Promise<Result>;
  async run(job: object, timeoutMs = 600_000): Promise<Result> {
    return await (await this.submit(job as Job)).result(timeoutMs);
  }

  /** The same in one request, as long as the job takes no more than `waitMs`. Throws JobFailed. */
  runsync(job: Job, waitMs?: number): Promise<Result>;
  runsync<const T extends { type: string }>(job: T & Untyped<T>, waitMs?: number): Promise<Result>;
  async runsync(job: object, waitMs = 90_000): Promise<Result> {
    const endpoint = await this.#choose(job as Job);
    const answer = await endpoint.runsync(this.#body(job as Job), waitMs);
    const outcome = parseResult(answer);
    if (outcome.done) return resultOf(outcome);
    throw new JobFailed({
      code: "TIMEOUT_ERROR",
      message: `the job is still under way after ${waitMs} ms`,
      retryable: true,
    });
  }

  /** A job that was submitted before. */
  job({ endpoint, id }: JobName): SubmittedJob {
    return new SubmittedJob(new Endpoint(endpoint, this.#options), id);
  }

  status(job: JobName): Promise<Outcome> {
    return this.job(job).status();
  }

  stream(job: JobName): AsyncGenerator<string, Result> {
    return this.job(job).stream();
  }

  cancel(job: JobName): Promise<void> {
    return this.job(job).cancel();
  }

  /** The health of each of a family's endpoints, by endpoint. */
  async health(family: Family): Promise<Record<string, Health>> {
    const endpoints = this.#endpoints(family);
    const found = await Promise.all(endpoints.map((each) => each.health()));
    return Object.fromEntries(endpoints.map((each, at) => [each.id, found[at]]));
  }

  /** The endpoint that would have to work off least for each worker that runs. */
  async #choose(job: Job): Promise<Endpoint> {
    const endpoints = this.#endpoints(this.#family(job));
    if (endpoints.length === 1) return endpoints[0];
    const asked = await Promise.allSettled(endpoints.map((each) => each.health()));
    const loads = asked.map((each) => each.status === "fulfilled" ? load(each.value) : Infinity);
    return endpoints[loads.indexOf(Math.min(...loads))];
  }

  /** Every worker serves an administrator: the one that the question is about, or the first. */
  #family(job: Job): Family {
    const family = familyOf(job);
    const endpoints = this.#options.endpoints;
    if (job.type !== "admin_utilities" || endpoints.admin) return family;
    const about = job.config?.target_worker ?? job.target_worker;
    const target = about?.replace(/_worker$/, "") as Family | undefined;
    const known = (Object.keys(endpoints) as Family[]).filter((each) => endpoints[each]?.length);
    return target && known.includes(target) ? target : known[0];
  }

  #endpoints(family: Family): Endpoint[] {
    const ids = [this.#options.endpoints[family] ?? []].flat();
    if (!ids.length) throw new TypeError(`no endpoint serves ${family}`);
    return ids.map((id) => new Endpoint(id, this.#options));
  }

  /** With an id of our own, so that a request whose answer was lost can be made again. */
  #body(job: Job, s3Config?: object): object {
    const key = this.#options.workerKey;
    const id = job.id ?? job.job_id ?? crypto.randomUUID();
    const input = { ...job, id, ...(key ? { api_key: key } : {}) };
    return s3Config ? { input, s3Config } : { input };
  }
}

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

  /** Wait for the result, asking ever more rarely. Throws JobFailed. */
  async result(timeoutMs = 600_000): Promise<Result> {
    const end = Date.now() + timeoutMs;
    for (let waitMs = 250; Date.now() < end; waitMs = Math.min(waitMs * 1.5, 3000)) {
      const outcome = await this.status();
      if (outcome.done) return resultOf(outcome);
      await sleep(Math.min(waitMs, Math.max(end - Date.now(), 0)));
    }
    throw new JobFailed({
      code: "TIMEOUT_ERROR",
      message: `the job is still under way after ${timeoutMs} ms`,
      retryable: true,
    });
  }

  /**
   * A streamed reply, piece by piece, and at its end the result, which has the whole. A piece is
   * told once: two readers of one job share its pieces. Throws JobFailed.
   */
  async *stream(): AsyncGenerator<string, Result> {
    for (;;) {
      const { status, stream } = await this.#endpoint.stream(this.id);
      for (const { output } of stream) {
        const delta = (output as Delta | undefined)?.delta;
        if (typeof delta === "string") yield delta;
      }
      if (ENDED.includes(status) && !stream.length) return await this.result();
      if (!stream.length) await sleep(250);
    }
  }

  async cancel(): Promise<void> {
    await this.#endpoint.cancel(this.id);
  }

  toJSON(): JobName {
    return { endpoint: this.endpoint, id: this.id };
  }
}

function resultOf(outcome: Outcome & { done: true }): Result {
  if (outcome.ok) return outcome.result;
  throw new JobFailed(outcome.failure);
}

function load({ jobs, workers }: Health): number {
  const taking = Math.max((workers.running ?? 0) + (workers.idle ?? workers.ready ?? 0), 1);
  return (jobs.inQueue + jobs.inProgress) / taking;
}
