/**
 * Sentences of a text, by the rule of `split_into_sentences` in `pipeline_rs_marian.py`, whose comments say why; a test
 * holds the two to each other. The browser's own segmenter cuts at titles, initials and within Japanese quotations.
 */

const WIDE_STOPS =
  "。！？｡．﹒︒︕︖﹖﹗։\u05c3\u061d-\u061f\u06d4\u0700-\u0702\u07f9।॥།༎။።፧፨᙮᜵᜶។៕᠃᠉᥄᥅᭚᭛᭟᰻᰼᱾᱿꓿꘎꘏꛳꛷꧉꩝-꩟꫰꫱꯫" +
  "\u{11141}-\u{11143}";
const QUESTIONS = "!?‼‽⁇⁈⁉⸮";
const NARROW_STOPS = `.…‥․${QUESTIONS}`;
const FULL_STOPS = [".", "．", "﹒", "\u06d4"];
const QUOTES = "\"'”’“‘»›«‹」』》〉〞〟＂";
const OPENING = "「『（(［[【《〈{¿¡„‚“‘";
const OPENING_CLASS = OPENING.replace("[", "\\[");

const STOP = new RegExp(
  `(?<mark>(?:[${WIDE_STOPS}${NARROW_STOPS}]|፡፡|(?<=[\u0370-\u03ff\u1f00-\u1fff])[;\u037e]|(?<=[\u0531-\u0588]):)+)` +
    `(?<closing>(?:["'”’」』》〉〞〟＂)\\]}）］｝】〕〗〙〛]|[ \u00a0\u202f]?[»›“‘«‹](?![\\p{L}\\p{N}_]))*)`,
  "gu",
);
const WIDE_STOP = new RegExp(`[${WIDE_STOPS}]|፡፡`, "u");
const GOES_ON = new RegExp(`^[、，,;:=＝${WIDE_STOPS}${NARROW_STOPS}]`, "u");
const UP_TO_A_WORD = new RegExp(`[\\s${OPENING_CLASS}${QUOTES}]*`, "uy");
const LAST_WORD = new RegExp(`[^\\s${OPENING_CLASS}${QUOTES}—–-]*$`, "u");
const IDEOGRAPH =
  "[「『（［【《〈\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\u{20000}-\u{3ffff}]";
const BEGINS_WITH_IDEOGRAPH = new RegExp(`^${IDEOGRAPH}`, "u");
const ENDS_WITH_IDEOGRAPH = new RegExp(`${IDEOGRAPH}$`, "u");
const IN_AN_ADDRESS = /[/=][!-~]*$/u;
const ENUMERATOR = /^\s*[(（[]?\p{Nd}{1,3}$/u;
const ABBREVIATION =
  /^(?:mr|mrs|ms|mx|dr|prof|st|sra?|srta|rev|gen|col|capt|lt|sgt|cpl|maj|cmdr|gov|sen|rep|hon|messrs|mmes?|mlle|hr|frl?|vs|cf|approx|ca|bzw|viz|mt|ft|e\.g|i\.e|z\.b|d\.h|p\.ex)$/iu;
const BEFORE_A_NUMBER =
  /^(?:nos?|nr|figs?|eqs?|sec|vols?|pp?|ch|art|al|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)$/iu;
const AFTER_A_GERMAN_ORDINAL = /^(?:Jan|Feb|März|Apr|Mai|Jun|Jul|Aug|Sep|Okt|Nov|Dez|Jahrhundert)/u;
const LETTERS = /^(?:(?:\p{L}{1,2}\.)*\p{L}|jr|inc|ltd|co|corp|bros|etc|usw)$/iu;
const BEGINNING =
  /^(?:The|He|She|It|They|We|You|I|This|That|These|Those|There|But|And|In|On|At|However|If|When|What|Why|How|His|Her|My|Our|Their|So|After|Then)(?![\p{L}\p{N}_.])/u;
const LINE_END = /\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/u;

// By the rule of `is_blank_text`.
const VISIBLE =
  /[^\p{Cc}\p{Cf}\p{Z}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\u{e0100}-\u{e01ef}]/u;

/** Whether anything of a sentence is to be seen: a model would make something up of the rest. */
export function isVisible(sentence) {
  return VISIBLE.test(sentence);
}

/** The sentences of all lines of a text, without the blank ones. */
export function sentencesOf(text) {
  return text.split(LINE_END).flatMap(sentencesOfLine);
}

function sentencesOfLine(line) {
  const cased = /^[^\p{Lu}\p{Ll}]*\p{Lu}/u.test(line);
  const sentences = [];
  let start = 0;
  for (const stop of line.matchAll(STOP)) {
    if (!endsSentence(line, start, stop, cased)) continue;
    sentences.push(line.slice(start, stop.index + stop[0].length));
    start = stop.index + stop[0].length;
  }
  return [...sentences, line.slice(start)].map((sentence) => sentence.trim()).filter(Boolean);
}

function endsSentence(line, start, stop, cased) {
  const { mark, closing } = stop.groups;
  const end = stop.index + stop[0].length;
  const before = line.slice(Math.max(start, stop.index - 64), stop.index);
  const after = end < line.length ? String.fromCodePoint(line.codePointAt(end)) : "";
  if (!after || GOES_ON.test(after)) return !after;
  UP_TO_A_WORD.lastIndex = end;
  UP_TO_A_WORD.test(line);
  const following = line.slice(UP_TO_A_WORD.lastIndex, UP_TO_A_WORD.lastIndex + 12);
  if (FULL_STOPS.includes(mark)) {
    if (/\p{Nd}$/u.test(before) && /^\p{Nd}/u.test(after)) return false;
    if (stop.index - start < 8 && ENUMERATOR.test(before)) return false;
    if (isAbbreviation(before, following, cased)) return false;
  }
  if (WIDE_STOP.test(mark) || isUsedAsWide(before, mark, after)) {
    return !closing || !QUOTES.includes(closing.at(-1)) || /\s/u.test(after) || OPENING.includes(after);
  }
  if (!/\s/u.test(after) || GOES_ON.test(following)) return false;
  const small = cased && /^\p{Ll}/u.test(following);
  return !small || (QUESTIONS.includes(mark.at(-1)) && !closing);
}

function isUsedAsWide(before, mark, after) {
  if (!BEGINS_WITH_IDEOGRAPH.test(after)) return false;
  if (FULL_STOPS.includes(mark)) return ENDS_WITH_IDEOGRAPH.test(before);
  return [...mark].some((sign) => QUESTIONS.includes(sign)) && !IN_AN_ADDRESS.test(before);
}

function isAbbreviation(before, following, cased) {
  const [word] = before.slice(-16).match(LAST_WORD);
  if (ABBREVIATION.test(word)) return true;
  if (/^\p{Nd}+$/u.test(word)) return word.length < 3 && AFTER_A_GERMAN_ORDINAL.test(following);
  if (/^\p{Nd}/u.test(following) && BEFORE_A_NUMBER.test(word)) return true;
  if (cased && /^\p{Ll}$/u.test(word)) return false;
  return LETTERS.test(word) && !BEGINNING.test(following);
}
