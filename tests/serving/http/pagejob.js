// Runs one action of the page's `job.js` in Deno, and prints the result as JSON.
//   deno run ... pagejob.js ACTION ARGUMENTS_AS_JSON

import * as page from "../../../ourvidz_serverless/serving/http/static/job.js";

const [action, json] = Deno.args;
const given = JSON.parse(json);

/** A text in two pieces, cut at every byte. */
function* cuts(text) {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at <= bytes.length; at++) {
    yield ReadableStream.from([bytes.slice(0, at), bytes.slice(at)]);
  }
}

const ACTIONS = {
  fields: () => page.FIELDS,
  form: () => page.fieldsOf(given.type).map(({ at }) => at),
  families: () => Object.fromEntries(given.types.map((type) => [type, page.familyOf(type)])),
  payloads: () => given.forms.map(({ type, values, earlier }) => page.payloadOf(type, values, earlier)),
  events: () =>
    Promise.all([...cuts(given.text)].map((body) => Array.fromAsync(page.eventsOf(body)))),
  tell: () => given.progress.map(page.tell),
  ending: () => given.documents.map(page.ending),
  caption: () => given.metadata.map(page.caption),
  addresses: () => given.assets.map((asset) => page.addressOf(asset) ?? null),
  pretty: () => page.pretty(given.document),
};

console.log(JSON.stringify(await ACTIONS[action]()));
