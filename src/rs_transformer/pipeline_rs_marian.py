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

Self-contained: this file travels to the Hub beside the weights, as remote code. Not for whole corpora
(`decoding.py` batches by tokens and sorts by length).
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A sentence ends after Japanese and Chinese stops with their closing brackets, and after Latin ones before a blank.
SENTENCE_END = re.compile(
    r"(?<=[。！？!?．])(?![。！？!?．」』）)】”’\"'])\s*|(?<=[.!?…][\"'”’)\]])\s+|(?<=[.!?…])\s+"
)
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|No|e\.g|i\.e|approx)|\b[A-Z])\.$")
LANGUAGES_WITHOUT_BLANKS = ("ja", "jpn", "zh", "zho", "cmn", "th", "tha")
# What OPUS-MT models with several target languages have before a source.
LANGUAGE_CODE = re.compile(r"\s*>>[^<>]*<<\s*")
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
    if text is not None:
        code = LANGUAGE_CODE.match(text)
        if not _is_visible(text[code.end() :] if code else text):
            return True
    blank = _BLANK_IDS.get(tokenizer)
    if blank is None:
        blank = _BLANK_IDS[tokenizer] = _blank_ids(tokenizer)
    return all(int(index) in blank for index in input_ids)


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Zs") and not INVISIBLE.match(c) for c in text)


