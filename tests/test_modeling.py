"""RSMarian equals, to rounding, a stock Marian whose layers are copies of the shared ones; and is stored once."""

import copy
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from forked import fork
from oracle import (
    PAD,
    VOCABULARY,
    adapter_matrix,
    batch,
    names_by_step,
    rs_config,
    rs_model,
    unrolled_marian,
    with_own_weights,
)
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    MarianConfig,
    MarianMTModel,
    StaticCache,
)

from rs_transformer import RSMarianConfig, RSMarianForConditionalGeneration
from rs_transformer.training.fsdp import shared_weights_in_one_group
from rs_transformer.versions_rs_marian import CACHE

MODELS = {
    "depth6-unique1": {},
    "depth6-unique2-cycle": {"encoder_unique_layers": 2, "decoder_unique_layers": 2},
    "depth6-unique2-cycle_rev": {"encoder_unique_layers": 2, "decoder_unique_layers": 2, "layer_sharing": "cycle_rev"},
    "depth6-unique3-sequence": {"encoder_unique_layers": 3, "decoder_unique_layers": 3, "layer_sharing": "sequence"},
    "depth6-unique3-sandwich": {"encoder_unique_layers": 3, "decoder_unique_layers": 3, "layer_sharing": "sandwich"},
    "depth6-unique3-cycle_rev-sandwich": {
        "encoder_unique_layers": 3,
        "encoder_layer_sharing": "cycle_rev",
        "decoder_layers": 5,
        "decoder_unique_layers": 4,
        "decoder_layer_sharing": "sandwich",
    },
    "step-embeddings": {"step_embeddings": True},
    "step-layer-norms": {"step_layer_norms": True, "encoder_unique_layers": 2, "decoder_layers": 3},
    "both-of-steps": {"step_layer_norms": True, "step_embeddings": True, "decoder_unique_layers": 2},
    "step-biases": {"step_biases": True, "encoder_unique_layers": 2, "decoder_layers": 3},
    "step-adapters": {"step_adapter_rank": 3, "decoder_unique_layers": 2, "decoder_layers": 4},
    "all-of-steps": {
        "step_biases": True,
        "step_adapter_rank": 2,
        "step_layer_norms": True,
        "step_embeddings": True,
    },
    "tied-sides": {"tie_encoder_decoder_layers": True, "encoder_unique_layers": 2, "decoder_unique_layers": 2},
    "tied-sides-untied-output": {
        "tie_encoder_decoder_layers": True,
        "tie_word_embeddings": False,
        "step_biases": True,
        "step_adapter_rank": 2,
    },
    "encoder4-decoder2": {"encoder_layers": 4, "decoder_layers": 2},
    "vanilla": {"encoder_unique_layers": 6, "decoder_unique_layers": 6},
    "separate-vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 48},
    "untied-output": {"tie_word_embeddings": False},
    "relu": {"activation_function": "relu", "scale_embedding": False},
    "marian-positions": {"marian_positions": True},
}
every_model = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
few_models = pytest.mark.parametrize(
    "overrides",
    [MODELS[name] for name in ("depth6-unique1", "depth6-unique2-cycle_rev", "all-of-steps")],
    ids=["unique1", "unique2-cycle_rev", "all-of-steps"],
)


