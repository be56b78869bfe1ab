// One RunPod endpoint: its operations by `fetch`, with tries and waits.

export type Status =
  | "IN_QUEUE"
  | "IN_PROGRESS"
  | "COMPLETED"
  | "FAILED"
  | "CANCELLED"
  | "TIMED_OUT";

/** RunPod's status of a job. `parseResult` reads it. */
export interface RunStatus {
  id: string;
  status: Status;
  output?: unknown;
  error?: unknown;
  [key: string]: unknown;
}

/** RunPod's counts of an endpoint's jobs and workers. */
export interface Health {
  jobs: { inQueue: number; inProgress: number; [state: string]: number };
  workers: { running: number; idle?: number; ready?: number; [state: string]: number | undefined };
}

export interface StreamPart {
  status: Status;
  stream?: { output: unknown }[];
}

/** How many times a request is tried, and the first and the longest wait between tries. */
export interface Retry {
  tries: number;
  baseMs: number;
  maxMs: number;
}

export interface Connection {
  apiKey: string;
  baseUrl?: string;
  /** The time limit of one request. `/runsync` also has the time that it waits for its job. */
  timeoutMs?: number;
  retry?: Partial<Retry>;
  fetch?: typeof globalThis.fetch;
}

/** The time limit and the tries of one request, if they differ from the client's. */
export type RequestLimits = Pick<Connection, "timeoutMs" | "retry">;

const TIMEOUT_MS = 30_000;
export const RETRY: Retry = { tries: 4, baseMs: 500, maxMs: 10_000 };

/** Thrown after the last try: the status is not 2xx, or the answer is incomplete (`status` 0). */
export class RequestFailed extends Error {
  override name = "RequestFailed";
  readonly status: number;
  /** How long the server asks to wait, in milliseconds. */
  readonly retryAfterMs: number;

  constructor(status: number, message: string, retryAfterMs = 0) {
    super(message);
    this.status = status;
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether another try may succeed. */
  get isTransient(): boolean {
    const { status } = this;
    return status === 0 || status === 408 || status === 425 || status === 429 || status >= 500;
  }
}

export class Endpoint {
  readonly id: string;
  readonly #to: Connection;

  constructor(id: string, to: Connection) {
    this.id = id;
    this.#to = to;
  }

  /** Queue a job. A payload with an `id` may be sent twice: the worker runs it once. */
  run(body: object): Promise<RunStatus> {
    return this.#request("POST", "run", "id", { body });
  }

  /** Queue a job and wait for it, up to `waitMs`; it may still be under way then. */
  runsync(body: object, waitMs = 90_000): Promise<RunStatus> {
    const timeoutMs = (this.#to.timeoutMs ?? TIMEOUT_MS) + waitMs;
    return this.#request("POST", `runsync?wait=${waitMs}`, "status", { body, timeoutMs });
  }

  status(job: string, limits: RequestLimits = {}): Promise<RunStatus> {
    return this.#request("GET", `status/${encodeURIComponent(job)}`, "status", limits);
  }

  /** What the job has streamed since the last call. */
  stream(job: string, limits: RequestLimits = {}): Promise<StreamPart> {
    return this.#request("GET", `stream/${encodeURIComponent(job)}`, "status", limits);
  }

  cancel(job: string): Promise<RunStatus> {
    return this.#request("POST", `cancel/${encodeURIComponent(job)}`, "status");
  }

  health(): Promise<Health> {
    return this.#request("GET", "health", "jobs");
  }

  /** The answer as JSON. An answer without its `field` is incomplete. */
  #request<T>(
    method: string,
    path: string,
    field: string,
    options: RequestOptions = {},
  ): Promise<T> {
    const { body, ...limits } = options;
    const base = this.#to.baseUrl ?? "https://api.runpod.ai/v2";
    const init = {
      method,
      headers: { Authorization: `Bearer ${this.#to.apiKey}`, "Content-Type": "application/json" },
      ...(body ? { body: JSON.stringify(body) } : {}),
    };
    return fetchAgain(
      `${base}/${this.id}/${path}`,
      init,
      { ...this.#to, ...limits },
      (answer) => documentWith<T>(answer, field),
    );
  }
}

interface RequestOptions extends RequestLimits {
  body?: object;
}

/**
 * What `read` returns for an answer. Tries again after 408, 425, 429, 5xx and an incomplete answer:
 * with exponential backoff and jitter, and not before `Retry-After`. Throws RequestFailed, also for
 * an answer that `accepts` refuses: without it, one whose status is not 2xx.
 */
export async function fetchAgain<T>(
  url: string,
  init: RequestInit,
  { retry, timeoutMs = TIMEOUT_MS, fetch = globalThis.fetch }: Omit<Connection, "apiKey">,
  read: (answer: Response) => Promise<T>,
  accepts: (answer: Response) => boolean | Promise<boolean> = ({ ok }) => ok,
): Promise<T> {
  const { tries, baseMs, maxMs } = { ...RETRY, ...retry };
  for (let failures = 1;; failures++) {
    let failed: RequestFailed;
    try {
      const answer = await fetch(url, { ...init, signal: AbortSignal.timeout(timeoutMs) });
      if (await accepts(answer)) return await read(answer);
      const askedMs = (Number(answer.headers.get("Retry-After")) || 0) * 1000;
      failed = new RequestFailed(answer.status, await errorText(answer), askedMs);
    } catch (error) {
      failed = new RequestFailed(0, `no whole answer: ${(error as Error).name}`);
    }
    if (failures >= tries || !failed.isTransient) throw failed;
    const backoff = baseMs * 2 ** (failures - 1) * (0.75 + Math.random() / 2);
    await sleep(Math.min(Math.max(backoff, failed.retryAfterMs), maxMs));
  }
}

/** The answer's JSON. Throws TypeError unless it is an object with this field. */
export async function documentWith<T>(answer: Response, field: string): Promise<T> {
  const document = await answer.json();
  if (typeof document === "object" && document !== null && field in document) return document as T;
  throw new TypeError(`the answer has no ${field}`);
}

export function sleep(ms: number): Promise<void> {
  return new Promise((done) => setTimeout(done, ms));
}

/** The error's text if the answer is the worker's, else the status. */
async function errorText(answer: Response): Promise<string> {
  try {
    const error = JSON.parse(await answer.text()).error;
    if (typeof error === "string") return error;
  } catch {
    // Not the worker's, or incomplete: the page of a gateway says no more than its status.
  }
  return `HTTP ${answer.status}`;
}
