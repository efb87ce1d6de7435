"""ONNX in the layout of optimum-onnx and transformers.js, for ONNX Runtime in applications and browsers.

Both graphs call the shared layers as often as the model is deep, and hold the weights of each once. What the decoder
attends to in the source is computed once for each stored layer, with the first token. `docs/export.md` has the loop
that decodes greedily with onnxruntime alone.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript.optimizer import fold_constants
from torch import nn
from transformers import (
    AutoConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    MarianMTModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..checkpoints import load_parent
from ..decoding import DecodingArguments, TransformersEngine
from ..layer_transfer import collapse, stock_config
from ..modeling_rs_marian import RSMarianForConditionalGeneration
from ..utils.files import write_json
from ..versions_rs_marian import CACHE, strict_forward
from .tokenizer_json import write_tokenizer_json

# Of each the suffix that transformers.js gives its files.
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}
QUANTIZATIONS = tuple(SUFFIXES)
GRAPHS = ("encoder_model", "decoder_model_merged")
OPSET = 20
LARGEST_CONSTANT = 2**30
BATCH, SOURCE = "batch_size", "encoder_sequence_length"


def cache_names(depth: int) -> list[str]:
    """What the decoder's cache consists of, in the order of its inputs: `{step}.{side}.{key or value}`."""
    sides = ("decoder", "encoder")
    return [f"{step}.{side}.{part}" for step in range(depth) for side in sides for part in ("key", "value")]


def additive_mask(seen: torch.Tensor) -> torch.Tensor:
    """Zero where a position is seen, else the lowest number: what transformers takes as it is, in few operations."""
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def source_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """`additive_mask` of the source, (batch, 1, 1, source)."""
    return additive_mask(attention_mask[:, None, None].bool())


class EncoderGraph(nn.Module):
    """`input_ids`, `attention_mask` (batch, source) to `last_hidden_state` (batch, source, d_model)."""

    def __init__(self, model: RSMarianForConditionalGeneration):
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids, source_mask(attention_mask)).last_hidden_state


