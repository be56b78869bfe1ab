import type { RunStatus } from "./endpoint.js";
import type { Failure, Result } from "./types.js";
/** Where a job stands: on its way, done, or failed. */
export type Outcome = {
    done: false;
    status: string;
    progress?: Progress;
} | {
    done: true;
    ok: true;
    result: Result;
} | {
    done: true;
    ok: false;
    failure: Failure;
    result?: Result;
};
export interface Progress {
    stage: string;
    step: number;
    steps: number;
    progress: number;
}
/** A job that ended in a failure; `failure.retryable` says whether it may be tried again. */
export declare class JobFailed extends Error {
    name: string;
    readonly failure: Failure;
    constructor(failure: Failure);
}
/**
 * The outcome of `/status`, `/runsync` or a stored answer of theirs. Where chat is served the
 * output is a list whose last item is the document; elsewhere it is the document.
 */
export declare function parseResult(answer: RunStatus): Outcome;
