// Runs one action of the client in Deno or in Node, and prints the result as JSON.
//   deno run ... caller.js ACTION ARGUMENTS_AS_JSON

const isDeno = typeof Deno !== "undefined";
const client = await import(isDeno ? "../../clients/typescript/mod.ts" : process.env.CLIENT);
const [action, json] = isDeno ? Deno.args : process.argv.slice(2);
const given = JSON.parse(json);

const ACTIONS = {
  submit: async () => (await jobs().submit(given.job)).toJSON(),
  run: () => jobs().run(given.job, given.timeoutMs, given.s3Config),
  runAll: () => Promise.all(given.jobs.map((job) => jobs().run(job))),
  runsync: () => jobs().runsync(given.job, given.waitMs, given.s3Config),
  status: () => jobs().status(given.name),
  result: () => jobs().job(given.name).result(given.timeoutMs),
  cancel: async () => (await jobs().cancel(given.name)) ?? null,
  health: () => jobs().health(given.family),
  stream: async () => {
    const job = await jobs().submit(given.job);
    return all(job.stream());
  },
  streamOn: () => all(jobs().stream(given.name, given.timeoutMs)),
  parse: () => client.parseResult(given.answer),
  verify: () => {
    const request = new Request("http://localhost/", {
      method: "POST",
      headers: given.headers,
      body: given.body,
    });
    return client.verifyCallback(request, given.secret, given.options);
  },
  overHttp: async () => {
    const face = new client.Face(given.service);
    const taken = await Promise.all(given.jobs.map((job) => face.submit(job)));
    const stored = JSON.parse(JSON.stringify(taken));
    const jobs = stored.map((name) => face.job(name));
    const statuses = (await Promise.all(jobs.map((job) => job.status()))).length;
    const results = await Promise.all(jobs.map((job) => job.result(given.timeoutMs)));
    await Promise.all(jobs.map((job) => job.cancel()));
    return { stored, statuses, results };
  },
  reply: () => new client.Face(given.service)[given.method](given.call),
  streamReply: () => all(new client.Face(given.service).stream(given.call)),
};

function jobs() {
  return new client.Client(given.client);
}

async function all(stream) {
  const pieces = [];
  for (;;) {
    const { done, value } = await stream.next();
    if (done) return { pieces, result: value };
    pieces.push(value);
  }
}

let said;
try {
  said = { value: await ACTIONS[action]() };
} catch (error) {
  const { name, message, status, failure } = error;
  said = { error: { name, message, status, failure } };
}
console.log(JSON.stringify(said));