class DecoderGraph(nn.Module):
    """Some tokens further.

    Inputs: `encoder_attention_mask` (batch, source); `input_ids` (batch, length), the tokens since the last call, at
    first the start token; `encoder_hidden_states` (batch, source, d_model); `past_key_values`, the tensors of
    `cache_names`, (batch, heads, past or source, head width); `use_cache_branch` (1,), false at the first call, whose
    pasts are empty. Outputs: `logits` (batch, length, vocabulary) and the next pasts.

    Steps that apply one layer see the same source by the same keys and values: those of the first such step.
    """

    def __init__(self, model: RSMarianForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(
        self,
        encoder_attention_mask: torch.Tensor,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        past_key_values: list[torch.Tensor],
        use_cache_branch: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        pasts = [past_key_values[start : start + 4] for start in range(0, len(past_key_values), 4)]
        sources = self._sources(encoder_attention_mask, encoder_hidden_states, pasts, use_cache_branch)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for step, (past, source) in enumerate(zip(pasts, sources, strict=True)):
            cache.self_attention_cache.update(*past[:2], step)
            cache.cross_attention_cache.update(*source, step)
            cache.is_updated[step] = True

        past_length, length = pasts[0][0].shape[2], input_ids.shape[1]
        positions = torch.arange(length) + past_length
        seen = torch.arange(past_length + length) <= positions.view(1, 1, -1, 1)
        hidden_states = self.model.model.decoder(
            input_ids,
            attention_mask=additive_mask(seen),
            encoder_hidden_states=encoder_hidden_states,  # of the right length; its keys are cached
            encoder_attention_mask=source_mask(encoder_attention_mask),
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state
        logits = self.model.lm_head(hidden_states) + self.model.final_logits_bias
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return logits, *(states for pair in layers for layer in pair for states in (layer.keys, layer.values))

    def _sources(
        self,
        encoder_attention_mask: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pasts: list[list[torch.Tensor]],
        use_cache_branch: torch.Tensor,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each step the keys and values of the source: at the first call computed, then those of the cache."""
        decoder = self.model.model.decoder
        steps = decoder.steps("decoder", None)
        if decoder.step_projections is None:
            first = [decoder.layer_map.index(layer) for layer in decoder.layer_map]
        else:
            first = list(range(len(steps)))
        distinct = sorted(set(first))

        def compute(hidden_states: torch.Tensor, *cached: torch.Tensor) -> tuple[torch.Tensor, ...]:
            shape = (*hidden_states.shape[:2], self.model.config.decoder_attention_heads, -1)
            return tuple(
                own.of("encoder_attn")
                .project(layer.encoder_attn, name, hidden_states)
                .view(shape)
                .transpose(1, 2)
                # The result of a branch has to be a tensor of its own, of the same strides as the other's.
                .contiguous()
                for layer, own in (steps[step] for step in distinct)
                for name in ("k_proj", "v_proj")
            )

        def take(hidden_states: torch.Tensor, *cached: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(states.clone() for states in cached)

        cached = [states for step in distinct for states in pasts[step][2:]]
        found = torch.cond(use_cache_branch, take, compute, (encoder_hidden_states, *cached))
        for states in found:
            torch._check(states.shape[0] == encoder_attention_mask.shape[0])
            torch._check(states.shape[2] == encoder_attention_mask.shape[1])
        pairs = {step: found[2 * place : 2 * place + 2] for place, step in enumerate(distinct)}
        return [pairs[step] for step in first]


def convert(model: str, output_dir: str | Path, quantization: str = "float32", revision: str = "main") -> None:
    """Write the graphs of an RSMarian or Marian checkpoint into `onnx`, and a stock Marian's configuration beside.

    Args:
        model: on the Hub or in a folder.
        output_dir: written to; the tokenizer too.
        quantization: `"float32"`; `"float16"`; or `"int8"`, ONNX Runtime's dynamic quantisation. Inputs and outputs
            are float32.
        revision: branch, tag or commit of the model.

    Raises:
        ValueError: as `load_parent`.
    """
    folder = Path(output_dir)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = load_parent(model, revision, dtype=torch.float32, attn_implementation="eager")
    if not isinstance(loaded, RSMarianForConditionalGeneration):
        # A Marian is an RSMarian that stores every layer.
        sides = {f"{side}_unique_layers": getattr(loaded.config, f"{side}_layers") for side in ("encoder", "decoder")}
        loaded = collapse(loaded, method="first", **sides)
        loaded.set_attn_implementation("eager")
    loaded.eval()
    for name, export in zip(GRAPHS, (_export_encoder, _export_decoder), strict=True):
        _write(export(loaded), folder / "onnx" / f"{name}{SUFFIXES[quantization]}.onnx", quantization)
    config = stock_config(loaded.config)
    config.architectures = [MarianMTModel.__name__]
    config.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_tokenizer_json(tokenizer, folder)


def _add_tokenizer_json(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer.json` beside the SentencePiece models, and the class that reads it into the configuration.

    `MarianTokenizer.from_pretrained` reads the folder as before. A tokenizer that the format cannot copy is left as it
    is, with a warning.
    """
    config = folder / "tokenizer_config.json"
    own = json.loads(config.read_text("utf-8"))
    try:
        write_tokenizer_json(tokenizer, folder)
    except ValueError as error:
        warnings.warn(f"there will be no tokenizer.json, which transformers.js needs: {error}", stacklevel=3)
    else:
        write_json(own | json.loads(config.read_text("utf-8")), config)


def _export_encoder(model: RSMarianForConditionalGeneration) -> ir.Model:
    input_ids, attention_mask = _example_source()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    axes = {name: {0: BATCH, 1: SOURCE} for name in inputs}
    return _export(EncoderGraph(model), inputs, axes, list(inputs), ["last_hidden_state"])


def _export_decoder(model: RSMarianForConditionalGeneration) -> ir.Model:
    config = model.config
    input_ids, attention_mask = _example_source()
    batch, source = input_ids.shape
    heads, past = config.decoder_attention_heads, 5
    names = cache_names(config.decoder_layers)
    lengths = [past if "decoder" in name else source for name in names]
    inputs = {
        "encoder_attention_mask": attention_mask,
        "input_ids": input_ids[:, :2],
        "encoder_hidden_states": torch.randn(batch, source, config.d_model),
        "past_key_values": [torch.randn(batch, heads, length, config.d_model // heads) for length in lengths],
        "use_cache_branch": torch.tensor([True]),
    }
    # At the first call the cache's source is empty, and the mask's is not.
    past_axes = ["past_decoder_sequence_length" if "decoder" in name else f"{SOURCE}_out" for name in names]
    axes = {
        "encoder_attention_mask": {0: BATCH, 1: SOURCE},
        "input_ids": {0: BATCH, 1: "decoder_sequence_length"},
        "encoder_hidden_states": {0: BATCH, 1: SOURCE},
        "past_key_values": [{0: BATCH, 2: axis} for axis in past_axes],
        "use_cache_branch": None,
    }
    input_names = [*list(inputs)[:3], *(f"past_key_values.{name}" for name in names), "use_cache_branch"]
    output_names = ["logits", *(f"present.{name}" for name in names)]
    return _export(DecoderGraph(model), inputs, axes, input_names, output_names)


def _example_source() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask that show each axis at a length of its own, and padding."""
    input_ids = torch.ones(3, 7, dtype=torch.long)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 4:] = 0
    return input_ids, attention_mask


def _export(
    graph: nn.Module, inputs: dict[str, Any], axes: dict[str, Any], input_names: list[str], output_names: list[str]
) -> ir.Model:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*axis name", category=UserWarning)  # one name for equal axes
        program = torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    return program.model


def _write(model: ir.Model, file: Path, quantization: str) -> None:
    """Save a graph with each weight once."""
    # The output projection is often the embedding, transposed.
    tied = [node for node in model.graph if node.op_type == "Transpose" and _has_other_use(node.inputs[0])]
    pairs = [(node.inputs[0].name, node.outputs[0].name) for node in tied]
    # The transposes of the weights are done here: a weight behind one would not be quantised. Then a shared layer may
    # stand there once for each step, and the metadata hold paths of this machine.
    fold_constants(
        model,
        input_size_limit=LARGEST_CONSTANT,
        output_size_limit=LARGEST_CONSTANT,
        should_fold=lambda node: False if node in tied and quantization != "int8" else None,
    )
    for clean in (
        RemoveUnusedNodesPass(),
        DeduplicateInitializersPass(LARGEST_CONSTANT),
        ClearMetadataAndDocStringPass(),
    ):
        clean(model)
    if quantization == "float32":
        ir.save(model, file)
        return
    proto = ir.to_proto(model)
    if quantization == "float16":
        onnx.save(convert_float_to_float16(proto, keep_io_types=True), file)
        return
    quantize_dynamic(proto, file, weight_type=QuantType.QInt8, extra_options={"EnableSubgraph": True})
    proto = onnx.load(file)
    for weight, transposed in pairs:
        _store_once(proto.graph, weight, transposed)
    onnx.save(proto, file)


def _has_other_use(value: ir.Value) -> bool:
    """Whether a weight is used otherwise than transposed."""
    return value.is_initializer() and any(node.op_type != "Transpose" for node, _ in value.uses())


def _store_once(graph: onnx.GraphProto, weight: str, transposed: str) -> None:
    """Have the quantised weight transposed when a session starts, instead of stored in both forms."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for part in ("quantized", "scale", "zero_point"):
        array = onnx.numpy_helper.to_array(tensors[f"{transposed}_{part}"])
        tensors[f"{weight}_{part}"].CopyFrom(onnx.numpy_helper.from_array(array.T, f"{weight}_{part}"))
    graph.initializer.remove(tensors[f"{transposed}_quantized"])
    names = ([f"{weight}_quantized"], [f"{transposed}_quantized"])
    graph.node.insert(0, onnx.helper.make_node("Transpose", *names, perm=[1, 0]))


class OnnxForSeq2SeqLM(PreTrainedModel, GenerationMixin):
    """Exported graphs as a model that `generate` decodes with, greedily or with a beam; on the CPU.

    Args:
        folder: written by `convert`.
        quantization: of the files; default: the first of `QUANTIZATIONS` that is there.

    Raises:
        ValueError: there are no such files.
    """

    main_input_name = "input_ids"
    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, folder: str | Path, quantization: str | None = None):
        super().__init__(AutoConfig.from_pretrained(folder))
        self.generation_config = GenerationConfig.from_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        encoder, self.decoder_session = (
            onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
            for file in graph_files(folder, quantization)
        )
        self.encoder = _OnnxEncoder(encoder)
        names = cache_names(self.config.decoder_layers)
        self.past_names = [f"past_key_values.{name}" for name in names]
        self.present_names = [f"present.{name}" for name in names]

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
        """Logits after each token, (batch, length, vocabulary)."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones(encoder_outputs[0].shape[:2], dtype=torch.long)
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        sides = (cache.self_attention_cache, cache.cross_attention_cache)
        cached = cache.get_seq_length() > 0
        if cached:
            layers = [side.layers[step] for step in range(self.config.decoder_layers) for side in sides]
            pasts = [states for layer in layers for states in (layer.keys, layer.values)]
        else:
            heads = self.config.decoder_attention_heads
            pasts = [torch.zeros(len(decoder_input_ids), heads, 0, self.config.d_model // heads)] * len(
                self.past_names
            )
        inputs = {
            "encoder_attention_mask": attention_mask,
            "input_ids": decoder_input_ids,
            "encoder_hidden_states": encoder_outputs[0],
            "use_cache_branch": torch.tensor([cached]),
            **dict(zip(self.past_names, pasts, strict=True)),
        }
        # The source's keys and values stay what they are.
        new = [name for name in self.present_names if not cached or "decoder" in name]
        logits, *presents = _run(self.decoder_session, inputs, ["logits", *new])
        for name, keys, values in zip(new[::2], presents[::2], presents[1::2], strict=True):
            _, step, side, _ = name.split(".")
            layers = sides["encoder" in side]
            if cached:
                layers.layers[int(step)].keys, layers.layers[int(step)].values = keys, values
            else:
                layers.update(keys, values, int(step))
        return Seq2SeqLMOutput(logits=logits, **{CACHE: cache})


class _OnnxEncoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, session: onnxruntime.InferenceSession):
        super().__init__()
        self.session = session

    @strict_forward
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        (states,) = _run(self.session, inputs, ["last_hidden_state"])
        return BaseModelOutput(last_hidden_state=states)


def _run(
    session: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor], output_names: list[str]
) -> list[torch.Tensor]:
    outputs = session.run(output_names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(output) for output in outputs]


def graph_files(folder: str | Path, quantization: str | None = None) -> list[Path]:
    """The files of encoder and decoder in a folder that `convert` has written.

    Args:
        folder: the exported folder.
        quantization: one of `QUANTIZATIONS`; default: the first of them that is there.

    Raises:
        ValueError: there are no such files.
    """
    suffixes = list(SUFFIXES.values()) if quantization is None else [SUFFIXES[quantization]]
    for suffix in suffixes:
        files = [Path(folder, "onnx", f"{name}{suffix}.onnx") for name in GRAPHS]
        if all(file.is_file() for file in files):
            return files
    names = " and ".join(f"onnx/{name}{suffixes[0]}.onnx" for name in GRAPHS)
    raise ValueError(f"{folder} has no {names}{', nor quantised ones' if quantization is None else ''}")


def load(folder: str | Path, tokenizer: PreTrainedTokenizerBase, decoding: DecodingArguments) -> TransformersEngine:
    """The written graphs, decoded with by `generate`."""
    return TransformersEngine(OnnxForSeq2SeqLM(folder).eval(), tokenizer, decoding)
