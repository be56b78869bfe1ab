// Jobs by their type: which endpoint serves one, and the way from submission to result.
import { Endpoint } from "./endpoint.js";
import { resultOf, SubmittedJob, underWay } from "./job.js";
import { parseResult } from "./result.js";
import { FAMILY_OF, SYNONYMS } from "./types.js";
export function familyOf(job) {
  // The application's older chat payloads name it in `config` alone.
  const { type, job_type, config } = job;
  const name = type || job_type || config?.job_type;
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
  async run(job, timeoutMs, s3Config) {
    return await (await this.submit(job, s3Config)).result(timeoutMs);
  }
  async runsync(job, waitMs = 90_000, s3Config) {
    const endpoint = await this.#choose(job);
    const answer = await endpoint.runsync(this.#body(job, s3Config), waitMs);
    const outcome = parseResult(answer);
    if (outcome.done) return resultOf(outcome);
    throw underWay(waitMs);
  }
  /** A job that was submitted before. */ job({ endpoint, id }) {
    return new SubmittedJob(new Endpoint(endpoint, this.#options), id);
  }
  status(job) {
    return this.job(job).status();
  }
  stream(job, timeoutMs) {
    return this.job(job).stream(timeoutMs);
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
    if (family !== "admin" || endpoints.admin?.length) return family;
    const { config, target_worker } = job;
    const about = config?.target_worker ?? target_worker;
    const target = about?.replace(/_worker$/, "");
    const known = Object.keys(endpoints).filter((each)=>endpoints[each]?.length);
    return target && known.includes(target) ? target : known[0] ?? family;
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
    const id = job.id || job.job_id || crypto.randomUUID();
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
function load({ jobs, workers }) {
  const taking = Math.max((workers.running ?? 0) + (workers.idle ?? workers.ready ?? 0), 1);
  return (jobs.inQueue + jobs.inProgress) / taking;
}