def summed_gradients(marian: MarianMTModel, model: RSMarianForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The gradients of the unrolled Marian, those of the copies of a layer added up under the layer's name."""
    gradients = {name: p.grad for name, p in marian.named_parameters() if p.grad is not None}
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        owner, _, part = name.rpartition(".")
        copies = names_by_step(f"{owner}.up" if part == "down" else name, model.config) or [name]
        for tied, tie in model.all_tied_weights_keys.items():
            copies += names_by_step(tied, model.config) if tie == name else []
        if copies[0] in gradients:
            sums[name] = sum(gradients[copy] for copy in copies)
            if part in ("down", "up"):  # by the chain rule of the matrix that the two make
                (sums[name],) = torch.autograd.grad(adapter_matrix(model, name), parameter, sums[name])
    return sums


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@every_model
def test_logits_loss_and_gradients_equal_unrolled_marian(overrides, attention):
    model = rs_model(**overrides)
    marian = unrolled_marian(model)
    model.set_attn_implementation(attention)
    marian.set_attn_implementation(attention)
    inputs = batch()
    outputs, expected = model(**inputs), marian(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=1e-5)
    outputs.loss.backward()
    expected.loss.backward()
    gradients = summed_gradients(marian, model)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained.keys() == gradients.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_vanilla_equals_marian_bit_for_bit_and_shares_its_checkpoint(tmp_path):
    model = rs_model(encoder_unique_layers=6, decoder_unique_layers=6)
    marian = unrolled_marian(model)
    inputs = batch()
    assert torch.equal(model(**inputs).logits, marian(**inputs).logits)
    marian.save_pretrained(tmp_path)
    loaded = RSMarianForConditionalGeneration.from_pretrained(tmp_path, config=model.config).eval()
    assert torch.equal(loaded(**inputs).logits, marian(**inputs).logits)


GENERATION = {
    "greedy": {},
    "greedy-without-cache": {"use_cache": False},
    "greedy-static-cache": {"cache_implementation": "static"},
    "beam4": {"num_beams": 4},
    "beam4-without-cache": {"num_beams": 4, "use_cache": False},
    "beam4-static-cache": {"num_beams": 4, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 1.3},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kwargs", GENERATION.values(), ids=GENERATION.keys())
@few_models
def test_generation_equals_unrolled_marian(overrides, kwargs, attention):
    model = rs_model(**overrides)
    marian = unrolled_marian(model)
    inputs = batch()
    del inputs["labels"]
    sequences = []
    for translator in (model, marian):
        translator.set_attn_implementation(attention)
        torch.manual_seed(7)
        # A random model says one word over and over, which hides mistakes; it must not.
        bounds = {"min_new_tokens": 12, "max_new_tokens": 20, "no_repeat_ngram_size": 1}
        sequences.append(translator.generate(**inputs, **kwargs, **bounds))
    assert torch.equal(*sequences)
    assert len(set(sequences[0].flatten().tolist())) > 12


def test_assisted_generation_equals_unrolled_marian_and_greedy():
    model, assistant = rs_model(), rs_model(decoder_layers=2)
    inputs = {name: tensor[:1] for name, tensor in batch().items() if name != "labels"}
    sequences = [
        translator.generate(**inputs, assistant_model=helper, min_new_tokens=12, max_new_tokens=20)
        for translator, helper in ((model, assistant), (unrolled_marian(model), unrolled_marian(assistant)))
    ]
    assert torch.equal(*sequences)
    assert torch.equal(sequences[0], model.generate(**inputs, min_new_tokens=12, max_new_tokens=20))


def test_padding_does_not_change_a_translation():
    model = rs_model()
    inputs = batch()
    padded = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=12)
    alone = model.generate(inputs["input_ids"][1:2, :5], max_new_tokens=12)
    assert torch.equal(padded[1, : alone.shape[1]], alone[0])


def test_eight_threads_generate_at_once_what_one_generates_alone():
    model = rs_model()
    model.set_attn_implementation("eager")
    requests = [batch(seed)["input_ids"] for seed in range(16)]

    def generate(input_ids):
        return model.generate(input_ids, num_beams=2, max_new_tokens=16)

    alone = [generate(request) for request in requests]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(generate, requests))
    assert all(map(torch.equal, alone, together))


def test_training_forward_with_a_cache_equals_one_without():
    # Layers that are shared but write one slot of the cache spoil even teacher forcing.
    model, inputs = rs_model(), batch()
    labels = inputs.pop("labels")
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    torch.testing.assert_close(model(**inputs, use_cache=True).logits, model(**inputs, use_cache=False).logits)


