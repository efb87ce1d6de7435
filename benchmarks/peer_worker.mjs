// One engine in a Node process of its own, for peers.py:
//
//     node benchmarks/peer_worker.mjs ENGINE '{"an option of the engine": …}'
//
// Lines go in and out as in peer_worker.py.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const LONGEST = 128; // tokens of a translation

// Firefox's engine in WebAssembly, by the package's own translator with one worker. `node_modules` is the folder that
// has the package; `model`, `vocabularies` (one, or of source and target) and `shortlist` are files; `precision` is the
// model's `gemm-precision`.
async function bergamot({ node_modules, model, vocabularies, precision, shortlist }) {
  const script = resolve(node_modules, "@browsermt/bergamot-translator/translator.js");
  const { BatchTranslator, TranslatorBacking } = await import(pathToFileURL(script));
  const read = (file) => Uint8Array.from(readFileSync(file)).buffer;
  class Files extends TranslatorBacking {
    async loadModelRegistery() {
      return [{ from: "source", to: "target" }];
    }
    async loadTranslationModel() {
      return {
        model: read(model),
        vocabs: vocabularies.map(read),
        shortlist: shortlist ? read(shortlist) : new ArrayBuffer(0),
        config: { "gemm-precision": precision },
      };
    }
  }
  const options = { workers: 1, batchSize: 16, pivotLanguage: null };
  const translator = new BatchTranslator(options, new Files(options));
  return async (texts) => {
    const found = texts.map((text) => translator.translate({ from: "source", to: "target", text }));
    return (await Promise.all(found)).map((response) => response.target.text);
  };
}

// ONNX Runtime by transformers.js. `folder` is a model's beside others; `dtype` one that it has.
async function transformers({ node_modules, folder, dtype }) {
  const require = createRequire(resolve(node_modules, "of-it.js"));
  const { env, pipeline } = require("@huggingface/transformers");
  env.localModelPath = resolve(folder, "..");
  env.allowRemoteModels = false;
  const session_options = { intraOpNumThreads: 1, interOpNumThreads: 1 };
  const translator = await pipeline("translation", resolve(folder).split("/").at(-1), { dtype, session_options });
  return async (texts) => {
    const found = await translator(texts, { num_beams: 1, max_new_tokens: LONGEST });
    return found.map((translation) => translation.translation_text);
  };
}

const translate = await { bergamot, transformers }[process.argv[2]](JSON.parse(process.argv[3]));
console.log(JSON.stringify(await translate(["1"])));
for await (const line of createInterface({ input: process.stdin })) {
  const found = [];
  for (const batch of JSON.parse(line)) found.push(await translate(batch));
  console.log(JSON.stringify(found));
}
process.exit();
