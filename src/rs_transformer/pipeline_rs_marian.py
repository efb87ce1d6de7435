# Copyright 2026 The rs-transformer authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The "translation" pipeline, which transformers 5 dropped; for RSMarian, `MarianMTModel` and others of their kind.

Self-contained: this file travels to the Hub beside the weights, as remote code, and what it knows of languages, blank
text and sentences serves the rest of the package too. Not for whole corpora (`decoding.py` batches by tokens and sorts
by length).
"""

import copy
import math
import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, MarianTokenizer, PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import ModelOutput, logging

logger = logging.get_logger(__name__)

# Languages

# The codes of a language: our own first, of ISO 639-1, then those of 639-3 and 639-2/B, older ones, and those that
# models and corpora have (OPUS-MT's jap, NLLB's arb). A language that is not here has one code, of ISO 639-3.
LANGUAGES = """
aa,aar ab,abk ae,ave af,afr ak,aka am,amh an,arg ar,ara,arb as,asm av,ava ay,aym,ayr az,aze,azj ba,bak be,bel bg,bul
bh,bih bi,bis bm,bam bn,ben bo,bod,tib br,bre bs,bos ca,cat ce,che ch,cha co,cos cr,cre cs,ces,cze cu,chu cv,chv
cy,cym,wel da,dan de,deu,ger dv,div dz,dzo ee,ewe el,ell,gre en,eng eo,epo es,spa et,est,ekk eu,eus,baq
fa,fas,per,pes ff,ful,fuv fi,fin fj,fij fo,fao fr,fra,fre fy,fry ga,gle gd,gla gl,glg gn,grn,gug gu,guj gv,glv ha,hau
he,heb,iw hi,hin ho,hmo hr,hrv,scr ht,hat hu,hun hy,hye,arm hz,her ia,ina id,ind,in ie,ile ig,ibo ii,iii ik,ipk
io,ido is,isl,ice it,ita iu,iku ja,jpn,jap,jp jv,jav,jw ka,kat,geo kg,kon ki,kik kj,kua kk,kaz kl,kal km,khm kn,kan
ko,kor kr,kau,knc ks,kas ku,kur,kmr kv,kom kw,cor ky,kir la,lat lb,ltz lg,lug li,lim ln,lin lo,lao lt,lit lu,lub
lv,lav,lvs mg,mlg,plt mh,mah mi,mri,mao mk,mkd,mac ml,mal mn,mon,khk mr,mar ms,msa,may,zsm mt,mlt my,mya,bur na,nau
nd,nde ne,nep,npi ng,ndo nl,nld,dut nn,nno no,nor,nb,nob nr,nbl nso,ns nv,nav ny,nya oc,oci oj,oji om,orm,gaz
or,ori,ory os,oss pa,pan pi,pli pl,pol ps,pus,pbt pt,por,pob qu,que,quy rm,roh rn,run ro,ron,rum,mo,mol ru,rus rw,kin
sa,san sc,srd sd,snd se,sme sg,sag sh,hbs si,sin sk,slk,slo sl,slv sm,smo sn,sna so,som sq,sqi,alb,als sr,srp,scc
ss,ssw st,sot su,sun sv,swe sw,swa,swh ta,tam te,tel tg,tgk th,tha ti,tir tk,tuk tl,tgl,fil tn,tsn to,ton tr,tur
ts,tso tt,tat tw,twi ty,tah ug,uig uk,ukr ur,urd uz,uzb,uzn ve,ven vi,vie vo,vol wa,wln wo,wol xh,xho yi,yid,ji,ydd
yo,yor za,zha zh,zho,chi,cmn,cn,zhs,zht zu,zul
"""
_OWN_CODE = {code: codes.split(",")[0] for codes in LANGUAGES.split() for code in codes.split(",")}
_CHINESE_SCRIPTS = {"cn": "hans", "sg": "hans", "tw": "hant", "hk": "hant", "mo": "hant"}
_VARIANTS = {"pob": "br"}  # codes of a language in a region
# In their own scripts, and not in Latin letters.
LANGUAGES_WITHOUT_BLANKS = ("ja", "zh", "yue", "wuu", "gan", "hak", "hsn", "lzh", "th", "lo", "km", "my")
# The task that names its languages, such as translation_ja_to_en or translation_ja-JP_to_en-US.
NAMED_TASK = re.compile(r"translation_([\w-]+)_to_([\w-]+)")


def _bare(code: str | None) -> str:
    """A code in small letters, without what it stands in."""
    return str(code or "").strip(" _<>").lower()


@lru_cache(maxsize=4096)
def split_code(code: str | None) -> tuple[str, str, str]:
    """Language, script and region of a code, in small letters, `""` where it says none.

    Takes codes of ISO 639-1, -2 and -3 and BCP 47, with hyphens or underscores (`zh_CN`, `cmn_Hans`, `jpn_Jpan`), and
    codes as they stand in a text or a vocabulary (`>>jap<<`, `__ja__`). The language is its own code of `LANGUAGES`,
    or what the code says: groups such as `mul` are of no language but themselves.
    """
    language, *more = re.split(r"[-_]", _bare(code))
    if language in _VARIANTS:
        more.append(_VARIANTS[language])
    language = _OWN_CODE.get(language, language)
    script = next((part for part in more if re.fullmatch("[a-z]{4}", part)), "")
    region = next((part for part in more if re.fullmatch(r"[a-z]{2}|\d{3}", part) and part != "xx"), "")
    return language, script or (_CHINESE_SCRIPTS.get(region, "") if language == "zh" else ""), region


def same_language(first: str | None, second: str | None) -> bool:
    """Whether two codes may stand for the same: the language is, and the script where both say one."""
    (language, script, _), (other, other_script, _) = split_code(first), split_code(second)
    return language == other and (script == other_script or "" in (script, other_script))


def find_language(code: str | None, known: Iterable[str]) -> str | None:
    """Of the codes that a model knows the one for the same language as `code`, the most alike, the first; or None."""
    same = [other for other in known if same_language(code, other)]

    def alike(other: str) -> tuple[bool, ...]:
        equal = map(str.__eq__, split_code(code), split_code(other))
        return (_bare(other) == _bare(code), *equal, not split_code(other)[2])  # rather of no region than of another

    return max(same, key=alike, default=None)


def known_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer of a model with several languages calls them: M2M100, NLLB, mBART."""
    added = [*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())]
    return [*getattr(tokenizer, "lang_code_to_id", ()), *(token for token in added if not token.startswith("<"))]