@every_model
def test_attentions_and_hidden_states_have_one_entry_per_step_as_unrolled_marian_has(overrides):
    model = rs_model(**overrides)
    marian = unrolled_marian(model)
    model.set_attn_implementation("eager")
    marian.set_attn_implementation("eager")
    keys = ["encoder_attentions", "decoder_attentions", "cross_attentions"]
    keys += ["encoder_hidden_states", "decoder_hidden_states"]
    outputs, expected = (m(**batch(), output_attentions=True, output_hidden_states=True) for m in (model, marian))
    assert len(outputs.cross_attentions) == model.config.decoder_layers
    assert len(outputs.encoder_hidden_states) == model.config.encoder_layers + 1
    for key in keys:
        torch.testing.assert_close(outputs[key], expected[key], atol=1e-5, rtol=1e-5)


def test_return_dict_false_gives_marians_tuple():
    model = rs_model()
    marian = unrolled_marian(model)
    outputs, expected = (m(**batch(), return_dict=False) for m in (model, marian))
    assert len(outputs) == len(expected)
    for ours, theirs in zip(outputs[:2], expected[:2], strict=True):  # loss and logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_accumulated_gradient_equals_that_of_the_large_batch():
    model = rs_model()
    inputs = batch()
    model(**inputs).loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    model.zero_grad()
    tokens = (inputs["labels"] != -100).sum()
    for row in range(3):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        model(**part, num_items_in_batch=tokens).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("overrides", "depths"),
    [
        ({"encoder_unique_layers": 2, "decoder_unique_layers": 2}, {}),
        ({**MODELS["both-of-steps"], "deepnorm": True}, {"encoder_depth": 3, "decoder_depth": 5}),
    ],
    ids=["unique2", "deepnorm-both-of-steps-at-less-depth"],
)
def test_gradient_checkpointing_changes_no_gradient(overrides, depths, use_reentrant):
    model = rs_model(**overrides).train()
    model(**batch(), **depths).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**batch(), **depths).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-6, rtol=1e-5)


def test_layerdrop_skips_steps_in_training_alone():
    model = rs_model(encoder_layerdrop=1.0, decoder_layerdrop=1.0, output_hidden_states=False)
    evaluated = model(**batch()).logits
    dropped = model.train()(**batch()).logits
    assert not torch.allclose(evaluated, dropped)
    torch.testing.assert_close(model.eval()(**batch()).logits, evaluated)


def test_layerdrop_skips_no_step_where_a_cache_would_be_left_short():
    model, inputs = rs_model(decoder_layerdrop=1.0), batch()
    labels = inputs.pop("labels")
    expected = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(model.train().generate(**inputs, max_new_tokens=8), expected)
    dropped = model(**inputs, labels=labels).logits
    ids = model.prepare_decoder_input_ids_from_labels(labels)
    for use_cache in (None, True, False):
        output = model(**inputs, decoder_input_ids=ids, use_cache=use_cache)
        assert torch.equal(output.logits, dropped)
        assert getattr(output, CACHE) is None


# A graph has every step written out, and the compiler takes its time for each.
FEW_STEPS = {"encoder_layers": 2, "decoder_layers": 3}


def test_forward_compiles_to_one_graph():
    model = rs_model(**MODELS["both-of-steps"] | FEW_STEPS)
    inputs = batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@few_models
