// Loads the model by transformers.js and translates, apart from the page, which stays awake meanwhile.

import { env, pipeline } from "./vendor/transformers.web.min.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./models/";
env.useBrowserCache = false; // the service worker keeps the files
env.useWasmCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;
env.backends.onnx.wasm.numThreads = 1; // more of them need headers that a static Space does not send

let translator;

/** How many tokens a translation may have: a decoder that is too shallow does not find the end. */
function longest(source) {
  const tokens = translator.tokenizer(source).input_ids.dims.at(-1);
  const positions = translator.model.config.max_position_embeddings;
  // transformers.js would cut it, and its end of sentence with it.
  if (tokens > positions) throw new Error(`“${source.slice(0, 20)}…” has ${tokens} tokens, at most ${positions} are possible. Cut it into sentences.`);
  return Math.min(positions - 1, 2 * tokens + 32);
}

const receive = {
  async load({ model }) {
    const loaded = new Map();
    translator = await pipeline("translation", model.folder, {
      dtype: model.dtype,
      device: "wasm",
      progress_callback({ status, file, loaded: bytes }) {
        if (status !== "progress") return;
        loaded.set(file, bytes);
        postMessage({ type: "progress", loaded: [...loaded.values()].reduce((sum, each) => sum + each, 0) });
      },
    });
    await translator("1", { num_beams: 1, max_new_tokens: 1 }); // what is done once, is done
    postMessage({ type: "ready" });
  },
  async translate({ sentences }) {
    const start = performance.now();
    const bounds = sentences.map(longest); // before the first is translated
    for (const [index, source] of sentences.entries()) {
      const begun = performance.now();
      // Greedily: transformers.js has no beam search, and takes the best token of each step for one.
      const [{ translation_text: target }] = await translator(source, { num_beams: 1, max_new_tokens: bounds[index] });
      postMessage({ type: "translation", index, source, target, milliseconds: performance.now() - begun });
    }
    postMessage({ type: "done", sentences: sentences.length, milliseconds: performance.now() - start });
  },
};

addEventListener("message", async ({ data }) => {
  try {
    await receive[data.type](data);
  } catch (error) {
    postMessage({ type: "error", during: data.type, message: String(error?.message ?? error) });
  }
});
