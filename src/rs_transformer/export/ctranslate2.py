"""CTranslate2: a converter for RSMarian, and decoding with what it writes.

Importing this file registers the loader, so that CTranslate2's own command works with it:

    python -m rs_transformer.export.ctranslate2 --model runs/rs6 --output_dir rs6-ct2 --quantization int8

CTranslate2 stores equal weights once: each shared layer is in the file once, and in memory. DeepNet's residual scale,
step embeddings and the LayerNorms of steps are folded into the weights of the steps.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from ctranslate2 import Translator
from ctranslate2.converters import Converter
from ctranslate2.converters import transformers as converters
from ctranslate2.specs import TransformerSpec
from transformers import MarianMTModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoints import first_line, load_checkpoint, load_parent
from ..decoding import DecodingArguments
from ..layer_transfer import expand
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..shortlist import Shortlist
from ..tokenization import check_tokenizer, check_vocabulary, convert_source_ids_to_tokens, vocabulary
from ..utils.files import check_output

logger = logging.get_logger(__name__)

SHORTLIST_FILE = "vmap.txt"  # the engine's name for it
QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float16", "int8_bfloat16", "int8_float32")


@converters.register_loader("RSMarianConfig")
class RSMarianLoader(converters.MarianMTLoader):
    """Loads an RSMarian as the Marian that it equals, and Marian.

    Unlike Marian's own loader it takes separate vocabularies, and the embedding of each token by the token's id:
    padding need not stand last, and there may be more embeddings than tokens.
    """

    class StrictModel:
        """What CTranslate2's own command calls."""

        from_pretrained = staticmethod(load_checkpoint)

    def get_model_class(self, config: Any, model_class: type) -> type:
        return self.StrictModel

    def get_model_spec(self, model: MarianMTModel) -> TransformerSpec:
        activation, known = model.config.activation_function, converters._SUPPORTED_ACTIVATIONS
        if activation not in known:
            raise ValueError(f"activation_function={activation} is none of CTranslate2's: {', '.join(known)}")
        spec = super().get_model_spec(expand(model) if isinstance(model, RSMarianForConditionalGeneration) else model)
        # Marian's loader gives the decoder the encoder's.
        spec.decoder.num_heads = spec.decoder.num_heads.dtype.type(model.config.decoder_attention_heads)
        return spec

    def _remove_pad_weights(self, spec: TransformerSpec) -> None:
        """Not the last row of everything: `__call__` knows which."""

    def __call__(self, model: MarianMTModel, tokenizer: PreTrainedTokenizerBase) -> TransformerSpec:
        check_tokenizer(model, tokenizer)
        spec = self.get_model_spec(model)
        start = model.get_decoder().embed_tokens.weight[model.config.decoder_start_token_id]
        if start.any():
            # The engine starts from an embedding of zeros: what the model starts from stands in the first position.
            scale = model.config.d_model**0.5 if model.config.scale_embedding else 1.0
            positions = spec.decoder.position_encodings
            positions.encodings = positions.encodings.clone()
            positions.encodings[0] += scale * start
        self.set_config(spec.config, model, tokenizer)
        source, target = (vocabulary(tokenizer, side) for side in ("source", "target"))
        spec.register_source_vocabulary(list(source))
        spec.register_target_vocabulary(list(target))
        inputs, outputs, projection = spec.encoder.embeddings[0], spec.decoder.embeddings, spec.decoder.projection
        for part, entries in ((inputs, source), (outputs, target), (projection, target)):
            part.weight = part.weight[list(entries.values())]
        if projection.has_bias():
            projection.bias = projection.bias[list(target.values())]
        return spec