def test_decoding_with_a_static_cache_compiles_to_one_graph(overrides):
    model = rs_model(**overrides | FEW_STEPS)
    data = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**data, max_new_tokens=12)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(model.generate(**data, max_new_tokens=12, cache_implementation="static"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_single_precision(dtype):
    model = rs_model(init_std=0.05)
    expected = model(**batch()).logits
    logits = model.to(dtype)(**batch()).logits
    assert logits.dtype == dtype
    kept = torch.arange(expected.shape[-1]) != PAD
    torch.testing.assert_close(logits[..., kept].float(), expected[..., kept], atol=0.05, rtol=0.05)


def test_shallower_decoder_equals_the_first_steps(tmp_path):
    model = rs_model()
    model.save_pretrained(tmp_path)
    shallow = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, decoder_layers=2).eval()
    states = model(**batch(), output_hidden_states=True).decoder_hidden_states
    torch.testing.assert_close(shallow(**batch(), output_hidden_states=True).decoder_hidden_states[-1], states[2])


AT_LESS_DEPTH = {
    "unique1": {},
    "sequence-sandwich": MODELS["depth6-unique3-cycle_rev-sandwich"] | {"decoder_unique_layers": 2},
    "deepnorm-both-of-steps": {**MODELS["both-of-steps"], "deepnorm": True},
}


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("overrides", AT_LESS_DEPTH.values(), ids=AT_LESS_DEPTH.keys())
def test_depth_of_a_call_equals_that_of_loading(tmp_path, overrides, kwargs):
    model = rs_model(**overrides)
    model.save_pretrained(tmp_path)
    shallow = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, encoder_layers=4, decoder_layers=3).eval()
    depths = {"encoder_depth": 4, "decoder_depth": 3}
    inputs = batch()
    assert torch.equal(model(**inputs, **depths).logits, shallow(**inputs).logits)
    del inputs["labels"]
    bounds = {"min_new_tokens": 12, "max_new_tokens": 20, "no_repeat_ngram_size": 1}
    translations = [m.generate(**inputs, **kwargs, **bounds, **d) for m, d in ((model, depths), (shallow, {}))]
    assert torch.equal(*translations)
    assert not torch.equal(translations[0], model.generate(**inputs, **kwargs, **bounds))


def test_impossible_depths_of_a_call_are_named():
    model = rs_model(decoder_unique_layers=2)
    limits = r"decoder_depth must lie in decoder_unique_layers \(2\)..decoder_layers \(6\), got"
    with pytest.raises(ValueError, match=f"{limits} 7; for more, load the model with more decoder_layers"):
        model(**batch(), decoder_depth=7)
    with pytest.raises(ValueError, match=f"{limits} 1"):
        model.generate(batch()["input_ids"], decoder_depth=1)
    with pytest.raises(ValueError, match=r"encoder_depth must lie in encoder_unique_layers \(1\)..*, got 0"):
        model(**batch(), encoder_depth=0)
    for depth in (2.0, "2", True):
        with pytest.raises(ValueError, match=f"decoder_depth must be an integer, got {depth!r}"):
            model(**batch(), decoder_depth=depth)


def static_cache(config):
    source_length = batch()["input_ids"].shape[1]
    return EncoderDecoderCache(*(StaticCache(config=config, max_cache_len=size) for size in (16, source_length)))


@pytest.mark.parametrize("sharing", ["cycle", "sequence"])
@pytest.mark.parametrize("make_cache", [lambda config: None, static_cache], ids=["dynamic", "static"])
@pytest.mark.parametrize(("filled", "used"), [(3, 6), (6, 3)])
def test_a_cache_is_not_used_at_another_depth_than_it_was_filled_at(filled, used, make_cache, sharing):
    model = rs_model(decoder_unique_layers=2, layer_sharing=sharing)
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    call = {**inputs, "decoder_input_ids": torch.full((3, 1), PAD), "use_cache": True}
    with torch.no_grad():
        cache = model(**call, **{CACHE: make_cache(model.config)}, decoder_depth=filled)[CACHE]
        model(**call, **{CACHE: cache}, decoder_depth=filled)
        message = rf"filled at another depth than this call's \({used}\): give the same decoder_depth"
        with pytest.raises(ValueError, match=message):
            model(**call, **{CACHE: cache}, decoder_depth=used)
        fresh = {CACHE: make_cache(model.config)}
        for _ in range(2):
            fresh = {CACHE: model(**call, **fresh, decoder_depth=used)[CACHE]}


@pytest.mark.parametrize("make_cache", [static_cache, lambda config: DynamicCache(config=config)])
def test_a_cache_of_a_model_of_less_depth_is_named(make_cache):
    model, shallow = rs_model(), rs_model(decoder_layers=3)
    call = {"input_ids": batch()["input_ids"], "decoder_input_ids": torch.full((3, 1), PAD), "use_cache": True}
    with pytest.raises(ValueError, match=r"the cache has 3 layers, which is less depth than this call's \(6\)"):
        model(**call, **{CACHE: make_cache(shallow.config)})
    assert model(**call, **{CACHE: make_cache(model.config)}).logits.isfinite().all()


