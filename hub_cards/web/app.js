// The page: what is typed goes to the worker, which translates, and comes back a sentence at a time.

import { isVisible, sentencesOf } from "./sentences.js";

const element = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
// A function of one SIMD instruction: what the runtime is compiled to.
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);

const NOT_LOADED = "This translator was not loaded before: connect once, and choose it again.";
const LONGEST_TEXT = 2000; // as the hint says

let worker;
let models;
let chosen; // of models.models
let started = 0;
let outdated = false; // whether files come from a newer page than this one

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = false;
  element("progress").hidden = true;
  element("status").textContent = "";
}

function missing() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly, or it is switched off; the translator needs it.";
  if (!WebAssembly.validate(SIMD)) return "The WebAssembly of this browser has no SIMD instructions, which the translator needs: a newer browser will do.";
  return null;
}

/** What a promise gives, or a rejection after three seconds. */
function soon(promise) {
  return Promise.race([promise, new Promise((_, reject) => setTimeout(reject, 3000))]);
}

/** From then on requests go through the service worker, which keeps what it fetches; not where there is none. */
async function startKeeping() {
  if (!("serviceWorker" in navigator)) return;
  try {
    // That of a page before gives way to a newer one.
    if (navigator.serviceWorker.controller) navigator.serviceWorker.addEventListener("controllerchange", becomeOutdated);
    await navigator.serviceWorker.register("sw.js");
    await soon(navigator.serviceWorker.ready);
    if (!navigator.serviceWorker.controller) {
      await soon(new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true })));
    }
  } catch {
    // Private windows and addresses without https have none, a forced reload goes past it, and its own start may fail.
  }
}

function becomeOutdated() {
  // What is asked for while the new one takes over may never be answered.
  if (element("translate").disabled && !element("source").value) return location.reload();
  outdated = true;
  element("newer").hidden = false;
}

/** The newer page, with what was typed and chosen in this one. */
function reload(model) {
  sessionStorage.setItem("before", JSON.stringify({ text: element("source").value, name: directionOf(model) }));
  location.reload();
}

/** Have the service worker keep all that a model needs, and say so once it has; it may have started too late for some of it. */
async function keepForOffline(model) {
  if (!("serviceWorker" in navigator)) return;
  const { active } = await navigator.serviceWorker.ready;
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data: kept }) => {
    if (chosen === model) addFigure("Works offline", kept ? "from now on" : "no: its files could not be kept");
  };
  active.postMessage([...models.program, ...model.files], [port2]);
}

function languageName(code) {
  try {
    return new Intl.DisplayNames("en", { type: "language" }).of(code);
  } catch {
    return code;
  }
}

function addFigure(name, value, address) {
  const [term, text] = ["dt", "dd"].map((tag) => document.createElement(tag));
  [term.textContent, text.textContent] = [name, value];
  if (address) {
    const link = document.createElement("a");
    [link.href, link.textContent] = [address, "its card"];
    text.append(", ", link);
  }
  element("figures").append(term, text);
}

/** What a model is called among the others. */
function nameOf({ source, target, decoder_layers: steps }, _, all) {
  const direction = directionOf({ source, target });
  const depths = all.filter((other) => directionOf(other) === direction).length;
  return depths > 1 ? `${direction}, ${steps} decoder steps` : direction;
}

function directionOf({ source, target }) {
  return `${languageName(source)} to ${languageName(target)}`;
}

function showExamples({ source, examples }) {
  const buttons = examples.map((example) => {
    const button = document.createElement("button");
    [button.type, button.textContent, button.lang, button.dir] = ["button", example, source, "auto"];
    button.addEventListener("click", () => {
      element("source").value = example;
      translate();
    });
    return button;
  });
  element("examples").replaceChildren(...buttons);
}

