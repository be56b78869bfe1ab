/**
 * The client: submits jobs by their type, reads results, and verifies callbacks.
 *
 * @module
 */

export * from "./types.ts";
export * from "./result.ts";
export { BadSignature, verifyCallback, type VerifyOptions } from "./callback.ts";
export { Client, type ClientOptions, familyOf, type Typeless, type Untyped } from "./client.ts";
export { type JobName, SubmittedJob } from "./job.ts";
export {
  type Connection,
  Endpoint,
  type Health,
  RequestFailed,
  type Retry,
  type RunStatus,
  type Status,
} from "./endpoint.ts";
export { type ChatCall, Face, type FaceOptions, type Reply } from "./http.ts";
export { FaceJob, type FaceJobName } from "./http_job.ts";
