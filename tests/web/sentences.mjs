// The page's sentences of lines of text, as JSON: a line in, a line out.
//
//     node tests/web/sentences.mjs < lines

import { readFileSync } from "node:fs";

const source = readFileSync(new URL("../../hub_cards/web/sentences.js", import.meta.url), "utf-8");
const { sentencesOf } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

for (const line of readFileSync(0, "utf-8").split("\n").slice(0, -1)) console.log(JSON.stringify(sentencesOf(line)));
