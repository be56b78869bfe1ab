/**
 * What an edge function imports: jobs by their type, results, and callbacks that can be believed.
 *
 * @module
 */
export * from "./types.js";
export * from "./result.js";
export { BadSignature, verifyCallback } from "./callback.js";
export { Client, familyOf } from "./client.js";
export { SubmittedJob } from "./job.js";
export { Endpoint, RequestFailed } from "./endpoint.js";
export { Face } from "./http.js";