@pytest.mark.parametrize("draft", [rs_model(decoder_layers=2), unrolled_marian(rs_model(decoder_layers=2))])
def test_draft_of_assisted_generation_keeps_its_own_depth(draft):
    model = rs_model()
    inputs = {name: tensor[:1] for name, tensor in batch().items() if name != "labels"}
    bounds = {"decoder_depth": 4, "encoder_depth": 5, "min_new_tokens": 12, "max_new_tokens": 20}
    assert torch.equal(model.generate(**inputs, **bounds, assistant_model=draft), model.generate(**inputs, **bounds))


def test_accelerate_offloads_steps_of_their_own():
    model = rs_model(**MODELS["both-of-steps"])
    with torch.no_grad():
        expected = model(**batch()).logits
        offloaded = cpu_offload(model, execution_device="cpu")
        assert offloaded.model.encoder.step_embeddings[0].weight.device.type == "meta"
        torch.testing.assert_close(offloaded(**batch()).logits, expected)


@pytest.mark.parametrize("name", ["depth6-unique2-cycle", "all-of-steps", "step-embeddings"])
def test_a_device_map_has_what_a_step_applies_on_one_device(name):
    model = rs_model(**MODELS[name])
    total, own = compute_module_sizes(model)[""], "step_norms|step_embeddings|step_projections"
    parameters = [name for name, _ in model.named_parameters()]

    def cut_steps(no_split):
        cut = []
        for tenths in range(1, 10):
            memory = {0: tenths * total // 10, 1: 2 * total}
            devices = infer_auto_device_map(model, memory, no_split_module_classes=no_split)
            for side in ("encoder", "decoder"):
                for step, layer in enumerate(getattr(model.config, f"{side}_layer_map")):
                    applied = re.compile(rf"model\.{side}\.(layers\.{layer}|({own})\.{step})\.")
                    found = {
                        device
                        for parameter in filter(applied.match, parameters)
                        for module, device in devices.items()
                        if parameter.startswith(f"{module}.") or parameter == module
                    }
                    cut += [step] if len(found) > 1 else []
        return cut

    assert cut_steps(None)
    assert not cut_steps(list(model._no_split_modules))


def test_fsdp_makes_no_groups_of_stacks_whose_embeddings_are_one():
    for overrides in ({}, {"step_biases": True}):
        for names, expected in (
            (None, "by class"),
            (["RSMarianDecoderLayer"], "by class"),
            (["RSMarianDecoder"], None),
        ):
            plugin = SimpleNamespace(auto_wrap_policy="by class", transformer_cls_names_to_wrap=names)
            with shared_weights_in_one_group(rs_model(**overrides), plugin):
                assert plugin.auto_wrap_policy == expected
            assert plugin.auto_wrap_policy == "by class"


# What is stored


def test_checkpoint_holds_each_tensor_once(tmp_path):
    model = rs_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    layers = {match.group() for name in tensors if (match := re.search(r"(encoder|decoder)\.layers\.\d+", name))}
    assert layers == {"encoder.layers.0", "decoder.layers.0"}
    assert sum("embed" in name or "shared" in name or "lm_head" in name for name in tensors) == 1
    stored = sum(tensor.numel() for tensor in tensors.values())
    assert stored == model.num_parameters(only_trainable=True) + model.final_logits_bias.numel()


def test_file_of_a_model_of_opus_mt_size_is_under_half_of_marians(tmp_path):
    size = {"vocab_size": 8000, "pad_token_id": 7999, "decoder_start_token_id": 7999}
    config = RSMarianConfig(**size)
    RSMarianForConditionalGeneration(config).save_pretrained(tmp_path / "rs")
    layers = {"encoder_layers": 6, "decoder_layers": 6, "d_model": 512, "encoder_ffn_dim": 2048}
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    marian = MarianMTModel(MarianConfig(**size, **layers, **heads, decoder_ffn_dim=2048, max_position_embeddings=512))
    marian.save_pretrained(tmp_path / "marian")
    rs, stock = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("rs", "marian"))
    assert rs < 0.5 * stock