class LoadedConverter(Converter):
    """Converts a model that is in memory, and leaves it as it is."""

    def __init__(self, model: MarianMTModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def _load(self) -> TransformerSpec:
        # CTranslate2 quantizes the tensors that it is given, in place and on the CPU.
        return RSMarianLoader()(copy.deepcopy(self.model).cpu(), self.tokenizer)


def convert(model: str, output_dir: str | Path, quantization: str = "float32", revision: str = "main") -> None:
    """Write a CTranslate2 folder of an RSMarian or Marian checkpoint, the tokenizer's files beside the model.

    Args:
        model: on the Hub or in a folder.
        output_dir: a conversion that is in it is written over.
        quantization: of the stored weights, one of `QUANTIZATIONS`.
        revision: branch, tag or commit of the model.

    Raises:
        FileExistsError: the folder has something else in it.
        ValueError: as `load_parent`, or an activation that the engine has not.
    """
    if not Path(output_dir, "model.bin").is_file():
        check_output(Path(output_dir))
    loaded, tokenizer = load_parent(model, revision, dtype=torch.float32)
    LoadedConverter(loaded, tokenizer).convert(str(output_dir), quantization=quantization, force=True)
    tokenizer.save_pretrained(output_dir)


def write_shortlist(shortlist: Shortlist, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a shortlist into a converted model's folder, for `use_vmap=True`."""
    shortlist.write_vmap(Path(folder, SHORTLIST_FILE), tokenizer)


class CTranslate2Decoder:
    """Decoding by CTranslate2, from a folder that a converter has made.

    Args:
        folder: a Marian or RSMarian model in CTranslate2's format.
        tokenizer: of the model that it was made from.
        decoding: how to decode. The engine counts lengths otherwise than `generate`, so that a length penalty may
            choose another hypothesis.
        max_length: of a translation, in tokens, without the end of sentence.
        n_best: hypotheses a sentence.
        use_shortlist: only the target tokens that the folder's shortlist has for a batch are looked at.
        device: where; default: this process's.

    Raises:
        ValueError: the folder holds no model, or one of another vocabulary; or no shortlist, where it is to be used.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        decoding: DecodingArguments,
        max_length: int,
        n_best: int = 1,
        use_shortlist: bool = False,
        device: torch.device | None = None,
    ):
        found = []
        for side in ("source", "target"):
            files = [Path(folder, f"{name}_vocabulary.json") for name in ("shared", side)]
            found.append(next((json.loads(file.read_text("utf-8")) for file in files if file.is_file()), None))
        check_vocabulary(folder, tokenizer, *found)
        if use_shortlist and not Path(folder, SHORTLIST_FILE).is_file():
            raise ValueError(
                f"{folder} has no shortlist ({SHORTLIST_FILE}): export its model again with shortlist=true"
            )
        self.tokenizer, self.decoding, self.max_length, self.n_best = tokenizer, decoding, max_length, n_best
        self.use_shortlist = use_shortlist
        self.entries = vocabulary(tokenizer, "target")
        device = PartialState().device if device is None else device
        if device.type == "cuda":
            try:
                self.engine = Translator(str(folder), device="cuda", device_index=device.index or 0)
                self.translate_batch([[tokenizer.eos_token_id]])
                return
            except (RuntimeError, ValueError) as error:  # it needs the libraries of another CUDA than PyTorch's
                logger.warning(f"CTranslate2 cannot use the GPU, and translates on the CPU: {first_line(error)}")
        self.engine = Translator(str(folder), device="cpu", intra_threads=torch.get_num_threads())

    def translate_batch(self, input_ids: Sequence[list[int]]) -> list[list[str]]:
        """`n_best` translations of each of a batch of source token ids, the best first."""
        outputs = self.engine.translate_batch(
            [convert_source_ids_to_tokens(self.tokenizer, ids) for ids in input_ids],
            beam_size=self.decoding.num_beams,
            num_hypotheses=self.n_best,
            length_penalty=self.decoding.length_penalty,
            min_decoding_length=0,  # as in `generate`; by default the engine says at least one token
            max_decoding_length=self.max_length,
            max_input_length=0,
            use_vmap=self.use_shortlist,
        )
        ids = [[[self.entries[token] for token in tokens] for tokens in output.hypotheses] for output in outputs]
        return [self.tokenizer.batch_decode(hypotheses, skip_special_tokens=True) for hypotheses in ids]


def load(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    decoding: DecodingArguments,
    use_shortlist: bool = False,
    device: torch.device | None = None,
) -> CTranslate2Decoder:
    """A decoder whose translations are at most as long as those of `generate`, whose last token is the end."""
    length = decoding.max_new_tokens - 1
    return CTranslate2Decoder(folder, tokenizer, decoding, length, use_shortlist=use_shortlist, device=device)


if __name__ == "__main__":
    converters.main()
