// Reading what RunPod says of a job.
/** A job that ended in a failure; `failure.retryable` says whether it may be tried again. */ export class JobFailed extends Error {
  name = "JobFailed";
  failure;
  constructor(failure){
    super(failure.message);
    this.failure = failure;
  }
}
/**
 * The outcome of `/status`, `/runsync` or a stored answer of theirs. Where chat is served the
 * output is a list whose last item is the document; elsewhere it is the document.
 */
export function parseResult(answer) {
  const result = documentOf(answer.output);
  if (answer.status === "COMPLETED" && result?.status === "completed") {
    return {
      done: true,
      ok: true,
      result
    };
  }
  if (answer.status === "IN_QUEUE" || answer.status === "IN_PROGRESS") {
    const progress = progressOf(answer.output);
    return {
      done: false,
      status: answer.status,
      ...progress ? {
        progress
      } : {}
    };
  }
  const failure = result?.failure ?? failureOf(answer);
  return {
    done: true,
    ok: false,
    failure,
    ...result ? {
      result
    } : {}
  };
}
function documentOf(output) {
  const last = Array.isArray(output) ? output.at(-1) : output;
  return isObject(last) && typeof last.job_id === "string" ? last : undefined;
}
function progressOf(output) {
  return isObject(output) && typeof output.step === "number" ? output : undefined;
}
/** The failure as RunPod's `error` holds it, JSON in a text; or what the platform itself did. */ function failureOf(answer) {
  try {
    const failure = JSON.parse(String(answer.error));
    if (isObject(failure) && typeof failure.code === "string") return failure;
  } catch  {
  // The platform's own words, then.
  }
  if (answer.status === "CANCELLED") {
    return {
      code: "CANCELLED",
      message: "the job was cancelled",
      retryable: false
    };
  }
  if (answer.status === "TIMED_OUT") {
    return {
      code: "TIMEOUT_ERROR",
      message: "the platform ended the job",
      retryable: true
    };
  }
  const message = typeof answer.error === "string" ? answer.error : "the job has no result";
  return {
    code: "INTERNAL_ERROR",
    message,
    retryable: true
  };
}
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