@pytest.mark.parametrize(
    "overrides",
    [
        {"layer_sharing": "sandwich", "encoder_unique_layers": 3, "share_encoder_decoder_embeddings": False},
        MODELS["depth6-unique3-cycle_rev-sandwich"],
        MODELS["both-of-steps"] | {"deepnorm": True},
        MODELS["marian-positions"],
    ],
)
def test_saved_and_loaded_model_is_the_same(tmp_path, overrides):
    model = rs_model(**overrides)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is RSMarianForConditionalGeneration
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_marian_positions_are_sines_and_cosines_down_to_the_ten_thousandth():
    model = rs_model(marian_positions=True)
    # As `inits::sinusoidalPositionEmbeddings` of Marian's source.
    frequencies = [10000 ** (-wave / 15) for wave in range(16)]
    expected = torch.tensor(
        [[function(position * f) for function in (math.sin, math.cos) for f in frequencies] for position in range(64)]
    )
    for stack in (model.model.encoder, model.model.decoder):
        torch.testing.assert_close(stack.embed_positions.weight, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overrides", [{}, MODELS["marian-positions"]], ids=["stock-positions", "marian-positions"])
def test_loaded_model_trains_what_the_saved_one_did(tmp_path, overrides):
    model = rs_model(**overrides)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    # Of stock Marian the sinusoidal positions come back trainable.
    assert not loaded.model.encoder.embed_positions.weight.requires_grad
    assert loaded.num_parameters(only_trainable=True) == model.num_parameters(only_trainable=True)


def test_optimiser_sees_each_parameter_once():
    names = [name for name, _ in rs_model().named_parameters()]
    parameters = list(rs_model().parameters())
    assert len(names) == len(parameters) == len({id(p) for p in parameters})
    assert sum("decoder.layers" in name for name in names) == 26


def test_steps_are_told_apart_by_few_parameters():
    plain = rs_model().num_parameters(only_trainable=True)
    width, depth = 32, 6
    biases, ends = 12 * width + 2 * 64 + 2 * width, 12 * 2 * width + 4 * (width + 64)  # of 12 + 4 projections
    added = {
        "step_embeddings": (True, 2 * (depth - 1) * width),
        "step_layer_norms": (
            True,
            (2 + 3) * 2 * width * (depth - 1),
        ),  # two norms in the encoder, three in the decoder
        "step_biases": (True, biases * (depth - 1)),
        "step_adapter_rank": (3, 3 * ends * depth),
    }
    for option, (value, number) in added.items():
        assert rs_model(**{option: value}).num_parameters(only_trainable=True) == plain + number


def test_what_loading_leaves_out_is_said_but_for_the_steps_of_more_depth(tmp_path):
    own = {"step_embeddings": True, "step_layer_norms": True, "step_biases": True, "step_adapter_rank": 2}
    rs_model(**own).save_pretrained(tmp_path)
    for options, left_out in (({"decoder_layers": 3}, 0), ({"step_embeddings": False}, 2 * 5)):
        _, info = RSMarianForConditionalGeneration.from_pretrained(tmp_path, **options, output_loading_info=True)
        assert len(info["unexpected_keys"]) == left_out
        assert not info["missing_keys"]


def test_new_step_embeddings_and_adapters_change_nothing_and_can_learn(tmp_path):
    model = rs_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, step_embeddings=True, step_adapter_rank=2).eval()
    assert len(loaded.model.decoder.step_embeddings) == 5
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    loaded(**batch()).loss.backward()
    assert all(p.grad.any() for name, p in loaded.named_parameters() if name.endswith(".up"))


# The padding token, with which Marian starts


