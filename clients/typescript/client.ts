// Submits jobs to the endpoints of their families.

import { type Connection, Endpoint, type Health } from "./endpoint.ts";
import { type JobName, resultOf, SubmittedJob, underWay } from "./job.ts";
import { type Outcome, parseResult } from "./result.ts";
import {
  type AdminJob,
  type Family,
  FAMILY_OF,
  type Job,
  type JobType,
  type Result,
  SYNONYMS,
} from "./types.ts";

export interface ClientOptions extends Connection {
  /** The endpoint of each family. A job goes to the one of several with the least load. */
  endpoints: Partial<Record<Family, string | readonly string[]>>;
  /** The worker's own key, if it has WORKER_API_KEY. */
  workerKey?: string;
}

/**
 * A payload whose `type` the compiler knows only as a string, such as one that the application builds
 * for either of two families. A payload whose type the compiler knows must be a `Job`.
 */
export type Untyped<T extends { type: string }> = string extends T["type"] ? T : never;

/**
 * A payload that names no type. A worker of one family runs it as the family's own type, so a client
 * takes it if it has the endpoints of one family.
 */
export interface Typeless {
  type?: undefined;
  id?: string;
  user_id?: string | null;
  prompt?: string | null;
  [field: string]: unknown;
}

/** The family of a job's type, from any field that may name it. Throws TypeError for no type. */
export function familyOf(job: Job): Family;
export function familyOf<const T extends { type: string }>(job: T & Untyped<T>): Family;
export function familyOf(job: object): Family {
  const name = typeOf(job);
  const family = FAMILY_OF[SYNONYMS[name as keyof typeof SYNONYMS] ?? name as JobType];
  if (family === undefined) throw new TypeError(`${name} is no job type`);
  return family;
}

/** What a job names as its type; undefined if it names nothing. */
function typeOf(job: object): string | undefined {
  // The application's older chat payloads name the type only in `config`.
  const { type, job_type, config } = job as {
    type?: string;
    job_type?: string;
    config?: { job_type?: string };
  };
  return type || job_type || config?.job_type || undefined;
}

export class Client {
  readonly #options: ClientOptions;

  constructor(options: ClientOptions) {
    this.#options = options;
  }

  /** Queue a job on its family's endpoint. Throws RequestFailed. */
  submit(job: Job | Typeless, s3Config?: object): Promise<SubmittedJob>;
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
  run(job: Job | Typeless, timeoutMs?: number, s3Config?: object): Promise<Result>;
  run<const T extends { type: string }>(
    job: T & Untyped<T>,
    timeoutMs?: number,
    s3Config?: object,
  ): Promise<Result>;
  async run(job: object, timeoutMs?: number, s3Config?: object): Promise<Result> {
    return await (await this.submit(job as Job, s3Config)).result(timeoutMs);
  }

  /** `run` in one request, for a job that takes `waitMs` at most. Throws JobFailed. */
  runsync(job: Job | Typeless, waitMs?: number, s3Config?: object): Promise<Result>;
  runsync<const T extends { type: string }>(
    job: T & Untyped<T>,
    waitMs?: number,
    s3Config?: object,
  ): Promise<Result>;
  async runsync(job: object, waitMs = 90_000, s3Config?: object): Promise<Result> {
    const endpoint = await this.#choose(job as Job);
    const answer = await endpoint.runsync(this.#body(job as Job, s3Config), waitMs);
    const outcome = parseResult(answer);
    if (outcome.done) return resultOf(outcome);
    throw underWay(waitMs);
  }

  /** A job that was submitted before. */
  job({ endpoint, id }: JobName): SubmittedJob {
    return new SubmittedJob(new Endpoint(endpoint, this.#options), id);
  }

  status(job: JobName): Promise<Outcome> {
    return this.job(job).status();
  }

  stream(job: JobName, timeoutMs?: number): AsyncGenerator<string, Result> {
    return this.job(job).stream(timeoutMs);
  }

  cancel(job: JobName): Promise<void> {
    return this.job(job).cancel();
  }

  /** The health of a family's endpoints, by the endpoint's id. */
  async health(family: Family): Promise<Record<string, Health>> {
    const endpoints = this.#endpoints(family);
    const found = await Promise.all(endpoints.map((each) => each.health()));
    return Object.fromEntries(endpoints.map((each, at) => [each.id, found[at]]));
  }

  /** The family's endpoint with the fewest jobs for each running worker. */
  async #choose(job: Job): Promise<Endpoint> {
    const endpoints = this.#endpoints(this.#family(job));
    if (endpoints.length === 1) return endpoints[0];
    const answers = await Promise.allSettled(endpoints.map((each) => each.health()));
    const loads = answers.map((each) => each.status === "fulfilled" ? load(each.value) : Infinity);
    return endpoints[loads.indexOf(Math.min(...loads))];
  }

  /**
   * The family whose endpoint gets a job. Every worker runs admin jobs: the target's family gets the
   * job, or else the first family. A job that names no type goes to the only family.
   */
  #family(job: Job): Family {
    const endpoints = this.#options.endpoints;
    const [only, ...others] = (Object.keys(endpoints) as Family[])
      .filter((each) => each !== "admin" && endpoints[each]?.length);
    if (typeOf(job) === undefined) {
      if (only && !others.length) return only;
      throw new TypeError("type: needed by a client of several families");
    }
    const family = familyOf(job);
    if (family !== "admin" || endpoints.admin?.length) return family;
    const { config, target_worker } = job as AdminJob;
    const about = config?.target_worker ?? target_worker;
    const target = about?.replace(/_worker$/, "") as Family | undefined;
    const known = (Object.keys(endpoints) as Family[]).filter((each) => endpoints[each]?.length);
    return target && known.includes(target) ? target : known[0] ?? family;
  }

  #endpoints(family: Family): Endpoint[] {
    const ids = [this.#options.endpoints[family] ?? []].flat();
    if (!ids.length) throw new TypeError(`no endpoint serves ${family}`);
    return ids.map((id) => new Endpoint(id, this.#options));
  }

  /** The request's body. The payload gets an id, so that it can be sent again after a lost answer. */
  #body(job: Job, s3Config?: object): object {
    const key = this.#options.workerKey;
    const id = job.id || job.job_id || crypto.randomUUID();
    const input = { ...job, id, ...(key ? { api_key: key } : {}) };
    return s3Config ? { input, s3Config } : { input };
  }
}

function load({ jobs, workers }: Health): number {
  const taking = Math.max((workers.running ?? 0) + (workers.idle ?? workers.ready ?? 0), 1);
  return (jobs.inQueue + jobs.inProgress) / taking;
}
