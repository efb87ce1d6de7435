// transformers.js as the tests ask it: a line of JSON is a text to encode, or ids to decode, [ids, skip_special_tokens].
//
//     node tests/web/tokenize.mjs FOLDER < questions > answers

import { resolve } from "node:path";
import { createInterface } from "node:readline";
import { AutoTokenizer } from "../../hub_cards/web/node_modules/@huggingface/transformers/dist/transformers.node.mjs";

const tokenizer = await AutoTokenizer.from_pretrained(resolve(process.argv[2]), { local_files_only: true });

for await (const line of createInterface({ input: process.stdin })) {
  const question = JSON.parse(line);
  const answer =
    typeof question === "string"
      ? tokenizer.encode(question)
      : tokenizer.decode(question[0], { skip_special_tokens: question[1] });
  console.log(JSON.stringify(answer));
}
