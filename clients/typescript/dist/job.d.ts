import { type Endpoint } from "./endpoint.js";
import { JobFailed, type Outcome } from "./result.js";
import type { Result } from "./types.js";
/** What is to be remembered of a job: with it any process can ask on. */
export interface JobName {
    endpoint: string;
    id: string;
}
/** A job on its endpoint. */
export declare class SubmittedJob implements JobName {
    #private;
    readonly id: string;
    constructor(endpoint: Endpoint, id: string);
    get endpoint(): string;
    status(): Promise<Outcome>;
    /**
     * Wait for the result, asking ever more rarely, and on through outages of the platform. Throws
     * JobFailed, and once `timeoutMs` is over either that or, where the platform does not answer,
     * RequestFailed.
     */
    result(timeoutMs?: number): Promise<Result>;
    /**
     * A streamed reply, piece by piece, and at its end the result, which has the whole. RunPod tells
     * a piece once: two readers of one job share its pieces, and those in an answer that is lost are
     * lost. What follows them is then held back, and the rest of the reply comes in one piece at its
     * end. Throws as `result` does.
     */
    stream(timeoutMs?: number): AsyncGenerator<string, Result>;
    cancel(): Promise<void>;
    toJSON(): JobName;
}
/** The failure of who did not wait long enough. */
export declare function underWay(waitedMs: number): JobFailed;
/** A job's result. Throws JobFailed. */
export declare function resultOf(outcome: Outcome & {
    done: true;
}): Result;