def test_start_embedding_stays_zero_in_training_and_padding_is_never_generated():
    model = rs_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    for seed in range(5):
        model(**batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.count_nonzero(model.model.shared.weight[PAD]) == 0
    inputs = batch()["input_ids"]
    for kwargs in ({"do_sample": True, "temperature": 5.0}, {"num_beams": 4}):
        output = model.eval().generate(inputs, max_new_tokens=30, min_new_tokens=30, **kwargs)
        assert (output[:, 1:] != PAD).all()


@pytest.mark.parametrize("num_items_in_batch", [None, 20])
def test_padding_among_the_labels_is_no_target(num_items_in_batch):
    """`tokenizer(…, text_target=…, padding=True)`, Marian's documented call, pads the labels by the padding token."""
    model = rs_model()
    inputs = batch()
    expected = model(**inputs, num_items_in_batch=num_items_in_batch).loss
    padded = {**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, PAD)}
    loss = model(**padded, num_items_in_batch=num_items_in_batch).loss
    assert loss == expected
    loss.backward()
    assert torch.count_nonzero(model.model.shared.weight.grad[PAD]) == 0


def test_separate_vocabularies_keep_both_start_embeddings_zero():
    model = rs_model(share_encoder_decoder_embeddings=False, decoder_vocab_size=48).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(**batch()).loss.backward()
    optimizer.step()
    for side in (model.model.encoder, model.model.decoder):
        assert torch.count_nonzero(side.embed_tokens.weight[PAD]) == 0


# The ecosystem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resized_vocabulary_translates_as_before(dtype):
    model = rs_model().to(dtype)
    expected = model.generate(batch()["input_ids"], max_new_tokens=10)
    model.resize_token_embeddings(60, mean_resizing=False)
    assert model.get_output_embeddings().weight.shape[0] == model.final_logits_bias.shape[1] == 60
    model.lm_head.weight.data[48:] = 0
    model.final_logits_bias[:, 48:] = -1e4
    assert torch.equal(model.generate(batch()["input_ids"], max_new_tokens=10), expected)
    assert {each.dtype for each in model.state_dict().values()} == {model(**batch()).logits.dtype} == {dtype}


def test_a_stock_checkpoint_keeps_its_layers(tmp_path):
    stock = unrolled_marian(rs_model(encoder_layers=2, decoder_layers=3))
    stock.save_pretrained(tmp_path)
    loaded = RSMarianForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.config.encoder_unique_layers, loaded.config.decoder_unique_layers) == (2, 3)
    torch.testing.assert_close(loaded(**batch()).logits, stock(**batch()).logits)
    fields = MarianConfig(encoder_layers=4, decoder_layers=4).to_dict()
    assert RSMarianConfig(**fields, encoder_unique_layers=2).encoder_unique_layers == 2
    assert RSMarianConfig.from_pretrained(tmp_path, decoder_unique_layers=1).decoder_unique_layers == 1


def test_the_bare_model_loads_without_a_word_of_missing_weights(tmp_path):
    rs_model().save_pretrained(tmp_path)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def test_special_tokens_outside_the_vocabulary_are_named():
    for name in ("pad_token_id", "decoder_start_token_id"):
        with pytest.raises(ValueError, match=rf"{name} must lie in 0..47, the vocabulary, got 58100"):
            rs_model(**{name: 58100})


EMBEDDINGS = {
    "one": {},
    "two": {"share_encoder_decoder_embeddings": False},
    "shared-and-said-to-be-untied": {"tie_word_embeddings": False},
    "two-and-said-to-be-untied": {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("overrides", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_an_output_projection_of_its_own_is_kept_when_tied_again_saved_and_resized(tmp_path, overrides):
    model = with_own_weights(rs_model(**overrides))
    expected = model(**batch()).logits
    model.tie_weights()
    assert torch.equal(model(**batch()).logits, expected)
    model.resize_token_embeddings(50, pad_to_multiple_of=64, mean_resizing=False)
    if not model.config.share_encoder_decoder_embeddings:
        model.resize_decoder_token_embeddings(64)
    logits = model(**batch()).logits
    assert logits.shape[-1] == 64
    assert torch.equal(logits[..., :PAD], expected[..., :PAD])
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(**batch()).logits, logits)


@pytest.mark.parametrize("overrides", [{}, MODELS["all-of-steps"]], ids=["shared", "all-of-steps"])
def test_lora_adapts_the_shared_layer_once_and_merges_exactly(overrides):
    model = rs_model(**overrides)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], init_lora_weights=False)
    )
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 3 + 5
    adapted.eval()
    expected = adapted(**batch()).logits
    torch.testing.assert_close(adapted.merge_and_unload()(**batch()).logits, expected, atol=1e-4, rtol=1e-4)


