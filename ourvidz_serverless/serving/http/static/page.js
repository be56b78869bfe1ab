// The page: a job from Run to its end. The form, the stage and the worker have files of their own.

import { at, copy, recall, remember } from "./dom.js";
import * as form from "./form.js";
import { curlOf, ending, eventsOf, familyOf, pathOf, pretty, repeated } from "./job.js";
import * as stage from "./stage.js";
import { call, check, needsKey, watch } from "./worker.js";

/** The last job: its id, its user, and its request. */
let job;
let isRunning = false, isStopped = false;
/** Cuts the stream of a worker that does not answer any more. */
let stream = new AbortController();

async function run(event) {
  event.preventDefault();
  if (at("send").disabled) return;
  const request = readRequest();
  if (!request) return;
  begin("Sending the job");
  job = undefined;
  try {
    if (await submit(request)) await follow();
  } finally {
    finish();
  }
}

/** The request in the form; undefined, with a word to the person, if it is not JSON. */
function readRequest() {
  refuse("");
  try {
    return form.request();
  } catch (error) {
    at("raw").open = true;
    refuse(`The request is not valid JSON: ${error.message}`);
  }
}

function refuse(words) {
  at("refused").textContent = words;
}

/** Whether the worker took the job. */
async function submit(request) {
  const body = JSON.stringify({ input: form.complete(request) });
  const answer = await call("jobs", { method: "POST", body }).catch(() => undefined);
  const told = await answer?.json().catch(() => undefined);
  if (answer?.ok && told) {
    job = { id: told.job_id, user: request.user_id, request };
    const { api_key: _key, ...stored } = request;
    remember("job", { ...job, request: stored });
    stage.say("Queued");
    if (isStopped) stop();
    return true;
  }
  if (told) stage.answer(pretty(told));
  stage.say(answer ? "Refused." : "The job was not sent.", true);
  refuse(
    told?.error ??
      (answer ? `The answer was HTTP ${answer.status}.` : "The worker does not answer."),
  );
  if (!answer) check();
  return false;
}

/** Follow the job to its end, or until its stream is cut. */
async function follow() {
  stream = new AbortController();
  const answer = await call(pathOf(job, "events"), { signal: stream.signal })
    .catch(() => undefined);
  const spoken = spokenIn(job.request);
  const talk = spoken && stage.converse(spoken);
  for await (const { event, data } of answer?.ok ? eventsOf(answer.body) : []) {
    if (event === "status") {
      stage.say(data.status === "queued" ? "Queued" : "Processing");
    } else if (event === "progress") {
      stage.progress(data);
    } else if (event === "message") {
      talk?.grow(data.delta);
    } else if (event === "done" || event === "error") {
      return end(data, talk, spoken);
    }
  }
  talk?.end();
  cut("The connection was cut.");
}

/** The messages of a chat, as they are shown; undefined for other jobs. */
function spokenIn({ type = "", messages = [], prompt }) {
  if (familyOf(`${type}`) !== "chat") return undefined;
  const spoken = messages.filter(({ role }) => role !== "system");
  return spoken.length ? spoken : [{ role: "user", content: prompt ?? "" }];
}

async function end(result, talk, spoken) {
  remember("job", undefined);
  stage.answer(pretty(result), result.metadata?.warnings);
  // An administrator's answer has nothing else to show.
  at("told").open = Boolean(result.result);
  const failed = result.status === "failed";
  const words = result.response ?? result.enhanced_prompt;
  stage.say(ending(result), failed && result.code !== "CANCELLED");
  talk?.end(failed ? undefined : words);
  if (talk && !failed && words !== undefined) {
    form.goOn([...spoken, { role: "assistant", content: words }]);
  }
  const assets = (result.assets ?? []).filter(({ type }) => type !== "text");
  for (const asset of assets) await show(asset, job.request);
}

async function show(asset, request) {
  const again = () => repeated(request, asset.metadata.seed);
  const figure = await stage.show(asset, call, request.prompt || "a picture without a prompt", {
    "Repeat": () => {
      form.show(again());
      at("ask").requestSubmit();
    },
    "Copy curl": (event) => copy(curl(again()), event),
  });
  if (isNarrow.matches && !figure.previousElementSibling) {
    figure.scrollIntoView({ block: "nearest" });
  }
}

function curl(request) {
  const url = new URL("jobs?wait=300", document.baseURI).href;
  return curlOf(form.complete(request), url, needsKey());
}

/** Say that the job may go on where the page does not see it, and offer to look again. */
function cut(why) {
  stage.say(`${why} The job may still run.`, true);
  at("again").hidden = false;
  check();
}

async function lookAgain() {
  const answer = await call(pathOf(job)).catch(() => undefined);
  const told = await answer?.json().catch(() => undefined);
  if (!told) {
    stage.say("The worker does not answer. The job may still run.", true);
    return check();
  }
  if (answer.status === 401) return stage.say("The worker asks for a key.", true);
  if (answer.status === 404) {
    remember("job", undefined);
    at("again").hidden = true;
    return stage.say("The worker does not know this job any more.", true);
  }
  begin("Looking for the job");
  try {
    await follow();
  } finally {
    finish();
  }
}

/** Stop the job at its next step, or as soon as the worker has taken it. */
function stop() {
  isStopped = true;
  at("stop").disabled = true;
  if (job) call(pathOf(job, "cancel"), { method: "POST" }).catch(check);
}

function begin(words) {
  stage.clear();
  stage.say(words);
  const hadFocus = [at("send"), document.body].includes(document.activeElement);
  isRunning = true;
  isStopped = false;
  at("again").hidden = true;
  at("send").disabled = true;
  at("stop").hidden = at("stop").disabled = false;
  if (hadFocus) at("stop").focus({ preventScroll: true });
  at("head").scrollIntoView({ block: "nearest" });
}

function finish() {
  const hadFocus = [at("stop"), document.body].includes(document.activeElement);
  isRunning = false;
  at("send").disabled = false;
  at("stop").hidden = true;
  stage.rest();
  if (hadFocus) at("send").focus({ preventScroll: true });
}

/** Whether the stage stands below the form. */
const isNarrow = matchMedia("(max-width: 52rem)");

at("ask").addEventListener("submit", run);
at("ask").addEventListener("keydown", (event) => {
  const isRun = event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat;
  if (!isRun || at("send").disabled) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
at("stop").addEventListener("click", stop);
// The key that pressed Run may still be held down when Stop has the focus.
at("stop").addEventListener("keydown", (event) => event.repeat && event.preventDefault());
at("again").addEventListener("click", lookAgain);
at("curl").addEventListener("click", (event) => {
  const request = readRequest();
  if (request) copy(curl(request), event);
});

watch({
  onOffer(types, models, isFirst) {
    form.open(types, models);
    at("send").disabled = isRunning;
    if (isFirst && (job = recall("job"))) cut("The page was left while a job ran.");
  },
  onSilence: () => stream.abort(),
});
