import { type Connection, type Health } from "./endpoint.js";
import { type JobName, SubmittedJob } from "./job.js";
import { type Outcome } from "./result.js";
import { type Family, type Job, type Result } from "./types.js";
export interface ClientOptions extends Connection {
    /** The endpoint of each family; several share its jobs by their load. */
    endpoints: Partial<Record<Family, string | readonly string[]>>;
    /** The worker's own key, where it has WORKER_API_KEY. */
    workerKey?: string;
}
/**
 * A payload whose type is any string to the compiler, such as one that the application builds for
 * either of two families. A payload whose type the compiler knows has to be a `Job`.
 */
export type Untyped<T extends {
    type: string;
}> = string extends T["type"] ? T : never;
/** The family that does a job, whichever field names its type. Throws TypeError for no type. */
export declare function familyOf(job: Job): Family;
export declare function familyOf<const T extends {
    type: string;
}>(job: T & Untyped<T>): Family;
export declare class Client {
    #private;
    constructor(options: ClientOptions);
    /** Queue a job on its family's endpoint. Throws RequestFailed. */
    submit(job: Job, s3Config?: object): Promise<SubmittedJob>;
    submit<const T extends {
        type: string;
    }>(job: T & Untyped<T>, s3Config?: object): Promise<SubmittedJob>;
    /** Submit a job and wait for its result. Throws JobFailed. */
    run(job: Job, timeoutMs?: number, s3Config?: object): Promise<Result>;
    run<const T extends {
        type: string;
    }>(job: T & Untyped<T>, timeoutMs?: number, s3Config?: object): Promise<Result>;
    /** The same in one request, as long as the job takes no more than `waitMs`. Throws JobFailed. */
    runsync(job: Job, waitMs?: number, s3Config?: object): Promise<Result>;
    runsync<const T extends {
        type: string;
    }>(job: T & Untyped<T>, waitMs?: number, s3Config?: object): Promise<Result>;
    /** A job that was submitted before. */
    job({ endpoint, id }: JobName): SubmittedJob;
    status(job: JobName): Promise<Outcome>;
    stream(job: JobName, timeoutMs?: number): AsyncGenerator<string, Result>;
    cancel(job: JobName): Promise<void>;
    /** The health of each of a family's endpoints, by endpoint. */
    health(family: Family): Promise<Record<string, Health>>;
}