def _blank_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that show nothing of a source: special tokens but the unknown one, codes of languages, blank pieces."""
    pieces = tokenizer.get_vocab().items()
    shown_as_blank = {i for piece, i in pieces if not _is_visible(piece.strip("▁")) or LANGUAGE_CODE.fullmatch(piece)}
    languages = getattr(tokenizer, "lang_token_to_id", {}).values()  # of M2M100, whose codes are no special tokens
    return frozenset({*shown_as_blank, *tokenizer.all_special_ids, *languages} - {tokenizer.unk_token_id})


def split_into_sentences(line: str) -> list[str]:
    """Split a line of text at sentence ends, by punctuation; blanks between the sentences are dropped."""
    sentences: list[str] = []
    for part in SENTENCE_END.split(line):
        if not part.strip():
            continue
        if sentences and ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    return sentences


class TranslationPipeline(ChunkPipeline):
    """Translate text with a sequence-to-sequence model.

    ```python
    >>> translator = pipeline("translation", model="org/rs-marian-ja-en")
    >>> translator("猫が好きです。")
    [{'translation_text': 'i like cats.'}]
    ```

    Takes a string, a list, a generator or a dataset of strings; arguments that are not named below go to `generate`.
    A string or a list gives a list with a dict for each text; with `num_return_sequences` over 1, a list gives a list
    of such lists. A generator or a dataset gives an iterator over one list a text.

    Args:
        split_sentences (`bool` or `Callable[[str], list[str]]`, *optional*):
            Split each text into lines and sentences (or by the function given), translate these, and join the
            results. Without it a text that is longer than the model takes is cut, with a warning that names it.
        src_lang, tgt_lang (`str`, *optional*): For tokenizers of models with several languages.
        return_tensors (`bool`, *optional*): Return token ids as `translation_token_ids` instead of text.
        clean_up_tokenization_spaces (`bool`, *optional*): Passed to the tokenizer.
    """

    _load_tokenizer = True
    # What a checkpoint that says nothing of length is given; `generate` alone would stop at 20 tokens.
    default_max_new_tokens = 256

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (self.model.config.is_encoder_decoder and self.model.can_generate()):
            raise ValueError(f"translation needs a sequence-to-sequence model, got {type(self.model).__name__}")
        self._check_languages()

    def _check_languages(self) -> None:
        named = re.fullmatch(r"translation_(\w+)_to_(\w+)", self.task or "")
        known = (getattr(self.tokenizer, "source_lang", None), getattr(self.tokenizer, "target_lang", None))
        if not named or None in known or named.groups() == known:
            return
        if named.groups() == known[::-1]:
            raise ValueError(f"the model translates from {known[0]} to {known[1]}, not {self.task}")
        # Not an error: languages have several codes (ja, jpn).
        logger.warning(f"The model translates from {known[0]} to {known[1]}; the task asked for is {self.task}.")

    def _sanitize_parameters(
        self,
        split_sentences: bool | Callable[[str], list[str]] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        return_tensors: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {"split_sentences": split_sentences, "src_lang": src_lang, "tgt_lang": tgt_lang}
        postprocess = {
            "return_tensors": return_tensors,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        given = ({k: v for k, v in group.items() if v is not None} for group in (preprocess, postprocess))
        preprocess, postprocess = given
        return preprocess, generate_kwargs, postprocess

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
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
    ) -> Iterator[dict[str, Any]]:
        if not isinstance(inputs, str):
            raise ValueError(
                f"translation takes text, got {type(inputs).__name__}: {inputs!r:.80}. "
                "For a column of a dataset use transformers.pipelines.pt_utils.KeyDataset"
            )
        chunks = self._split(inputs, split_sentences) if split_sentences else [(inputs, "")]
        for number, (text, separator) in enumerate(chunks):
            encoded = self._encode(text, src_lang, tgt_lang)
            last = number == len(chunks) - 1
            yield {**encoded, "is_last": last, "separator": separator, "is_blank": not text.strip()}

    def _split(self, text: str, split_sentences: bool | Callable[[str], list[str]]) -> list[tuple[str, str]]:
        """The sentences of a text, each with what separates its translation from the next."""
        split = split_sentences if callable(split_sentences) else split_into_sentences
        language = str(getattr(self.tokenizer, "target_lang", None))
        blank = "" if language in LANGUAGES_WITHOUT_BLANKS else " "
        chunks: list[tuple[str, str]] = []
        for line in text.split("\n"):
            sentences = split(line) or [""]
            chunks += [(sentence, blank) for sentence in sentences[:-1]] + [(sentences[-1], "\n")]
        return chunks

    def _encode(self, text: str, src_lang: str | None, tgt_lang: str | None) -> dict[str, torch.Tensor]:
        limit = min(
            self.tokenizer.model_max_length,
            getattr(self.model.config, "max_position_embeddings", self.tokenizer.model_max_length),
        )
        build = getattr(self.tokenizer, "_build_translation_inputs", None)
        if build is not None and (src_lang or tgt_lang):
            encoded = build(text, return_tensors="pt", src_lang=src_lang, tgt_lang=tgt_lang)
        else:
            encoded = self.tokenizer(text, return_tensors="pt", verbose=False)
        length = encoded["input_ids"].shape[-1]
        if length > limit:
            logger.warning(
                f"Input of {length} tokens is cut to the {limit} that the model takes; split_sentences=True "
                f"translates all of it, sentence by sentence. The input begins: {text[:80]!r}"
            )
            # The last token, the end of sentence, stays.
            encoded = {name: torch.cat([ids[:, : limit - 1], ids[:, -1:]], dim=-1) for name, ids in encoded.items()}
        return dict(encoded)

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        passed_on = {name: model_inputs.pop(name) for name in ("is_last", "separator", "is_blank")}
        config = generate_kwargs.get("generation_config") or self.model.generation_config
        bounds = ("max_length", "max_new_tokens")
        if all(getattr(config, bound) is None and generate_kwargs.get(bound) is None for bound in bounds):
            positions = getattr(self.model.config, "max_position_embeddings", self.default_max_new_tokens + 1)
            generate_kwargs["max_new_tokens"] = min(self.default_max_new_tokens, positions - 1)
        output_ids = self.model.generate(**model_inputs, **generate_kwargs)
        batch_size = model_inputs["input_ids"].shape[0]
        # (sentences, returned sequences, length)
        return {"output_ids": output_ids.view(batch_size, -1, output_ids.shape[-1]), **passed_on}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_tensors: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        ids_by_chunk = [outputs["output_ids"][0] for outputs in model_outputs]
        records = []
        for sequence in range(len(ids_by_chunk[0])):
            if return_tensors:
                ids = torch.cat([ids[sequence] for ids in ids_by_chunk])
                records.append({"translation_token_ids": ids})
                continue
            text = ""
            for number, (ids, outputs) in enumerate(zip(ids_by_chunk, model_outputs, strict=True)):
                if not _first(outputs["is_blank"]):
                    text += self.tokenizer.decode(
                        ids[sequence],
                        skip_special_tokens=True,
                        clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                    )
                if number < len(model_outputs) - 1:
                    text += _first(outputs["separator"])
            records.append({"translation_text": text})
        return records


def _first(value: Any) -> Any:
    """What a batch of one holds, or the value itself."""
    return value[0] if isinstance(value, (list, tuple)) else value


__all__ = ["TranslationPipeline"]
