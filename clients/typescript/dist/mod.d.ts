/**
 * What an edge function imports: jobs by their type, results, and callbacks that can be believed.
 *
 * @module
 */
export * from "./types.js";
export * from "./result.js";
export { BadSignature, verifyCallback, type VerifyOptions } from "./callback.js";
export { Client, type ClientOptions, familyOf, type Untyped } from "./client.js";
export { type JobName, SubmittedJob } from "./job.js";
export { type Connection, Endpoint, type Health, RequestFailed, type Retry, type RunStatus, type Status, } from "./endpoint.js";
export { type ChatCall, Face, type FaceOptions, type Reply } from "./http.js";