def target_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The codes by which a Marian model of several target languages is told which; of other models none."""
    return [code for code in source_codes(tokenizer) if code != BACK_TRANSLATED]


def source_codes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The `>>codes<<` that the sources of a Marian model may begin with; of other models none."""
    tokens = getattr(tokenizer, "supported_language_codes", None) or ()
    if getattr(tokenizer, "separate_vocabs", False):  # for which Marian's own list is empty
        tokens = (token for token in tokenizer.get_vocab() if token.startswith(">>"))
    return [token for token in tokens if LANGUAGE_CODE.fullmatch(token)]


def is_reversed(known: tuple[str | None, str | None], source: str | None, target: str | None) -> bool:
    """Whether languages that were asked for are the known source and target exchanged."""
    if None in (*known, source, target):
        return False
    return all(map(same_language, known, (target, source))) and not all(map(same_language, known, (source, target)))


def is_written_without_blanks(code: str | None) -> bool:
    """Whether words stand side by side in a language, as in Japanese: `jap`, `JA`, `zh_CN`, `yue` and so on."""
    language, script, _ = split_code(code)
    return language in LANGUAGES_WITHOUT_BLANKS and script != "latn"


# Blank text

# What OPUS-MT models with several target languages have before a source.
# In some languages such marks are quotes: `>>Komm her!<<` is text.
LANGUAGE_CODE = re.compile(r"\s*>>(?a:[a-z][\w@-]*)<<\s*")
# Likewise before a source of the training that a model has made: no language, and in no text that people translate.
BACK_TRANSLATED = ">>bt<<"
# Beside controls, formats and blanks: joiners, fillers and variation selectors, which Unicode calls marks or letters.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_BLANK_IDS: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()


def is_blank(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], text: str | None = None) -> bool:
    """Whether there is nothing to translate in a source, which then has an empty translation.

    Args:
        tokenizer: the source's.
        input_ids: of one source. It is blank if they are nothing but special tokens, codes of languages and pieces
            without a visible character, such as the bare beginning of a word.
        text: what they were made from, which alone says of an unknown token whether it is visible; without it, it is.
    """
    if text is not None and is_blank_text(text):
        return True
    blank = _BLANK_IDS.get(tokenizer)
    if blank is None:
        blank = _BLANK_IDS[tokenizer] = _blank_ids(tokenizer)
    return all(int(index) in blank for index in input_ids)


def is_blank_text(text: str) -> bool:
    """Whether nothing of a source is to be seen, a code of a language before it apart."""
    code = LANGUAGE_CODE.match(text)
    return not _is_visible(text[code.end() :] if code else text)


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Zs") and not INVISIBLE.match(c) for c in text)


def _blank_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that show nothing of a source: special tokens but the unknown one, codes of languages, blank pieces."""
    pieces = tokenizer.get_vocab().items()
    shown_as_blank = {i for piece, i in pieces if not _is_visible(piece.strip("▁")) or LANGUAGE_CODE.fullmatch(piece)}
    languages = getattr(tokenizer, "lang_token_to_id", {}).values()  # of M2M100, whose codes are no special tokens
    return frozenset({*shown_as_blank, *tokenizer.all_special_ids, *languages} - {tokenizer.unk_token_id})


# Special tokens


HALVES = re.compile("[\ud800-\udfff]")


def live_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What a text must be tokenised with `split_special_tokens` for, lest it end or become padding there."""
    if not isinstance(tokenizer, MarianTokenizer):
        return re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")
    names = [tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token]
    return re.compile("|".join([*map(re.escape, names), r".>>[^<>]+<<"]), re.DOTALL)


