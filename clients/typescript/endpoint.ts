// One RunPod endpoint over fetch: its operations, and trying again where that may help.

export type Status =
  | "IN_QUEUE"
  | "IN_PROGRESS"
  | "COMPLETED"
  | "FAILED"
  | "CANCELLED"
  | "TIMED_OUT";

/** What RunPod says of a job; `parseResult` reads it. */
export interface RunStatus {
  id: string;
  status: Status;
  output?: unknown;
  error?: unknown;
  [key: string]: unknown;
}

/** What RunPod says of an endpoint. */
export interface Health {
  jobs: { inQueue: number; inProgress: number; [state: string]: number };
  workers: { running: number; idle?: number; ready?: number; [state: string]: number | undefined };
}

export interface StreamPart {
  status: Status;
  stream: { output: unknown }[];
}

/** How often a request is made, and how its waits grow. */
export interface Retry {
  tries: number;
  baseMs: number;
  maxMs: number;
}

export interface Connection {
  apiKey: string;
  baseUrl?: string;
  /** Given up after so long, /runsync excepted, which waits for its job. */
  timeoutMs?: number;
  retry?: Partial<Retry>;
  fetch?: typeof globalThis.fetch;
}

export const RETRY: Retry = { tries: 4, baseMs: 500, maxMs: 10_000 };

/** An answer that is not 2xx, or none at all (`status` 0), after the last try. */
export class RequestFailed extends Error {
  override name = "RequestFailed";
  readonly status: number;
  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

export class Endpoint {
  readonly id: string;
  readonly #to: Connection;

  constructor(id: string, to: Connection) {
    this.id = id;
    this.#to = to;
  }

  /** Queue a job. A payload with an `id` may be sent again: the worker does it once. */
  run(body: object): Promise<RunStatus> {
    return this.#request("POST", "run", body);
  }

  /** Queue a job and wait for it, up to `waitMs`; it may still be under way then. */
  runsync(body: object, waitMs = 90_000): Promise<RunStatus> {
    return this.#request("POST", `runsync?wait=${waitMs}`, body, waitMs);
  }

  status(job: string): Promise<RunStatus> {
    return this.#request("GET", `status/${encodeURIComponent(job)}`);
  }

  /** What the job has said since the last call. */
  stream(job: string): Promise<StreamPart> {
    return this.#request("GET", `stream/${encodeURIComponent(job)}`);
  }

  cancel(job: string): Promise<RunStatus> {
    return this.#request("POST", `cancel/${encodeURIComponent(job)}`);
  }

  health(): Promise<Health> {
    return this.#request("GET", "health");
  }

  async #request<T>(method: string, path: string, body?: object, waitMs = 0): Promise<T> {
    const base = this.#to.baseUrl ?? "https://api.runpod.ai/v2";
    const init = {
      method,
      headers: { Authorization: `Bearer ${this.#to.apiKey}`, "Content-Type": "application/json" },
      ...(body ? { body: JSON.stringify(body) } : {}),
    };
    const timeoutMs = (this.#to.timeoutMs ?? 30_000) + waitMs;
    const answer = await fetchAgain(`${base}/${this.id}/${path}`, init, { ...this.#to, timeoutMs });
    return await answer.json() as T;
  }
}

/**
 * Fetch, and again after 408, 425, 429, 5xx and no answer: exponential backoff with jitter, and
 * not before what `Retry-After` asks for. Throws RequestFailed.
 */
export async function fetchAgain(
  url: string,
  init: RequestInit,
  { retry, timeoutMs = 30_000, fetch = globalThis.fetch }: Omit<Connection, "apiKey">,
): Promise<Response> {
  const { tries, baseMs, maxMs } = { ...RETRY, ...retry };
  for (let failures = 1;; failures++) {
    let askedMs = 0;
    let failed: RequestFailed;
    try {
      const answer = await fetch(url, { ...init, signal: AbortSignal.timeout(timeoutMs) });
      if (answer.ok) return answer;
      failed = new RequestFailed(answer.status, await why(answer));
      askedMs = (Number(answer.headers.get("Retry-After")) || 0) * 1000;
    } catch (error) {
      failed = new RequestFailed(0, `no answer: ${(error as Error).name}`);
    }
    if (failures >= tries || !isTransient(failed.status)) throw failed;
    const backoff = baseMs * 2 ** (failures - 1) * (0.75 + Math.random() / 2);
    await sleep(Math.min(Math.max(backoff, askedMs), maxMs));
  }
}

export function sleep(ms: number): Promise<void> {
  return new Promise((done) => setTimeout(done, ms));
}

function isTransient(status: number): boolean {
  return status === 0 || status === 408 || status === 425 || status === 429 || status >= 500;
}

/** The error's own text where the answer is one of the worker's, else the status alone. */
async function why(answer: Response): Promise<string> {
  const text = await answer.text();
  try {
    const error = JSON.parse(text).error;
    if (typeof error === "string") return error;
  } catch {
    // Not ours: a gateway's page says nothing more than its status.
  }
  return `HTTP ${answer.status}`;
}
