// Jobs by their type: which endpoint serves one, and the way from submission to result.
import { Endpoint, sleep } from "./endpoint.js";
import { JobFailed, parseResult } from "./result.js";
import { FAMILY_OF, SYNONYMS } from "./types.js";
const ENDED = [
  "COMPLETED",
  "FAILED",
  "CANCELLED",
  "TIMED_OUT"
];
export function familyOf(job) {
  const { type, job_type, config } = job;
  // The application's older chat payloads name it in `config` alone.
  const name = type ?? job_type ?? config?.job_type;
  const family = FAMILY_OF[SYNONYMS[name] ?? name];
  if (family === undefined) throw new TypeError(`${name} is no job type`);
  return family;
}
export class Client {
  #options;
  constructor(options){
    this.#options = options;
  }
  async submit(job, s3Config) {
    const endpoint = await this.#choose(job);
    const { id } = await endpoint.run(this.#body(job, s3Config));
    return new SubmittedJob(endpoint, id);
  }
  async run(job, timeoutMs = 600_000) {
    return await (await this.submit(job)).result(timeoutMs);
  }
  async runsync(job, waitMs = 90_000) {
    const endpoint = await this.#choose(job);
    const answer = await endpoint.runsync(this.#body(job), waitMs);
    const outcome = parseResult(answer);
    if (outcome.done) return resultOf(outcome);
    throw new JobFailed({
      code: "TIMEOUT_ERROR",
      message: `the job is still under way after ${waitMs} ms`,
      retryable: true
    });
  }
  /** A job that was submitted before. */ job({ endpoint, id }) {
    return new SubmittedJob(new Endpoint(endpoint, this.#options), id);
  }
  status(job) {
    return this.job(job).status();
  }
  stream(job) {
    return this.job(job).stream();
  }
  cancel(job) {
    return this.job(job).cancel();
  }
  /** The health of each of a family's endpoints, by endpoint. */ async health(family) {
    const endpoints = this.#endpoints(family);
    const found = await Promise.all(endpoints.map((each)=>each.health()));
    return Object.fromEntries(endpoints.map((each, at)=>[
        each.id,
        found[at]
      ]));
  }
  /** The endpoint that would have to work off least for each worker that runs. */ async #choose(job) {
    const endpoints = this.#endpoints(this.#family(job));
    if (endpoints.length === 1) return endpoints[0];
    const asked = await Promise.allSettled(endpoints.map((each)=>each.health()));
    const loads = asked.map((each)=>each.status === "fulfilled" ? load(each.value) : Infinity);
    return endpoints[loads.indexOf(Math.min(...loads))];
  }
  /** Every worker serves an administrator: the one that the question is about, or the first. */ #family(job) {
    const family = familyOf(job);
    const endpoints = this.#options.endpoints;
    if (job.type !== "admin_utilities" || endpoints.admin) return family;
    const about = job.config?.target_worker ?? job.target_worker;
    const target = about?.replace(/_worker$/, "");
    const known = Object.keys(endpoints).filter((each)=>endpoints[each]?.length);
    return target && known.includes(target) ? target : known[0];
  }
  #endpoints(family) {
    const ids = [
      this.#options.endpoints[family] ?? []
    ].flat();
    if (!ids.length) throw new TypeError(`no endpoint serves ${family}`);
    return ids.map((id)=>new Endpoint(id, this.#options));
  }
  /** With an id of our own, so that a request whose answer was lost can be made again. */ #body(job, s3Config) {
    const key = this.#options.workerKey;
    const id = job.id ?? job.job_id ?? crypto.randomUUID();
    const input = {
      ...job,
      id,
      ...key ? {
        api_key: key
      } : {}
    };
    return s3Config ? {
      input,
      s3Config
    } : {
      input
    };
  }
}
/** A job on its endpoint. */ export class SubmittedJob {
  id;
  #endpoint;
  constructor(endpoint, id){
    this.#endpoint = endpoint;
    this.id = id;
  }
  get endpoint() {
    return this.#endpoint.id;
  }
  async status() {
    return parseResult(await this.#endpoint.status(this.id));
  }
  /** Wait for the result, asking ever more rarely. Throws JobFailed. */ async result(timeoutMs = 600_000) {
    const end = Date.now() + timeoutMs;
    for(let waitMs = 250; Date.now() < end; waitMs = Math.min(waitMs * 1.5, 3000)){
      const outcome = await this.status();
      if (outcome.done) return resultOf(outcome);
      await sleep(Math.min(waitMs, Math.max(end - Date.now(), 0)));
    }
    throw new JobFailed({
      code: "TIMEOUT_ERROR",
      message: `the job is still under way after ${timeoutMs} ms`,
      retryable: true
    });
  }
  /**
   * A streamed reply, piece by piece, and at its end the result, which has the whole. A piece is
   * told once: two readers of one job share its pieces. Throws JobFailed.
   */
  async *stream() {
    for(;;){
      const { status, stream } = await this.#endpoint.stream(this.id);
      for (const { output } of stream){
        const delta = output?.delta;
        if (typeof delta === "string") yield delta;
      }
      if (ENDED.includes(status) && !stream.length) return await this.result();
      if (!stream.length) await sleep(250);
    }
  }
  async cancel() {
    await this.#endpoint.cancel(this.id);
  }
  toJSON() {
    return {
      endpoint: this.endpoint,
      id: this.id
    };
  }
}
function resultOf(outcome) {
  if (outcome.ok) return outcome.result;
  throw new JobFailed(outcome.failure);
}
function load({ jobs, workers }) {
  const taking = Math.max((workers.running ?? 0) + (workers.idle ?? workers.ready ?? 0), 1);
  return (jobs.inQueue + jobs.inProgress) / taking;
}
