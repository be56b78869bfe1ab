// Runs one action of the page's `job.js` in Deno, and prints the result as JSON.
//   echo ARGUMENTS_AS_JSON | deno run ... pagejob.js ACTION

import * as page from "../../../ourvidz_serverless/serving/http/static/job.js";

const [action] = Deno.args;
const given = await new Response(Deno.stdin.readable).json();

/** A text in two pieces, cut at every byte. */
function* cuts(text) {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at <= bytes.length; at++) {
    yield ReadableStream.from([bytes.slice(0, at), bytes.slice(at)]);
  }
}

/** A stream that fails after a text. */
function broken(text) {
  return new ReadableStream({
    pull(controller) {
      if (text) controller.enqueue(new TextEncoder().encode(text));
      else controller.error(new Error("the connection is lost"));
      text = "";
    },
  });
}

const ACTIONS = {
  fields: () =>
    Object.fromEntries(given.types.map((type) => [type, page.fieldsOf(type, given.models)])),
  form: () => page.fieldsOf(given.type).map(({ at }) => at),
  defaults: () =>
    Object.fromEntries(
      page.fieldsOf(given.type, given.models).map((field) => [field.at, page.defaultOf(field)]),
    ),
  families: () => Object.fromEntries(given.types.map((type) => [type, page.familyOf(type)])),
  payloads: () =>
    given.forms.map(({ type, values, earlier }) => page.payloadOf(type, values, earlier)),
  valuesIn: () => given.places.map((place) => page.valueIn(given.payload, place) ?? null),
  read: () => page.readPayload(given.text, given.pictures),
  repeated: () => page.repeated(given.payload, given.seed),
  curl: () => page.curlOf(given.payload, given.url, given.needsKey),
  events: () =>
    Promise.all([...cuts(given.text)].map((body) => Array.fromAsync(page.eventsOf(body)))),
  cut: () => Array.fromAsync(page.eventsOf(broken(given.text))),
  tell: () => given.progress.map(page.tell),
  ending: () => given.documents.map(page.ending),
  served: () => given.workers.map(page.served),
  addresses: () => given.assets.map((asset) => page.addressOf(asset) ?? null),
  files: () =>
    Promise.all(given.urls.map(async (url) => {
      const file = page.fileIn(url);
      return file ? [file.type, await file.text()] : null;
    })),
  names: () => given.assets.map(page.fileNameOf),
  pretty: () => page.pretty(given.document),
};

console.log(JSON.stringify(await ACTIONS[action]()));