function load(model) {
  if (outdated) return reload(model); // the newer page may have it elsewhere
  worker?.terminate();
  chosen = model;
  element("source-label").textContent = directionOf(model);
  element("source").lang = model.source;
  showExamples(model);
  element("translate").disabled = true;
  element("problem").hidden = true;
  element("progress").hidden = false;
  element("status").textContent = "Loading …";
  started = performance.now();
  worker = new Worker("worker.js", { type: "module" });
  worker.addEventListener("error", (event) => {
    showProblem(navigator.onLine ? `The translator did not start: ${event.message || "see the console"}` : NOT_LOADED);
  });
  worker.addEventListener("message", ({ data }) => receive[data.type](data, model));
  worker.postMessage({ type: "load", model });
}

const receive = {
  progress({ loaded }, model) {
    element("progress").value = loaded / model.bytes;
    element("status").textContent = `Loading the model: ${megabytes(loaded)} of ${megabytes(model.bytes)}`;
  },
  ready(_, model) {
    element("progress").hidden = true;
    element("translate").disabled = false;
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    element("status").textContent = `Ready after ${seconds} s.`;
    element("figures").replaceChildren();
    addFigure("Model and tokenizer", megabytes(model.bytes));
    addFigure("Program", megabytes(models.program_bytes));
    addFigure("Parameters", model.parameters.toLocaleString("en"));
    addFigure("Licence of the model", model.license, model.card);
    keepForOffline(model);
  },
  translation({ index, source, target, milliseconds }) {
    if (index === 0) element("translations").replaceChildren();
    const item = document.createElement("li");
    for (const [name, text, lang] of [["source", source, chosen.source], ["target", target, chosen.target], ["time", `${Math.round(milliseconds)} ms`, "en"]]) {
      const part = document.createElement(name === "time" ? "small" : "div");
      [part.className, part.textContent, part.lang, part.dir] = [name, text, lang, "auto"];
      item.append(part);
    }
    element("translations").append(item);
  },
  done({ milliseconds, sentences }) {
    element("translate").disabled = false;
    element("status").textContent = `${sentences} sentence${sentences === 1 ? "" : "s"}, ${Math.round(milliseconds)} ms`;
  },
  error({ during, message }) {
    const missing = during !== "translate" && !navigator.onLine;
    showProblem(missing ? NOT_LOADED : `The translator failed: ${message}`);
    element("translate").disabled = during !== "translate"; // the model is there, and another text may do
  },
};

function translate(event) {
  event?.preventDefault();
  const text = element("source").value;
  const sentences = sentencesOf(text).filter(isVisible);
  if (element("translate").disabled || !sentences.length) return;
  if (text.length > LONGEST_TEXT) {
    return showProblem(`The text has ${text.length.toLocaleString("en")} characters, at most ${LONGEST_TEXT.toLocaleString("en")} are possible.`);
  }
  element("translate").disabled = true;
  element("problem").hidden = true;
  element("status").textContent = "Translating …";
  worker.postMessage({ type: "translate", sentences });
}

async function start() {
  const problem = missing();
  if (problem) return showProblem(problem);
  await startKeeping();
  const answer = await fetch("models.json");
  if (!answer.ok) return showProblem("There is no model beside this page: rs-transformer publish --space web lays one out.");
  models = await answer.json();
  element("model").replaceChildren(...models.models.map(nameOf).map((name) => new Option(name)));
  element("choice").hidden = models.models.length < 2;
  element("model").addEventListener("change", () => load(models.models[element("model").selectedIndex]));
  element("form").addEventListener("submit", translate);
  element("source").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) translate(event);
  });
  const before = JSON.parse(sessionStorage.getItem("before") ?? "{}");
  sessionStorage.removeItem("before");
  element("source").value = before.text ?? "";
  const index = Math.max(0, models.models.findIndex((model) => directionOf(model) === before.name));
  element("model").selectedIndex = index;
  load(models.models[index]);
}

start().catch((error) => showProblem(`The page did not start: ${error.message}`));
