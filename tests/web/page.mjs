// The page's programs as the tests ask them, in a browser made of a few lines; prints what came of it as JSON.
//
//     node tests/web/page.mjs SCENARIO

import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { createContext, runInContext } from "node:vm";

const never = new Promise(() => {});

/** Run one of the page's files, without its imports, among these names; returns its listeners and its own names. */
async function load(file, names) {
  const code = await readFile(new URL(`../../hub_cards/web/${file}`, import.meta.url), "utf-8");
  const listeners = {};
  const context = createContext({ URL, performance, addEventListener: (kind, listener) => (listeners[kind] = listener), ...names });
  runInContext(code.replace(/^import .*$/m, "").replaceAll("import.meta.url", "'http://localhost/'"), context);
  return { listeners, context };
}

/** The page where a service worker is registered and does not come to control it. */
async function page(serviceWorker) {
  const elements = {};
  const make = () => ({ dataset: {}, listeners: {}, append() {}, replaceChildren() {}, addEventListener(kind, listener) { this.listeners[kind] = listener; } });
  const workers = [];
  class Worker {
    sent = [];
    constructor() { workers.push(this); }
    addEventListener(kind, listener) { this[kind] = listener; }
    postMessage(message) { this.sent.push(message); }
    terminate() {}
    say(data) { this.message({ data }); }
  }
  const model = { source: "ja", target: "en", examples: [], decoder_layers: 2, bytes: 1, parameters: 1, files: [] };
  const models = { models: [model, model], program: [], program_bytes: 1 };
  await load("app.js", {
    document: { getElementById: (id) => (elements[id] ??= make()), createElement: make },
    navigator: { serviceWorker: { register: async () => {}, addEventListener() {}, ...serviceWorker } },
    sessionStorage: { getItem: () => null, removeItem() {} },
    sentencesOf: (text) => [text],
    isVisible: () => true,
    fetch: async () => ({ ok: true, json: async () => models }),
    setTimeout: (act, milliseconds) => setTimeout(act, milliseconds / 100),
    WebAssembly, Worker, Intl, Uint8Array, Option: class {},
  });
  for (let tries = 0; tries < 100 && !workers.length; tries++) await sleep(10);
  return { elements, workers };
}

const scenarios = {
  async forced_reload() {
    const { workers } = await page({ ready: Promise.resolve(), controller: null });
    return workers.length;
  },
  async failed_install() {
    const { workers } = await page({ ready: never, controller: null });
    return workers.length;
  },
  async errors() {
    const { elements, workers } = await page({ ready: never, controller: {} });
    const seen = [];
    const look = (what) => seen.push([what, !elements.translate.disabled, !elements.problem.hidden]);
    workers[0].say({ type: "ready" });
    elements.source.value = "a";
    elements.form.listeners.submit({ preventDefault() {} });
    look("translating");
    workers[0].say({ type: "error", during: "translate", message: "bad" });
    look("failed");
    elements.form.listeners.submit({ preventDefault() {} });
    look("again");
    workers[0].say({ type: "error", during: "load", message: "bad" });
    look("not loaded");
    elements.model.selectedIndex = 1;
    elements.model.listeners.change();
    look("loading");
    return seen;
  },
  async worker() {
    const said = [];
    const asked = [];
    const translator = async (text, options) => asked.push(options.max_new_tokens) && [{ translation_text: "" }];
    const tokenizer = (text) => ({ input_ids: { dims: [1, text.length] } });
    Object.assign(translator, { tokenizer, model: { config: { max_position_embeddings: 256 } } });
    const { listeners } = await load("worker.js", {
      env: { backends: { onnx: { wasm: {} } } },
      pipeline: async () => translator,
      postMessage: (message) => said.push([message.type, message.during, message.message]),
    });
    await listeners.message({ data: { type: "load", model: {} } });
    await listeners.message({ data: { type: "translate", sentences: ["a".repeat(40), "a".repeat(200)] } });
    await listeners.message({ data: { type: "translate", sentences: ["a", "b".repeat(257)] } });
    return { asked: asked.slice(1), said: said.at(-1) };
  },
  async store() {
    let put;
    const store = { match: async () => undefined, put: () => put() };
    const response = { ok: true, clone: () => response };
    const { listeners } = await load("sw.js", {
      caches: { open: async () => store },
      registration: { scope: "http://localhost/page/" },
      location: { origin: "http://localhost" },
      fetch: async () => response,
    });
    const answers = [];
    const full = async () => {
      throw new Error("full");
    };
    for (put of [() => never, full]) {
      const later = [];
      let answered;
      const request = { method: "GET", url: "http://localhost/a.onnx" };
      listeners.fetch({ request, respondWith: (promise) => (answered = promise), waitUntil: (promise) => later.push(promise) });
      answers.push((await Promise.race([answered.catch(() => "failed"), sleep(200, "late")])) === response && later.length);
      if (put === full) await Promise.all(later);
    }
    put = full;
    const port = { postMessage: (kept) => answers.push(kept) };
    await new Promise((resolve) => listeners.message({ data: ["a.onnx"], ports: [port], waitUntil: (kept) => kept.then(resolve) }));
    return answers;
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
process.exit();
