"""ONNX: an encoder and a decoder with a cache, for ONNX Runtime in applications and browsers.

Both graphs call the shared layers as often as the model is deep, and hold the weights of each once. What the decoder
attends to in the source is computed once for each stored layer, in the encoder's graph. `docs/export.md` has the loop
that decodes greedily with onnxruntime alone.
"""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript.optimizer import fold_constants
from torch import nn
from transformers import (
    AutoConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..checkpoints import load_parent
from ..decoding import DecodingArguments, TransformersEngine
from ..layer_transfer import collapse
from ..modeling_rs_marian import CACHE, RSMarianForConditionalGeneration, strict_forward

QUANTIZATIONS = ("float32", "int8")
GRAPHS = ("encoder", "decoder")
OPSET = 20
LARGEST_CONSTANT = 2**30
# Of each input the axes of any length: the batch, and source or past.
DYNAMIC_AXES = {"input_ids": (0, 1), "attention_mask": (0, 1), "source_states": (0, 1), "past": (0, 2)}


class EncoderGraph(nn.Module):
    """`input_ids`, `attention_mask` (batch, source) to `source_states` (batch, source, 2 · unique layers · d_model).

    Keys and values of the cross-attention of every stored decoder layer, one after another; of every step instead
    where the steps have biases or adapters of their own.
    """

    def __init__(self, model: RSMarianForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden_states = self.model.model.encoder(input_ids, attention_mask).last_hidden_state
        decoder = self.model.model.decoder
        steps = decoder.steps("decoder", None)
        states = [
            own.of("encoder_attn").project(layer.encoder_attn, name, hidden_states)
            for layer, own in (steps[step] for step in _distinct_sources(self.model))
            for name in ("k_proj", "v_proj")
        ]
        return torch.cat(states, dim=-1)


class DecoderGraph(nn.Module):
    """One token further.

    Inputs: `input_ids` (batch, 1), the last token, at first the start token; `attention_mask` (batch, source);
    `source_states` of the encoder's graph; `past` (batch, 2 · depth · heads, length, head width), at first of length
    0. Outputs: `logits` (batch, vocabulary) and `present`, the `past` of the next call.
    """

    def __init__(self, model: RSMarianForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        source_states: torch.Tensor,
        past: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decoder, config = self.model.model.decoder, self.model.config
        heads = config.decoder_attention_heads
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        pasts = past.split(heads, dim=1)
        sources = [
            states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in source_states.split(config.d_model, dim=-1)
        ]
        distinct = len(_distinct_sources(self.model)) == config.decoder_layers
        for step, layer in enumerate(decoder.layer_map):
            source = step if distinct else layer
            cache.self_attention_cache.update(*pasts[2 * step : 2 * step + 2], step)
            cache.cross_attention_cache.update(*sources[2 * source : 2 * source + 2], step)
            cache.is_updated[step] = True
        hidden_states = decoder(
            input_ids,
            encoder_hidden_states=source_states[..., : config.d_model],  # of the right length; its keys are cached
            encoder_attention_mask=attention_mask,
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state
        logits = self.model.lm_head(hidden_states[:, -1]) + self.model.final_logits_bias
        layers = cache.self_attention_cache.layers
        return logits, torch.cat([states for layer in layers for states in (layer.keys, layer.values)], dim=1)


def _distinct_sources(model: RSMarianForConditionalGeneration) -> list[int]:
    """The decoder's steps whose keys and values of the source are all that there are: the first of each layer."""
    decoder = model.model.decoder
    if decoder.step_projections is not None:
        return list(range(len(decoder.layer_map)))
    return [decoder.layer_map.index(layer) for layer in range(len(decoder.layers))]


def convert(model: str, output_dir: str | Path, quantization: str = "float32", revision: str = "main") -> None:
    """Write `encoder.onnx` and `decoder.onnx` of an RSMarian or Marian checkpoint, configuration and tokenizer beside.

    Args:
        model: on the Hub or in a folder.
        output_dir: written to.
        quantization: `"float32"`, or `"int8"`: ONNX Runtime's dynamic quantisation.
        revision: branch, tag or commit of the model.

    Raises:
        ValueError: as `load_parent`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = load_parent(model, revision, dtype=torch.float32, attn_implementation="eager")
    loaded.eval()
    config = json.loads(loaded.config.to_json_string())
    if not isinstance(loaded, RSMarianForConditionalGeneration):
        # A Marian is an RSMarian that stores every layer.
        sides = {f"{side}_unique_layers": getattr(loaded.config, f"{side}_layers") for side in ("encoder", "decoder")}
        loaded = collapse(loaded, method="first", **sides).eval()
        loaded.set_attn_implementation("eager")
    inputs = _example_inputs(loaded)
    for name, graph in zip(GRAPHS, (EncoderGraph(loaded), DecoderGraph(loaded)), strict=True):
        _export(graph.eval(), inputs[name], folder / f"{name}.onnx")
        if quantization == "int8":
            exact = (folder / f"{name}.onnx").rename(folder / f"{name}.float32.onnx")
            quantize_dynamic(exact, folder / f"{name}.onnx", weight_type=QuantType.QInt8)
            exact.unlink()
    for name in ("auto_map", "custom_pipelines"):
        config.pop(name, None)  # they tell of source code, which is not here
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _example_inputs(model: RSMarianForConditionalGeneration) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of the graphs that show each axis at a length of its own, and padding."""
    config = model.config
    batch, source, length = 3, 7, 5
    input_ids = torch.ones(batch, source, dtype=torch.long)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    heads = config.decoder_attention_heads
    past_shape = (batch, 2 * config.decoder_layers * heads, length, config.d_model // heads)
    return {
        "encoder": {"input_ids": input_ids, "attention_mask": attention_mask},
        "decoder": {
            "input_ids": input_ids[:, :1],
            "attention_mask": attention_mask,
            "source_states": torch.randn(batch, source, 2 * len(_distinct_sources(model)) * config.d_model),
            "past": torch.randn(past_shape),
        },
    }


def _export(graph: nn.Module, inputs: dict[str, torch.Tensor], file: Path) -> None:
    decoder = "past" in inputs
    axes = {name: DYNAMIC_AXES[name] for name in inputs}
    if decoder:
        axes["input_ids"] = (0,)  # one token
    program = torch.onnx.export(
        graph,
        kwargs=inputs,
        input_names=list(inputs),
        output_names=["logits", "present"] if decoder else ["source_states"],
        dynamic_shapes={name: dict.fromkeys(its, torch.export.Dim.DYNAMIC) for name, its in axes.items()},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    # The transposes of the weights are done here: a weight behind one would not be quantised. Then a shared layer may
    # stand there once for each step, and the metadata hold paths of this machine.
    fold_constants(program.model, input_size_limit=LARGEST_CONSTANT, output_size_limit=LARGEST_CONSTANT)
    for clean in (
        RemoveUnusedNodesPass(),
        DeduplicateInitializersPass(LARGEST_CONSTANT),
        ClearMetadataAndDocStringPass(),
    ):
        clean(program.model)
    program.save(file)


class OnnxForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """Exported graphs as a model that `generate` decodes with, greedily or with a beam; on the CPU.

    Args:
        folder: written by `convert`.
    """

    main_input_name = "input_ids"
    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, folder: str | Path):
        super().__init__(AutoConfig.from_pretrained(folder))
        self.generation_config = GenerationConfig.from_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.sessions = {
            name: onnxruntime.InferenceSession(Path(folder, f"{name}.onnx"), options, ["CPUExecutionProvider"])
            for name in GRAPHS
        }
        self.encoder = _OnnxEncoder(self.sessions["encoder"])

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.encoder

    @strict_forward
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Logits after each token, (batch, length, vocabulary). The cache has one layer; its keys are the `past`."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if cache.get_seq_length() == 0:
            # `generate` has made a cache with a layer for each step.
            cache.self_attention_cache, cache.cross_attention_cache = DynamicCache(), DynamicCache()
            past = self._empty_past(len(decoder_input_ids))
            cache.self_attention_cache.update(past, past[:, :0], 0)
        (layer,) = cache.self_attention_cache.layers
        inputs = {"attention_mask": attention_mask, "source_states": encoder_outputs[0]}
        logits = []
        for token in decoder_input_ids.split(1, dim=1):  # several where a translation has to begin with them
            found, present = _run(self.sessions["decoder"], {**inputs, "input_ids": token, "past": layer.keys})
            layer.keys, layer.values = present, present[:, :0]
            logits.append(found)
        return Seq2SeqLMOutput(logits=torch.stack(logits, dim=1), **{CACHE: cache})

    def _empty_past(self, batch: int) -> torch.Tensor:
        heads = self.config.decoder_attention_heads
        return torch.zeros(batch, 2 * self.config.decoder_layers * heads, 0, self.config.d_model // heads)


class _OnnxEncoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, session: onnxruntime.InferenceSession):
        super().__init__()
        self.session = session

    @strict_forward
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        (states,) = _run(self.session, {"input_ids": input_ids, "attention_mask": attention_mask})
        return BaseModelOutput(last_hidden_state=states)


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def load(folder: str | Path, tokenizer: PreTrainedTokenizerBase, decoding: DecodingArguments) -> TransformersEngine:
    """The written graphs, decoded with by `generate`."""
    return TransformersEngine(OnnxForSeq2SeqLM(folder).eval(), tokenizer, decoding)
