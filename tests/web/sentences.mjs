// The page's sentences of lines of text, as JSON, or whether anything of a line is to be seen: a line in, a line out.
//
//     node tests/web/sentences.mjs [visible] < lines

import { readFileSync } from "node:fs";

const source = readFileSync(new URL("../../hub_cards/web/sentences.js", import.meta.url), "utf-8");
const { isVisible, sentencesOf } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

const said = process.argv[2] === "visible" ? isVisible : sentencesOf;
for (const line of readFileSync(0, "utf-8").split("\n").slice(0, -1)) console.log(JSON.stringify(said(line)));