def test_sharded_by_fsdp2_layer_by_layer_it_trains_as_in_one_process():
    done = fork("tests/fsdp_losses.py", processes=2)
    alone, sharded = json.loads(done.stdout.splitlines()[-1])
    assert sharded == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == 4


def test_under_autocast_a_steps_bias_keeps_the_type_of_what_it_is_added_to():
    model, seen = rs_model(step_biases=True), []
    activation = model.model.decoder.layers[0].activation_fn
    activation.register_forward_pre_hook(lambda _, states: seen.append(states[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
    assert set(seen) == {torch.bfloat16}


def test_deep_copy_translates_the_same():
    model = rs_model()
    inputs = batch()["input_ids"]
    assert torch.equal(
        copy.deepcopy(model).generate(inputs, max_new_tokens=8), model.generate(inputs, max_new_tokens=8)
    )


# DeepNorm


@pytest.mark.parametrize("depth", [6, 24])
def test_deepnorm_equals_marian_with_alpha_folded_into_its_weights(depth):
    model = rs_model(deepnorm=True, encoder_layers=depth, decoder_layers=depth)
    marian = unrolled_marian(model)
    inputs = batch()
    # LayerNorm's epsilon is not scaled by alpha squared in the folded model: the tolerance is that of this difference.
    torch.testing.assert_close(model(**inputs).logits, marian(**inputs).logits, atol=2e-3, rtol=2e-3)
    del inputs["labels"]
    assert torch.equal(*(m.generate(**inputs, num_beams=4, max_new_tokens=15) for m in (model, marian)))


def test_deepnorm_scales_the_initial_weights_by_beta():
    torch.manual_seed(0)
    config = rs_config(d_model=256, encoder_ffn_dim=256, decoder_ffn_dim=256, deepnorm=True)
    layer = RSMarianForConditionalGeneration(config).model.decoder.layers[0]
    xavier = (2 / (256 + 256)) ** 0.5
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(xavier, rel=0.02)
    for module in (layer.self_attn.v_proj, layer.encoder_attn.out_proj, layer.fc1, layer.fc2):
        assert module.weight.std().item() == pytest.approx(config.decoder_init_gain * xavier, rel=0.02)


def test_deepnorm_weights_are_not_initialised_again_when_loading(tmp_path):
    model = rs_model(deepnorm=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_a_prefix_of_peft_trains_a_model_with_fewer_decoder_than_encoder_steps():
    model = rs_model(encoder_layers=6, decoder_layers=2)
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))
    loss = adapted(**batch()).loss
    loss.backward()
    assert loss.isfinite()
    assert any(parameter.grad is not None for parameter in adapted.parameters())


def test_more_tokens_than_positions_are_named():
    model, ids = rs_model(), torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match=r"the input has 65 tokens, and the model 64 positions \(max_position_embedd"):
        model(input_ids=ids, decoder_input_ids=ids[:, :2])
    with pytest.raises(ValueError, match="the decoder's input has 65 tokens, and the model 64 positions"):
        model(input_ids=ids[:, :2], decoder_input_ids=ids)
    with pytest.raises(ValueError, match="the decoder's input has 65 tokens"):
        model.generate(ids[:, :2], max_length=70, min_length=70)


@pytest.mark.parametrize("pad_token_id", [None, VOCABULARY, -1])
def test_padding_outside_the_vocabulary_is_named(pad_token_id):
    with pytest.raises(ValueError, match=rf"pad_token_id must lie in 0..{VOCABULARY - 1}, the vocabulary, got"):
        rs_model(pad_token_id=pad_token_id)