def leading_code(tokenizer: PreTrainedTokenizerBase, text: str) -> re.Match[str] | None:
    """The code that a source begins with, blanks around it included, if it is one of a Marian model's."""
    code = LANGUAGE_CODE.match(text) if isinstance(tokenizer, MarianTokenizer) else None
    if code and tokenizer.convert_tokens_to_ids(code.group().strip()) != tokenizer.unk_token_id:
        return code
    return None


def as_plain_code(tokenizer: PreTrainedTokenizerBase, text: str, target: bool = False) -> str:
    """A text from whose beginning `MarianTokenizer` takes no language's code but, of a source, one that it has.

    Halves of characters, which a string of JavaScript may end with and no tokenizer takes, become the sign for those.
    """
    if HALVES.search(text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not target and leading_code(tokenizer, text):
        return text.lstrip()  # it is looked for in front of all blanks
    is_taken = isinstance(tokenizer, MarianTokenizer) and text.startswith(">>")
    return f" {text}" if is_taken else text  # SentencePiece drops the space


def without_ends(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[int]:
    """Ids of one text with unknown for padding and ends of sentence that come before the last one.

    Characters without a piece come out of SentencePiece in one, which a tokenizer in Python, such as Marian's and
    M2M100's, may take for the special token that is called so.
    """
    eos, special = tokenizer.eos_token_id, {tokenizer.eos_token_id, tokenizer.pad_token_id}
    if tokenizer.is_fast or eos not in input_ids:
        return input_ids
    end = len(input_ids) - 1 - input_ids[::-1].index(eos)
    if special.isdisjoint(input_ids[:end]):
        return input_ids
    return [*(tokenizer.unk_token_id if index in special else index for index in input_ids[:end]), *input_ids[end:]]


# Sentences

# What ends a sentence wherever it stands: stops of East Asia, Armenian, Hebrew, Arabic, Urdu, Syriac, N'Ko, of India,
# Tibetan, Burmese, Ethiopic, Cree, Philippine, Khmer, Mongolian, Limbu, Balinese, Lepcha, Santali, Lisu, Vai, Bamum,
# Javanese, Cham, Meetei, Chakma.
WIDE_STOPS = (
    "。！？｡．﹒︒︕︖﹖﹗։\u05c3\u061d-\u061f\u06d4\u0700-\u0702\u07f9।॥།༎။።፧፨᙮᜵᜶។៕᠃᠉᥄᥅᭚᭛᭟᰻᰼᱾᱿꓿꘎꘏꛳꛷꧉꩝-꩟꫰꫱꯫"
    "\U00011141-\U00011143"
)
# What ends one before a blank: Latin stops. Some signs are stops after a Greek or an Armenian letter, or in pairs.
QUESTIONS = "!?‼‽⁇⁈⁉⸮"
NARROW_STOPS = f".…‥․{QUESTIONS}"
FULL_STOPS = (".", "．", "﹒", "\u06d4")
QUOTES = "\"'”’“‘»›«‹」』》〉〞〟＂"  # that close; some of them open elsewhere
OPENING = "「『（(［[【《〈{¿¡„‚“‘"
STOP = re.compile(
    rf"(?P<mark>(?:[{WIDE_STOPS}{NARROW_STOPS}]|፡፡|(?<=[\u0370-\u03ff\u1f00-\u1fff])[;\u037e]|(?<=[\u0531-\u0588]):)+)"
    rf"(?P<closing>(?:[\"'”’」』》〉〞〟＂)\]}}）］｝】〕〗〙〛]|[ \u00a0\u202f]?[»›“‘«‹](?!\w))*)"
)
WIDE_STOP = re.compile(f"[{WIDE_STOPS}]|፡፡")
GOES_ON = re.compile(f"[、，,;:=＝{WIDE_STOPS}{NARROW_STOPS}]")
UP_TO_A_WORD = re.compile(rf"[\s{re.escape(OPENING)}{QUOTES}]*")
LAST_WORD = re.compile(rf"[^\s{re.escape(OPENING)}{QUOTES}—–-]*$")
IDEOGRAPH = re.compile(  # or a Japanese letter, or what opens a quotation
    "[「『（［【《〈\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
IN_AN_ADDRESS = re.compile(r"[/=][!-~]*$")
ENUMERATOR = re.compile(r"\s*[(（\[]?\d{1,3}")
ABBREVIATION = re.compile(
    r"mr|mrs|ms|mx|dr|prof|st|sra?|srta|rev|gen|col|capt|lt|sgt|cpl|maj|cmdr|gov|sen|rep|hon|messrs|mmes?|mlle|hr|frl?|"
    r"vs|cf|approx|ca|bzw|viz|mt|ft|e\.g|i\.e|z\.b|d\.h|p\.ex",
    re.IGNORECASE,
)
BEFORE_A_NUMBER = re.compile(
    "nos?|nr|figs?|eqs?|sec|vols?|pp?|ch|art|al|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec", re.IGNORECASE
)
AFTER_A_GERMAN_ORDINAL = re.compile("Jan|Feb|März|Apr|Mai|Jun|Jul|Aug|Sep|Okt|Nov|Dez|Jahrhundert")
# J., U.S., a.m., Ph.D., Inc., etc. end a sentence where one of these words follows.
LETTERS = re.compile(r"(?:[^\W\d_]{1,2}\.)*[^\W\d_]|jr|inc|ltd|co|corp|bros|etc|usw", re.IGNORECASE)
BEGINNING = re.compile(
    r"(?:The|He|She|It|They|We|You|I|This|That|These|Those|There|But|And|In|On|At|However|If|When|What|Why|How|His|Her|"
    r"My|Our|Their|So|After|Then)\b(?!\.)"
)


def split_into_sentences(line: str) -> list[str]:
    """Split a line of text at sentence ends, by punctuation; blanks between the sentences are dropped.

    For all scripts that have stops (Thai has none), in time that grows as the text does. A stop in a number, an
    address or an abbreviation ends no sentence, and where the line begins with a capital, no sentence begins with a
    small letter. In doubt a sentence goes on: two at once are translated better than a half.
    """
    first_letter = next((char for char in line if char.isupper() or char.islower()), "")
    sentences, start = [], 0
    for stop in STOP.finditer(line):
        if _ends_sentence(line, start, stop, cased=first_letter.isupper()):
            sentences.append(line[start : stop.end()].strip())
            start = stop.end()
    return [sentence for sentence in (*sentences, line[start:].strip()) if sentence]


def _ends_sentence(line: str, start: int, stop: re.Match, cased: bool) -> bool:
    """Whether a stop, with what closes after it, ends the sentence that began at `start`."""
    mark, closing = stop["mark"], stop["closing"]
    # No more of the sentence than is needed, so that the time does not grow with its square.
    before, after = line[max(start, stop.start() - 64) : stop.start()], line[stop.end() : stop.end() + 1]
    if not after or GOES_ON.match(after):
        return not after
    word = UP_TO_A_WORD.match(line, stop.end()).end()
    following = line[word : word + 12]
    if mark in FULL_STOPS:
        if before[-1:].isdigit() and after.isdigit():
            return False
        if (stop.start() - start < 8 and ENUMERATOR.fullmatch(before)) or _is_abbreviation(before, following, cased):
            return False
    if (not mark.isascii() and WIDE_STOP.search(mark)) or _is_used_as_wide(before, mark, after):
        # 「はい。」と言った。 goes on after the quote, （以上。）次に does not after the bracket.
        return not closing or closing[-1] not in QUOTES or after.isspace() or after in OPENING
    if not after.isspace() or GOES_ON.match(following):
        return False
    small = cased and following[:1].islower()
    return not small or (mark[-1] in QUESTIONS and not closing)


def _is_used_as_wide(before: str, mark: str, after: str) -> bool:
    """Whether a Latin stop without a blank after it stands in East Asian text, as in 本当!?そうだ."""
    if after.isascii() or not IDEOGRAPH.match(after):
        return False
    if mark in FULL_STOPS:
        return IDEOGRAPH.match(before[-1:]) is not None
    return any(char in QUESTIONS for char in mark) and not IN_AN_ADDRESS.search(before)


def _is_abbreviation(before: str, following: str, cased: bool) -> bool:
    """Whether a full stop that ends `before` is of an abbreviation, or of an ordinal number."""
    word = LAST_WORD.search(before[-16:]).group()
    if ABBREVIATION.fullmatch(word):
        return True
    if word.isdigit():
        return len(word) < 3 and AFTER_A_GERMAN_ORDINAL.match(following) is not None
    if following[:1].isdigit() and BEFORE_A_NUMBER.fullmatch(word):
        return True
    if cased and len(word) == 1 and word.islower():
        return False
    return LETTERS.fullmatch(word) is not None and not BEGINNING.match(following)


# The pipeline

LINE_END = re.compile("(\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029])")
BOUNDS = ("max_new_tokens", "max_length")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
# In the place of an option that the pipeline was made with, where a call's `generation_config` counts instead.
REPLACED = object()
# The tokenizers of models of several languages hold the source's as their state.
_LANGUAGE_LOCK = threading.Lock()


class TranslationPipeline(ChunkPipeline):
    """Translate text with a sequence-to-sequence model.

    ```python
    >>> translator = pipeline("translation", model="org/rs-marian-ja-en")
    >>> translator("猫が好きです。")
    [{'translation_text': 'I like cats.'}]
    ```

    Takes a string, a list (or a tuple, or a column of a dataset), a generator or a dataset of strings; arguments that
    are not named below go to `generate`. A string or a list gives a list with a dict for each text; with
    `num_return_sequences` over 1, a list gives a list of such lists. A generator or a dataset gives an iterator over
    one list a text. Blank text has an empty translation.

    Args:
        split_sentences (`bool` or `Callable[[str], list[str]]`, *optional*):
            Split each text into lines and sentences (or by the function given), translate these, and join the
            results. Without it a text of several lines is translated as one sentence, and one that is longer than the
            model takes is cut, both with a warning that names it.
        src_lang, tgt_lang (`str`, *optional*):
            For models of several languages, in any code; the name of the task (`translation_de_to_fr`) says the same.
            M2M100, NLLB and mBART are told both, OPUS-MT gets `>>fra<<` before the text, T5 the prefix that its
            configuration has. A text that begins with a code or such a prefix keeps its own, for all its sentences.
        truncation (`bool` or `str`, *optional*):
            True cuts a text that is longer than the model takes without a warning; False refuses it.
        return_tensors (`bool`, *optional*): Return token ids as `translation_token_ids` instead of text.
        return_text (`bool`, *optional*): Return the text beside the token ids.
        return_dict_in_generate, output_scores (`bool`, *optional*):
            Either adds `token_logprobs`, the log-probability of each token, and `score`: that of the beam search, else
            the mean of `token_logprobs`; of several sentences the mean of their scores.
        clean_up_tokenization_spaces (`bool`, *optional*): Passed to the tokenizer.

    Raises:
        ValueError: the model cannot translate, or not between these languages; the input is not text, or too long and
            not to be cut.
    """

    _load_tokenizer = True
    # What a checkpoint that says nothing of length is given; `generate` alone would stop at 20 tokens.
    default_max_new_tokens = 256

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (self.model.config.is_encoder_decoder and self.model.can_generate()):
            raise ValueError(f"translation needs a sequence-to-sequence model, got {type(self.model).__name__}")
        if self.model.training:
            logger.warning(
                f"The {type(self.model).__name__} is in training mode and translates with dropout: call its eval()."
            )
        self._own_codes: dict[str, str] = {}
        source, target = self._languages(**self._preprocess_params)
        self._check_languages(source, target)
        settings = vars(self.model.generation_config)
        of_task = {name: value for name, value in self._task_params(source, target).items() if name in settings}
        if self._forward_params.get("generation_config") is None:
            self._forward_params = {**of_task, **self._forward_params}

        if isinstance(name := self._forward_params.get("assistant_model"), str):
            # As transformers' own pipelines that generate take it.
            assistant = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=self.model.dtype).to(self.model.device)
            self._forward_params["assistant_model"] = assistant

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and tokenizer; of a model that is no RSMarian without this pipeline, which it does not need."""
        if self.model.config.model_type == "rs_marian":
            super().save_pretrained(save_directory, **kwargs)
        else:
            for part in (self.model, self.tokenizer):
                part.save_pretrained(save_directory, **kwargs)

    def _languages(
        self, src_lang: str | None = None, tgt_lang: str | None = None, **_: Any
    ) -> tuple[str | None, str | None]:
        """Source and target as they were asked for, by arguments or by the name of the task."""
        named = NAMED_TASK.fullmatch(self.task or "")
        source, target = named.groups() if named else (None, None)
        return src_lang or source, tgt_lang or target

    def _check_languages(self, source: str | None, target: str | None) -> None:
        known = (getattr(self.tokenizer, "source_lang", None), getattr(self.tokenizer, "target_lang", None))
        if None in known or target_codes(self.tokenizer):
            return
        source, target = source or known[0], target or known[1]
        if is_reversed(known, source, target):
            asked = self.task if self._languages() == (source, target) else f"from {source} to {target}"
            raise ValueError(f"the model translates from {known[0]} to {known[1]}, not {asked}")
        if not all(map(same_language, known, (source, target))):
            # Not an error: models are tried on languages that are close to theirs.
            logger.warning(f"The model translates from {known[0]} to {known[1]}; asked for is {source} to {target}.")

    def _task_params(self, source: str | None, target: str | None) -> dict[str, Any]:
        """What a configuration says of one translation task, as T5's does: a prefix, and options of `generate`."""
        tasks = getattr(self.model.config, "task_specific_params", None) or {}
        for task, params in tasks.items():
            named = NAMED_TASK.fullmatch(task)
            if named and all(map(same_language, named.groups(), (source, target))):
                return params
        return tasks.get("translation") or {}

    def _sanitize_parameters(
        self,
        split_sentences: bool | Callable[[str], list[str]] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        truncation: bool | str | None = None,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        return_type: int | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        stop_sequence: str | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if not (truncation is None or isinstance(truncation, bool) or truncation in TRUNCATIONS):
            raise ValueError(f"truncation must be True, False or one of {', '.join(TRUNCATIONS)}, got {truncation!r}")
        config = generate_kwargs.get("generation_config")
        if not (config is None or isinstance(config, GenerationConfig)):
            raise ValueError(f"generation_config must be a GenerationConfig, got {config!r:.80}")
        if not (split_sentences is None or isinstance(split_sentences, bool) or callable(split_sentences)):
            raise ValueError(f"split_sentences must be True, False or a function, got {split_sentences!r}")
        if return_type is not None:  # of transformers 4: 0 for the ids, 1 for the text
            return_tensors, return_text = return_type == 0, return_type == 1
        if stop_sequence is not None:  # likewise; it ends with the first token of it
            ids = self.tokenizer(text_target=stop_sequence, add_special_tokens=False)["input_ids"]
            generate_kwargs["eos_token_id"] = ids[0]
        preprocess = {
            "split_sentences": split_sentences,
            "src_lang": src_lang,
            "tgt_lang": tgt_lang,
            "truncation": truncation,
        }
        postprocess = {
            "return_tensors": return_tensors,
            "return_text": return_text,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        if generate_kwargs.get("generation_config") is not None:
            # That of a call takes the place of all that the pipeline was made with, as in transformers' own pipelines.
            made_with = getattr(self, "_forward_params", {})  # nothing yet when the pipeline is made
            options = vars(GenerationConfig()).keys() & made_with.keys()
            generate_kwargs = {**dict.fromkeys(options, REPLACED), **generate_kwargs}
        elif any(name in generate_kwargs for name in BOUNDS):
            # A bound of the call takes the place of any that the pipeline was made with.
            generate_kwargs = {**dict.fromkeys(BOUNDS, REPLACED), **generate_kwargs}
        given = ({k: v for k, v in group.items() if v is not None} for group in (preprocess, postprocess))
        preprocess, postprocess = given
        return preprocess, generate_kwargs, postprocess

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes)):
            inputs = list(inputs)
        elif isinstance(inputs, Iterator):  # `map` and the like, beside generators
            inputs = (text for text in inputs)
        if isinstance(inputs, (list, Dataset)) and isinstance(inputs, Sized) and not len(inputs):
            return []
        if called := {name: kwargs[name] for name in ("src_lang", "tgt_lang") if kwargs.get(name)}:
            self._check_languages(*self._languages(**{**self._preprocess_params, **called}))
        results = super().__call__(inputs, **kwargs)
        if isinstance(inputs, list) and all(len(result) == 1 for result in results):
            return [result[0] for result in results]
        return results

    def preprocess(
        self,
        inputs: str,
        split_sentences: bool | Callable[[str], list[str]] = False,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        truncation: bool | str | None = None,
    ) -> Iterator[dict[str, Any]]:
        if not isinstance(inputs, str):
            raise ValueError(
                f"translation takes a text or a list of them, got {type(inputs).__name__}: {inputs!r:.80}. "
                "For a column of a dataset use transformers.pipelines.pt_utils.KeyDataset"
            )
        source, target = self._languages(src_lang, tgt_lang)
        prefix, text = self._prefix(inputs, source, target)
        if split_sentences:
            chunks = self._split(text, split_sentences, target, prefix)
        else:
            chunks = [(text, "", prefix)]
            if lines := len(LINE_END.findall(text.strip())):
                logger.warning(
                    f"A text of {lines + 1} lines is translated as one sentence, and may lose the others; "
                    f"split_sentences=True translates line by line. The text begins: {text[:80]!r}"
                )
        for number, (sentence, separator, prefix) in enumerate(chunks):
            # What is a special token in the prefix is meant as one.
            live = live_tokens(self.tokenizer)
            split = bool(live.search(as_plain_code(self.tokenizer, sentence)) and not live.search(prefix))
            encoded = self._encode(prefix + sentence, source, target, truncation, bool(split_sentences), split)
            blank = is_blank(self.tokenizer, encoded["input_ids"][0], sentence)
            yield {**encoded, "is_last": number == len(chunks) - 1, "separator": separator, "is_blank": blank}

    def _prefix(self, text: str, source: str | None, target: str | None) -> tuple[str, str]:
        """What a text has to begin with for the model to know its task, and the rest of the text."""
        codes, has_code = target_codes(self.tokenizer), leading_code(self.tokenizer, text) is not None
        if len(codes) > 1 and not (target or has_code or is_blank_text(text)):
            logger.warning_once(
                "The model translates into several languages and was not told which: give tgt_lang, or begin the text "
                f"with one of {', '.join(codes)}."
            )
        if codes and target and not has_code:
            code = find_language(target, codes)
            if code is None and not same_language(target, getattr(self.tokenizer, "target_lang", None)):
                raise ValueError(f"the model has no code for the target language {target!r}, only {', '.join(codes)}")
            return (f"{code} " if code else ""), text
        tasks = getattr(self.model.config, "task_specific_params", None) or {}
        for prefix in filter(None, (params.get("prefix") for params in tasks.values())):
            if text.startswith(prefix):
                return prefix, text[len(prefix) :]
        prefix = self._task_params(source, target).get("prefix") or getattr(self.model.config, "prefix", None)
        return prefix or "", text

    def _split(
        self,
        text: str,
        split_sentences: bool | Callable[[str], list[str]],
        target: str | None = None,
        prefix: str = "",
    ) -> list[tuple[str, str, str]]:
        """The sentences of a text, each with what separates its translation from the next, and what it begins with."""
        split = split_sentences if callable(split_sentences) else split_into_sentences
        target = target or getattr(self.tokenizer, "target_lang", None) or getattr(self.tokenizer, "tgt_lang", None)
        chunks: list[tuple[str, str, str]] = []
        lines = LINE_END.split(text)
        for line, line_end in zip(lines[::2], [*lines[1::2], ""], strict=True):
            if code := leading_code(self.tokenizer, line):  # of this line, and of what follows
                prefix, line = f"{code.group().strip()} ", line[code.end() :]
                target = prefix
            sentences = split(line)
            if isinstance(sentences, str) or not isinstance(sentences, Iterable):
                raise ValueError(f"split_sentences must give a list of sentences, got {sentences!r:.80}")
            blank = "" if is_written_without_blanks(target) else " "
            *sentences, last = list(sentences) or [""]
            chunks += [*((sentence, blank, prefix) for sentence in sentences), (last, line_end, prefix)]
        return chunks

    def _encode(
        self,
        text: str,
        source: str | None,
        target: str | None,
        truncation: bool | str | None,
        is_split: bool,
        split_special_tokens: bool,
    ) -> dict[str, Any]:
        """The inputs of `generate`, cut to what the model takes."""
        options = {"split_special_tokens": True} if split_special_tokens else {}
        encoded = self._tokenize(text, source, target, **options)
        length = encoded["input_ids"].shape[-1]
        positions = self._positions("encoder")
        if truncation in (False, "do_not_truncate"):
            if length > positions:
                raise ValueError(
                    f"the input has {length} tokens and the model takes {positions}: leave truncation=False out, or "
                    f"set split_sentences=True. The input begins: {text[:80]!r}"
                )
            return encoded
        limit = min(self.tokenizer.model_max_length, positions)
        if length <= limit:
            return encoded
        if truncation is None:
            mend = "split_sentences=True translates all of it, sentence by sentence"
            if is_split:
                mend = "no end of a sentence was found in it, give a function as split_sentences that finds one"
            logger.warning(
                f"Input of {length} tokens is cut to the {limit} that the model takes; {mend}. "
                f"The input begins: {text[:80]!r}"
            )
        return self._tokenize(text, source, target, truncation=True, max_length=limit, **options)

    def _positions(self, side: str) -> float:
        """How many tokens a side of the model has positions for."""
        config = getattr(self.model.config, side, self.model.config)
        return getattr(config, "max_position_embeddings", None) or math.inf

    def _tokenize(self, text: str, source: str | None, target: str | None, **options: Any) -> dict[str, Any]:
        """A tokenizer's encoding, with the target's `forced_bos_token_id` for models that are told their languages.

        No special token of a text is live, as in `tokenization.encode`.
        """
        tokenizer = self.tokenizer
        text = as_plain_code(tokenizer, text)
        options |= {"return_tensors": "pt", "verbose": False}
        if not self._is_told_languages():
            encoded = tokenizer(text, **options)
        else:
            source, target = self._own_code(source), self._own_code(target)
            if target is None and not self._has_target():
                target = getattr(tokenizer, "tgt_lang", None)
            with _LANGUAGE_LOCK:
                before = tokenizer.src_lang
                tokenizer.src_lang = source = source or before
                try:
                    build = partial(tokenizer._build_translation_inputs, src_lang=source, tgt_lang=target)
                    encoded = (build if target else tokenizer)(text, **options)
                finally:
                    tokenizer.src_lang = before
        encoded["input_ids"] = torch.tensor([without_ends(tokenizer, encoded["input_ids"][0].tolist())])
        return {name: value for name, value in encoded.items() if name != "token_type_ids"}

    def _is_told_languages(self) -> bool:
        """Whether the model has several languages, and its tokenizer is told the source, `generate` the target."""
        return hasattr(self.tokenizer, "_build_translation_inputs")

    def _has_target(self) -> bool:
        """Whether the checkpoint itself says which of several languages it translates into."""
        settings = self.model.generation_config
        start = settings.decoder_start_token_id
        return (
            settings.forced_bos_token_id is not None
            or start in getattr(self.tokenizer, "lang_code_to_id", {}).values()
        )

    def _own_code(self, code: str | None) -> str | None:
        """What the tokenizer calls a language."""
        if code is not None and code not in self._own_codes:
            known = known_languages(self.tokenizer)
            if (own := find_language(code, known)) is None:
                raise ValueError(f"the model knows no language {code!r}, only {', '.join(known)}")
            self._own_codes[code] = own
        return self._own_codes.get(code)

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "separator", "is_blank")}
        forced_bos = _first(model_inputs.pop("forced_bos_token_id", None))
        blank = passed_on["is_blank"]
        settings = self._settings(generate_kwargs, forced_bos, all(blank) if isinstance(blank, list) else blank)
        output = self.model.generate(**model_inputs, **settings)
        outputs = {"output_ids": output}
        if isinstance(output, ModelOutput):
            outputs = {"output_ids": output.sequences, **self._scores(output)}
        # (sentences, returned sequences, …)
        sentences = model_inputs["input_ids"].shape[0]
        return {name: value.reshape(sentences, -1, *value.shape[1:]) for name, value in outputs.items()} | passed_on

    def _settings(self, given: dict[str, Any], forced_bos: int | None, blank: bool) -> dict[str, Any]:
        """What `generate` is given: one bound on the length, the target language, scores if any were asked for."""
        given = {name: value for name, value in given.items() if value is not REPLACED}
        config = given.pop("generation_config", None)
        # The nearest to the caller first; `generate` takes a checkpoint's `max_new_tokens` before his `max_length`.
        said = [given, vars(config) if config else {}, vars(self.model.generation_config)]
        bounds = next((source for source in said if any(source.get(name) is not None for name in BOUNDS)), {})
        prompt = given["decoder_input_ids"].shape[-1] if given.get("decoder_input_ids") is not None else 1
        name = next((name for name in BOUNDS if bounds.get(name) is not None), "max_new_tokens")
        longest = bounds.get(name, self.default_max_new_tokens)
        positions = self._positions("decoder")
        if prompt >= positions:
            raise ValueError(f"decoder_input_ids have {prompt} tokens, and the model takes {positions}")
        least = prompt + 1 if name == "max_length" else 1
        if longest < least:
            raise ValueError(f"{name} must be at least {least}, got {longest}")
        longest = min(longest - (least - 1), positions - prompt)
        settings = {"max_new_tokens": 1 if blank else longest, "max_length": None}
        if any(source.get(name) for source in said for name in ("return_dict_in_generate", "output_scores")):
            settings |= {"return_dict_in_generate": True, "output_scores": True}
        if self._is_told_languages() and not any(source.get("forced_bos_token_id") for source in said[:2]):
            if forced_bos is None and not self._has_target():
                raise ValueError("the model translates between several languages: give src_lang and tgt_lang")
            settings |= {} if forced_bos is None else {"forced_bos_token_id": forced_bos}
        given = {name: value for name, value in given.items() if name not in settings}
        if config is None:
            return given | settings
        if self.model.generation_config.max_new_tokens is None:  # else `generate` would say that both are there
            settings |= {"max_new_tokens": None, "max_length": prompt + settings["max_new_tokens"]}
        config = copy.deepcopy(config)  # beside which `generate` is to be given no options
        return config.update(**given, **settings) | {"generation_config": config}

    def _scores(self, output: ModelOutput) -> dict[str, torch.Tensor]:
        """The log-probability of each token, (sequences, tokens), NaN for padding, and the score of each sequence."""
        beams, score = getattr(output, "beam_indices", None), getattr(output, "sequences_scores", None)
        rows = torch.arange(len(output.sequences), device=output.sequences.device)
        length = len(output.scores) if beams is None else int((beams >= 0).sum(-1).max())
        tokens = output.sequences[:, output.sequences.shape[1] - length :]
        logprobs = []
        for step in range(length):
            # Those of a beam search are log-probabilities already.
            scores = output.scores[step].float().log_softmax(-1) if beams is None else output.scores[step].float()
            logprobs.append(scores[rows if beams is None else beams[:, step].clamp(min=0), tokens[:, step]])
        padding = (tokens == self.tokenizer.pad_token_id).flip(-1).cumprod(-1).flip(-1).bool()
        token_logprobs = torch.stack(logprobs, -1).masked_fill(padding, math.nan)
        return {"token_logprobs": token_logprobs, "score": token_logprobs.nanmean(-1) if score is None else score}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_tensors: bool = False,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        return_text = not return_tensors if return_text is None else return_text
        if not (return_text or return_tensors):
            raise ValueError("return_text=False leaves nothing to return: set return_tensors=True")
        records = []
        for sequence in range(model_outputs[0]["output_ids"].shape[1]):
            record: dict[str, Any] = {}
            shown = [outputs for outputs in model_outputs if not _first(outputs["is_blank"])]
            if return_text:
                record["translation_text"] = self._text(model_outputs, sequence, clean_up_tokenization_spaces)
            if return_tensors:
                ids = [outputs["output_ids"][0, sequence] for outputs in shown]
                record["translation_token_ids"] = torch.cat([torch.empty(0, dtype=torch.long), *ids])
            if "score" in model_outputs[0]:
                logprobs = [value for outputs in shown for value in outputs["token_logprobs"][0, sequence].tolist()]
                scores = [outputs["score"][0, sequence].item() for outputs in shown]
                record["score"] = sum(scores) / max(1, len(scores))
                record["token_logprobs"] = [value for value in logprobs if not math.isnan(value)]
            records.append(record)
        return records

    def _text(self, model_outputs: list[dict[str, Any]], sequence: int, clean_up: bool | None) -> str:
        """The translations of a text's sentences, joined."""
        codes = {*getattr(self.tokenizer, "lang_token_to_id", {}).values()}  # of M2M100, not always special tokens
        text = ""
        for outputs in model_outputs:
            if not _first(outputs["is_blank"]):
                ids = [index for index in outputs["output_ids"][0, sequence].tolist() if index not in codes]
                text += self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up)
            text += _first(outputs["separator"])
        return text


def _first(value: Any) -> Any:
    """What a batch of one holds, or the value itself."""
    return value[0] if isinstance(value, (list, tuple)) else value


__all__ = ["TranslationPipeline"]
