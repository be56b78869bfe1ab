export type Status = "IN_QUEUE" | "IN_PROGRESS" | "COMPLETED" | "FAILED" | "CANCELLED" | "TIMED_OUT";
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
    jobs: {
        inQueue: number;
        inProgress: number;
        [state: string]: number;
    };
    workers: {
        running: number;
        idle?: number;
        ready?: number;
        [state: string]: number | undefined;
    };
}
export interface StreamPart {
    status: Status;
    stream?: {
        output: unknown;
    }[];
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
/** How long one request is waited for, and how often it is made, where that is not the client's. */
export type Patience = Pick<Connection, "timeoutMs" | "retry">;
export declare const RETRY: Retry;
/** An answer that is not 2xx, or no whole answer (`status` 0), after the last try. */
export declare class RequestFailed extends Error {
    name: string;
    readonly status: number;
    /** How long the other side asks to wait, in milliseconds. */
    readonly retryAfterMs: number;
    constructor(status: number, message: string, retryAfterMs?: number);
    /** Whether the same request may go better later. */
    get isTransient(): boolean;
}
export declare class Endpoint {
    #private;
    readonly id: string;
    constructor(id: string, to: Connection);
    /** Queue a job. A payload with an `id` may be sent again: the worker does it once. */
    run(body: object): Promise<RunStatus>;
    /** Queue a job and wait for it, up to `waitMs`; it may still be under way then. */
    runsync(body: object, waitMs?: number): Promise<RunStatus>;
    status(job: string, patience?: Patience): Promise<RunStatus>;
    /** What the job has said since the last call. */
    stream(job: string, patience?: Patience): Promise<StreamPart>;
    cancel(job: string): Promise<RunStatus>;
    health(): Promise<Health>;
}
/**
 * What `read` makes of an answer. Fetched and read again after 408, 425, 429, 5xx and no whole
 * answer: exponential backoff with jitter, and not before what `Retry-After` asks for. Throws
 * RequestFailed.
 */
export declare function fetchAgain<T>(url: string, init: RequestInit, { retry, timeoutMs, fetch }: Omit<Connection, "apiKey">, read: (answer: Response) => Promise<T>): Promise<T>;
export declare function sleep(ms: number): Promise<void>;
