// One RunPod endpoint over fetch: its operations, and trying again where that may help.
const TIMEOUT_MS = 30_000;
export const RETRY = {
  tries: 4,
  baseMs: 500,
  maxMs: 10_000
};
/** An answer that is not 2xx, or no whole answer (`status` 0), after the last try. */ export class RequestFailed extends Error {
  name = "RequestFailed";
  status;
  /** How long the other side asks to wait, in milliseconds. */ retryAfterMs;
  constructor(status, message, retryAfterMs = 0){
    super(message);
    this.status = status;
    this.retryAfterMs = retryAfterMs;
  }
  /** Whether the same request may go better later. */ get isTransient() {
    const { status } = this;
    return status === 0 || status === 408 || status === 425 || status === 429 || status >= 500;
  }
}
export class Endpoint {
  id;
  #to;
  constructor(id, to){
    this.id = id;
    this.#to = to;
  }
  /** Queue a job. A payload with an `id` may be sent again: the worker does it once. */ run(body) {
    return this.#request("POST", "run", "id", {
      body
    });
  }
  /** Queue a job and wait for it, up to `waitMs`; it may still be under way then. */ runsync(body, waitMs = 90_000) {
    const timeoutMs = (this.#to.timeoutMs ?? TIMEOUT_MS) + waitMs;
    return this.#request("POST", `runsync?wait=${waitMs}`, "status", {
      body,
      timeoutMs
    });
  }
  status(job, patience = {}) {
    return this.#request("GET", `status/${encodeURIComponent(job)}`, "status", patience);
  }
  /** What the job has said since the last call. */ stream(job, patience = {}) {
    return this.#request("GET", `stream/${encodeURIComponent(job)}`, "status", patience);
  }
  cancel(job) {
    return this.#request("POST", `cancel/${encodeURIComponent(job)}`, "status");
  }
  health() {
    return this.#request("GET", "health", "jobs");
  }
  /** The answer as JSON. One without its `field` is not whole. */ #request(method, path, field, asked = {}) {
    const { body, ...patience } = asked;
    const base = this.#to.baseUrl ?? "https://api.runpod.ai/v2";
    const init = {
      method,
      headers: {
        Authorization: `Bearer ${this.#to.apiKey}`,
        "Content-Type": "application/json"
      },
      ...body ? {
        body: JSON.stringify(body)
      } : {}
    };
    return fetchAgain(`${base}/${this.id}/${path}`, init, {
      ...this.#to,
      ...patience
    }, (answer)=>documentWith(answer, field));
  }
}
/**
 * What `read` makes of an answer. Fetched and read again after 408, 425, 429, 5xx and no whole
 * answer: exponential backoff with jitter, and not before what `Retry-After` asks for. Throws
 * RequestFailed.
 */
export async function fetchAgain(url, init, { retry, timeoutMs = TIMEOUT_MS, fetch = globalThis.fetch }, read) {
  const { tries, baseMs, maxMs } = {
    ...RETRY,
    ...retry
  };
  for(let failures = 1;; failures++){
    let failed;
    try {
      const answer = await fetch(url, {
        ...init,
        signal: AbortSignal.timeout(timeoutMs)
      });
      if (answer.ok) return await read(answer);
      const askedMs = (Number(answer.headers.get("Retry-After")) || 0) * 1000;
      failed = new RequestFailed(answer.status, await why(answer), askedMs);
    } catch (error) {
      failed = new RequestFailed(0, `no whole answer: ${error.name}`);
    }
    if (failures >= tries || !failed.isTransient) throw failed;
    const backoff = baseMs * 2 ** (failures - 1) * (0.75 + Math.random() / 2);
    await sleep(Math.min(Math.max(backoff, failed.retryAfterMs), maxMs));
  }
}
/** The answer's JSON, which has to be an object with this field. */ async function documentWith(answer, field) {
  const document = await answer.json();
  if (typeof document === "object" && document !== null && field in document) return document;
  throw new TypeError(`the answer has no ${field}`);
}
export function sleep(ms) {
  return new Promise((done)=>setTimeout(done, ms));
}
/** The error's own text where the answer is one of the worker's, else the status alone. */ async function why(answer) {
  try {
    const error = JSON.parse(await answer.text()).error;
    if (typeof error === "string") return error;
  } catch  {
  // Not ours, or not whole: a gateway's page says nothing more than its status.
  }
  return `HTTP ${answer.status}`;
}
