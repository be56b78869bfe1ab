// The worker: its key, whether it is there, and what it serves.

import { at } from "./dom.js";
import { served } from "./job.js";

/** How often the page asks whether the worker is there: while it serves, and while it does not. */
const CHECK_MS = 5000, AGAIN_MS = 2000;
/** A worker that needs longer than this to say its health does not answer. */
const PATIENCE_MS = 10_000;
const STATES = {
  loading: "The models are being loaded.",
  shutting_down: "The worker is shutting down.",
  unhealthy: "The worker's device failed.",
};

/** WORKER_API_KEY, if the worker has one. It is stored only in this variable. */
let key = "", isAskedForKey = false;
let isServing = false, isLocked = false, nextCheck;
/** What the worker served when it was last there. */
let offer = "";
/** Called with what the worker serves when that changes, and when the worker does not answer. */
let onOffer, onSilence;

/** Call the worker with the key. */
export async function call(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) askForKey();
  return answer;
}

/** Whether this worker asks for a key. */
export const needsKey = () => isAskedForKey;

/** Look after the worker from now on. */
export function watch(callbacks) {
  ({ onOffer, onSilence } = callbacks);
  document.addEventListener("visibilitychange", () => document.hidden || check());
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("key").value;
    meet();
  });
  check();
}

/** Ask whether the worker is there, and again after a while. */
export async function check() {
  clearTimeout(nextCheck);
  const answer = await call("health", { signal: AbortSignal.timeout(PATIENCE_MS) })
    .catch(() => undefined);
  const { status } = await answer?.json().catch(() => undefined) ?? {};
  if (answer?.ok) {
    if (!isServing && !isLocked) await meet();
  } else {
    isServing = isLocked = false;
    if (!status) onSilence();
    say(STATES[status] ?? "The worker does not answer.", status === "loading" ? "" : "wrong");
  }
  clearTimeout(nextCheck);
  nextCheck = setTimeout(check, isServing || isLocked ? CHECK_MS : AGAIN_MS);
}

async function meet() {
  const answer = await call("worker/info").catch(() => undefined);
  const info = answer?.ok && await answer.json().catch(() => undefined);
  isLocked = answer?.status === 401;
  if (isLocked) {
    say(key ? "The worker does not know this key." : "The worker asks for a key.", "wrong");
  } else if (info) {
    welcome(info);
  }
}

function askForKey() {
  isAskedForKey = true;
  if (!at("key-form").hidden) return;
  at("key-form").hidden = false;
  at("key").focus();
}

function welcome(info) {
  at("key-form").hidden = true;
  say(`${offer && "The worker is back. "}${served(info)}`, "right");
  isServing = true;
  const { job_types: types, models } = info, now = JSON.stringify({ types, models });
  // The same form stays as it is: somebody may be typing.
  if (now !== offer) onOffer(types, models, !offer);
  offer = now;
}

function say(words, state) {
  if (at("worker").textContent === words) return;
  at("worker").textContent = words;
  at("worker").className = state;
}
