"""Collapse, expand and change of depth: exact where they can be, and every tensor accounted for."""

import copy

import ctranslate2
import pytest
import torch
from forked import fork
from oracle import PAD, VOCABULARY, batch, marian, rs_model, unrolled_marian, with_own_weights
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from rs_transformer import RSMarianForConditionalGeneration, collapse, expand, with_depth
from rs_transformer.calibration import calibrate, calibration_loss
from rs_transformer.corpus import CorpusArguments, load_split
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.layer_transfer import collapsed_config, plan_collapse, source_steps

SEPARATE = {"decoder_vocab_size": 56, "share_encoder_decoder_embeddings": False}
MODELS = {
    "paper": {},
    "cycle": {"encoder_unique_layers": 3, "decoder_unique_layers": 2},
    "sequence": {"layer_sharing": "sequence", "encoder_unique_layers": 2, "decoder_unique_layers": 4},
    "cycle_rev": {"layer_sharing": "cycle_rev", "encoder_unique_layers": 3, "decoder_unique_layers": 3},
    "sandwich": {"layer_sharing": "sandwich", "encoder_unique_layers": 3, "decoder_unique_layers": 3},
    "sides": {
        "encoder_layer_sharing": "sequence",
        "encoder_unique_layers": 3,
        "decoder_layer_sharing": "cycle_rev",
        "decoder_unique_layers": 2,
    },
    "step-embeddings": {"step_embeddings": True},
    "step-norms": {"step_layer_norms": True, "encoder_unique_layers": 2, "decoder_layers": 3},
    "step-biases": {"step_biases": True, "encoder_layers": 4, "decoder_unique_layers": 2},
    "step-adapters": {"step_adapter_rank": 2, "decoder_unique_layers": 2, "decoder_layers": 3},
    "tied-sides": {"tie_encoder_decoder_layers": True, "encoder_unique_layers": 2, "decoder_unique_layers": 2},
    "depths": {"encoder_layers": 5, "decoder_layers": 2, "encoder_unique_layers": 2, "activation_function": "relu"},
    "gelu": {"activation_function": "gelu", "scale_embedding": False},
    "separate": SEPARATE,
    "untied": {"tie_word_embeddings": False},
    "separate-untied": {**SEPARATE, "tie_word_embeddings": False},
    "widths": {"encoder_ffn_dim": 48, "decoder_ffn_dim": 80, "encoder_attention_heads": 2},
}
EXACT = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())


def equal_states(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# expand


@EXACT
def test_expanded_model_equals_the_recurrent_one_in_logits_loss_and_translations(fields):
    model = rs_model(**fields)
    expanded = expand(model)
    assert type(expanded) is MarianMTModel
    assert equal_states(expanded, unrolled_marian(model))
    data = batch()
    with torch.no_grad():
        ours, theirs = model(**data), expanded(**data)
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=0, atol=2e-5)
    for search in ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 0.6}):
        options = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "max_new_tokens": 12}
        assert torch.equal(expanded.generate(**options, **search), model.generate(**options, **search))


def test_deepnorm_is_folded_up_to_the_epsilon_of_the_layer_norms():
    model = rs_model(deepnorm=True, encoder_layers=12, decoder_layers=12)
    with torch.no_grad():
        difference = (expand(model)(**batch()).logits - model(**batch()).logits).abs().max()
    assert difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_expanded_folder_is_plain_marian_for_an_interpreter_without_the_package(trained, tmp_path, dtype):
    model = AutoModelForSeq2SeqLM.from_pretrained(trained, dtype=dtype)
    expand(model).save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['rs_transformer'] = None\n"
        "from transformers import AutoModelForSeq2SeqLM, MarianMTModel, MarianTokenizer\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = MarianTokenizer.from_pretrained(sys.argv[2])\n"
        "assert type(model) is MarianMTModel and not hasattr(model.config, 'encoder_unique_layers')\n"
        "output = model.generate(**tokenizer('a b c d', return_tensors='pt'))\n"
        "print(str(model.dtype), tokenizer.decode(output[0], skip_special_tokens=True))\n"
    )
    done = fork("-c", code, tmp_path, trained, cwd=tmp_path)
    assert done.stdout == f"{dtype} d c b a\n", done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_expanded_folder_serves_the_pipeline_and_ctranslate2s_own_converter(trained, task, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = AutoModelForSeq2SeqLM.from_pretrained(trained)
    expand(model).save_pretrained(tmp_path / "marian")
    tokenizer.save_pretrained(tmp_path / "marian")
    converter = "ctranslate2.converters.transformers"  # what ct2-transformers-converter runs
    fork("-m", converter, "--model", tmp_path / "marian", "--output_dir", tmp_path / "ct2")
    engine = ctranslate2.Translator(str(tmp_path / "ct2"), intra_threads=1)
    sources = load_split(CorpusArguments("fw", "bw", test_file=[str(task["test"])]), "test")["source"][:]
    assert pipeline("translation", model=str(tmp_path / "marian"))("a b c")[0]["translation_text"] == "c b a"
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) for text in sources]
    for num_beams in (1, 4):
        # The engines count a hypothesis's length differently, so they are compared without a length penalty.
        results = engine.translate_batch(tokens, beam_size=num_beams, length_penalty=0)
        ids = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
        decoding = DecodingArguments(num_beams=num_beams, length_penalty=0.0, max_new_tokens=31)
        ours = translate(model, tokenizer, sources, decoding, progress=False)
        assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ours


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.decoder.embed_tokens.weight"])
@pytest.mark.parametrize("name", ["paper", "separate", "untied", "separate-untied"])
def test_weights_that_only_the_configuration_calls_tied_stay_apart(tmp_path, name, weight):
    """A file may hold an output projection of its own beside shared embeddings, as Tatoeba's models do."""
    fields = {**MODELS[name], "encoder_layers": 3, "decoder_layers": 3}
    model = with_own_weights(rs_model(**fields), weight)
    stock = expand(model)
    all_layers = {"encoder_unique_layers": 3, "decoder_unique_layers": 3, "method": "first"}
    made = [stock, with_depth(model, decoder_layers=3), collapse(model, **all_layers), collapse(stock, **all_layers)]
    expected = model(**batch()).logits
    for number, other in enumerate(made):
        other.tie_weights()
        other.save_pretrained(tmp_path / str(number))
        loaded = type(other).from_pretrained(tmp_path / str(number))
        for result in (other, loaded.eval()):
            torch.testing.assert_close(result(**batch()).logits, expected, rtol=0, atol=2e-5)


# collapse


def sharing(config) -> dict:
    """What `collapse` needs to share layers as a model does."""
    sides = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("unique_layers", "layer_sharing")]
    own = ("step_layer_norms", "step_biases", "tie_encoder_decoder_layers")
    return {name: getattr(config, name) for name in (*sides, "layer_sharing", *own)}


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"step-embeddings", "step-adapters"}))
@pytest.mark.parametrize("method", ["first", "last", "average"])
def test_collapsing_an_expanded_model_gives_it_back(name, method):
    model = rs_model(**MODELS[name])
    again = collapse(expand(model), **sharing(model.config), method=method)
    assert equal_states(again, model)
    assert again.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}


def test_step_embeddings_come_back_from_the_expanded_model_as_layer_norms():
    model = rs_model(step_embeddings=True)
    again = collapse(expand(model), step_layer_norms=True)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["first", 3, "average"])
def test_adapters_give_the_parent_at_full_rank_and_come_as_close_as_their_rank_can(method):
    parent, own = marian(), {"step_layer_norms": True, "step_biases": True}
    child = collapse(parent, method=method, step_adapter_rank=32, **own)
    with torch.no_grad():
        torch.testing.assert_close(child(**batch()).logits, parent(**batch()).logits, atol=1e-4, rtol=1e-4)
    factors = child.model.encoder.step_projections[4]["feed_forward_fc1"]
    shared = child.model.encoder.layers[0].fc1.weight
    theirs = parent.model.encoder.layers[4].fc1.weight
    torch.testing.assert_close(shared + factors.up @ factors.down, theirs, atol=1e-5, rtol=1e-5)
    # What is left of the difference is in its smaller singular values.
    cut = collapse(parent, method=method, step_adapter_rank=5, **own)
    factors, shared = cut.model.encoder.step_projections[4]["feed_forward_fc1"], cut.model.encoder.layers[0].fc1.weight
    rest = torch.linalg.svdvals(theirs - shared)[5:].norm()
    torch.testing.assert_close((theirs - shared - factors.up @ factors.down).norm(), rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "unique"), [("first", 1), (2, 1), ("average", 6)])
def test_adapters_that_start_from_nothing_can_learn(method, unique):
    child = collapse(marian(), method=method, encoder_unique_layers=unique, step_adapter_rank=3)
    child(**batch()).loss.backward()
    adapters = [name for name, _ in child.named_modules() if name.endswith(("_q_proj", "_fc1"))]
    assert len(adapters) == 6 * 2 + 6 * 3
    for name in adapters:
        adapter = child.get_submodule(name)
        assert all((adapter.up.grad if adapter.down[rank].any() else adapter.down.grad).any() for rank in range(3))


def test_adapters_of_a_recurrent_parent_are_made_anew_or_left_out():
    parent = rs_model(step_adapter_rank=3, step_biases=True, decoder_unique_layers=2)
    with torch.no_grad():
        wanted = parent(**batch()).logits
        # Its matrices differ from their mean by rank 6 at most: by the adapters of one step and by the mean of all.
        again = collapse(parent, decoder_unique_layers=2, step_adapter_rank=18)
        torch.testing.assert_close(again(**batch()).logits, wanted, atol=1e-4, rtol=1e-4)
        vanilla = collapse(parent, encoder_unique_layers=6, decoder_unique_layers=6, step_adapter_rank=0)
        torch.testing.assert_close(vanilla(**batch()).logits, wanted, atol=1e-5, rtol=1e-5)
    assert collapse(parent, decoder_unique_layers=2).config.step_adapter_rank == 3
    assert not any(name.endswith((".up", ".down")) for name in vanilla.state_dict())


@pytest.mark.parametrize("method", ["first", 3, "average"])
def test_steps_keep_the_layer_norms_of_the_parents_layers(method):
    parent = marian()
    child = collapse(parent, step_layer_norms=True, decoder_unique_layers=2, method=method)
    state, stored = parent.state_dict(), child.state_dict()
    for step in range(6):
        for name in ("encoder_attn_layer_norm.weight", "final_layer_norm.bias"):
            ours, theirs = f"model.decoder.step_norms.{step}.{name}", f"model.decoder.layers.{step}.{name}"
            assert torch.equal(stored[ours], state[theirs])
    plan = plan_collapse(parent, child.config, method)
    assert plan.sources["model.encoder.step_norms.4.final_layer_norm.weight"] == [
        "model.encoder.layers.4.final_layer_norm.weight"
    ]
    assert not any("layer_norm" in name for name in plan.dropped)


def test_what_belongs_to_the_steps_is_copied_or_merged_from_a_recurrent_parent():
    parent = rs_model(step_embeddings=True, step_layer_norms=True, decoder_unique_layers=2)
    kept, stored = collapse(parent).state_dict(), parent.state_dict()
    assert {name for name in kept if ".step_" in name} == {name for name in stored if ".step_" in name}
    assert all(torch.equal(kept[name], stored[name]) for name in kept if ".step_" in name)
    merged = collapse(parent, step_layer_norms=False, decoder_unique_layers=6).state_dict()
    norm = "final_layer_norm.weight"
    mean = torch.stack([stored[f"model.encoder.step_norms.{step}.{norm}"] for step in range(6)]).mean(0)
    torch.testing.assert_close(merged[f"model.encoder.layers.0.{norm}"], mean)
    assert torch.equal(merged[f"model.decoder.layers.3.{norm}"], stored[f"model.decoder.step_norms.3.{norm}"])


@EXACT
def test_as_many_unique_layers_as_steps_is_the_parent_bit_for_bit(fields):
    parent = expand(rs_model(**fields))
    depths = {f"{side}_unique_layers": getattr(parent.config, f"{side}_layers") for side in ("encoder", "decoder")}
    for method in ("first", "last", "average", "stepwise"):
        vanilla = collapse(parent, method=method, **depths)
        assert equal_states(vanilla, parent)
    data = batch()
    with torch.no_grad():
        assert torch.equal(vanilla(**data).logits, parent(**data).logits)
    options = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"], "max_new_tokens": 12}
    assert torch.equal(vanilla.generate(**options, num_beams=4), parent.generate(**options, num_beams=4))


@pytest.mark.parametrize(
    ("layer_map", "method", "expected"),
    [
        ([0, 0, 0, 0, 0, 0], "first", [[0]]),
        ([0, 0, 0, 0, 0, 0], "last", [[5]]),
        ([0, 0, 0, 0, 0, 0], 2, [[2]]),
        ([0, 0, 0, 0, 0, 0], "average", [[0, 1, 2, 3, 4, 5]]),
        ([0, 0, 0, 0, 0, 0], "stepwise", [[3]]),
        ([0, 1, 2, 0, 1, 2], "first", [[0], [1], [2]]),
        ([0, 1, 2, 0, 1, 2], "last", [[3], [4], [5]]),
        ([0, 1, 2, 0, 1, 2], "average", [[0, 3], [1, 4], [2, 5]]),
        ([0, 0, 1, 1, 2, 2], "average", [[0, 1], [2, 3], [4, 5]]),
        ([0, 1, 2, 2, 1, 0], "average", [[0, 5], [1, 4], [2, 3]]),
        ([0, 1, 1, 1, 1, 2], "average", [[0], [1, 2, 3, 4], [5]]),
        ([0, 0, 0, 1, 1, 1], "stepwise", [[0], [5]]),
        ([0, 0, 1, 1, 2, 2], "stepwise", [[0], [2], [5]]),
        ([0, 1, 2, 3, 4, 5], "stepwise", [[0], [1], [2], [3], [4], [5]]),
    ],
)
def test_each_method_starts_from_the_parent_layers_it_says(layer_map, method, expected):
    assert source_steps(layer_map, method) == expected


def test_collapsed_layers_are_those_of_the_parent_or_their_mean():
    parent = marian()
    state = parent.state_dict()
    name = "model.decoder.layers.{}.encoder_attn.v_proj.weight"
    for method, expected in (
        ("first", state[name.format(0)]),
        ("last", state[name.format(5)]),
        (4, state[name.format(4)]),
        ("average", torch.stack([state[name.format(i)] for i in range(6)]).mean(0)),
    ):
        child = collapse(parent, method=method).state_dict()
        torch.testing.assert_close(child[name.format(0)], expected, rtol=0, atol=1e-6)
        assert torch.equal(child["model.shared.weight"], state["model.shared.weight"])


def test_parents_that_are_recurrent_already_count_by_steps():
    parent = rs_model(layer_sharing="sandwich", encoder_unique_layers=3, decoder_unique_layers=3)  # 0 1 1 1 1 2
    child = collapse(parent, encoder_unique_layers=2, decoder_unique_layers=1, layer_sharing="sequence")
    assert child.config.encoder_layer_map == [0, 0, 0, 1, 1, 1]
    state, parent_state = child.state_dict(), parent.state_dict()
    name = "model.encoder.layers.{}.fc1.bias"
    first, middle, last = (parent_state[name.format(i)] for i in range(3))
    torch.testing.assert_close(state[name.format(0)], (first + 2 * middle) / 3)
    torch.testing.assert_close(state[name.format(1)], (2 * middle + last) / 3)
    same = collapse(parent, encoder_unique_layers=3, decoder_unique_layers=3, layer_sharing="sandwich")
    assert equal_states(same, parent)


def test_every_tensor_of_the_parent_is_copied_merged_or_dropped():
    parent = marian(tie_word_embeddings=False, **SEPARATE)
    for method in ("first", "last", 1, "average", "stepwise"):
        config = collapsed_config(parent.config, encoder_unique_layers=2)
        plan = plan_collapse(parent, config, method)
        used = {source for sources in plan.sources.values() for source in sources}
        assert plan.sources.keys() == RSMarianForConditionalGeneration(config).state_dict().keys()
    assert {"lm_head.weight", "final_logits_bias"} <= used
    assert "model.decoder.layers.3.fc1.bias" in plan_collapse(parent, config, "first").dropped


def test_bias_ids_and_generation_settings_come_along():
    parent = marian()
    parent.final_logits_bias.copy_(torch.randn(1, VOCABULARY))
    parent.generation_config.update(num_beams=6, bad_words_ids=[[PAD]], max_length=40)
    child = collapse(parent)
    assert torch.equal(child.final_logits_bias, parent.final_logits_bias)
    assert child.generation_config.to_dict() == parent.generation_config.to_dict()
    assert child.generation_config is not parent.generation_config
    for field in ("pad_token_id", "decoder_start_token_id", "eos_token_id", "forced_eos_token_id"):
        assert getattr(child.config, field) == getattr(parent.config, field)


def test_parent_is_not_changed_and_shares_no_memory():
    parent = marian().train()
    before, config = copy.deepcopy(parent.state_dict()), copy.deepcopy(parent.config.to_dict())
    child = collapse(parent, method="first")
    assert child.training
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    assert parent.config.to_dict() == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_kept_and_calibration_learns_all_the_same(dtype):
    parent = noisy_parent().to(dtype)
    child = collapse(parent)
    assert child.dtype == expand(child).dtype == with_depth(child, decoder_layers=2).dtype == dtype
    sample = [batch(seed=seed) for seed in range(20)]
    calibrated = collapse(parent, method="calibrated", calibration=sample, updates=60, learning_rate=1e-3)
    assert calibrated.dtype == parent.dtype == dtype
    losses = [calibration_loss(model.float(), parent.float(), batch(seed=99), 0.3) for model in (calibrated, child)]
    assert losses[0] < 0.7 * losses[1]


def test_recurrent_parents_keep_their_deepnorm_and_layerdrop():
    parent = rs_model(deepnorm=True, encoder_layerdrop=0.1, decoder_unique_layers=2)
    child = collapse(parent, decoder_unique_layers=2)
    assert child.config.to_dict() == {**parent.config.to_dict(), "dtype": "float32"}
    with torch.no_grad():
        assert torch.equal(child(**batch()).logits, parent(**batch()).logits)


def test_a_model_with_other_tensors_than_marians_is_refused():
    parent = marian()
    parent.model.encoder.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"other tensors than Marian's: model.encoder.adapter.bias; merge or unload"):
        collapse(parent)


@pytest.mark.parametrize("transfer", [expand, with_depth, collapse])
def test_adapters_of_peft_are_not_taken_for_layers(transfer):
    model = rs_model()
    get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"other tensors than Marian's: .*; merge or unload adapters first"):
        transfer(model)


@pytest.mark.parametrize("transfer", [expand, with_depth, collapse])
def test_quantised_models_are_refused(transfer):
    model = rs_model()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="is quantised: transfer the layers first"):
        transfer(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "calibrated", "calibration": batch()}, "a list of batches, each a mapping, got a str as batch"),
        ({"method": "calibrated", "calibration": [{"input_ids": 1}]}, "has no attention_mask and no labels, only inp"),
        ({"method": "middle"}, "method must be one of first, last, average, stepwise, calibrated or a number"),
        ({"method": 6}, r"method as a number is a layer of the parent's encoder, 0..5, got 6"),
        ({"encoder_unique_layers": 7}, r"encoder_unique_layers must lie in 1..encoder_layers \(6\)"),
        ({"decoder_unique_layers": 0}, r"decoder_unique_layers must lie in 1..decoder_layers \(6\)"),
        ({"layer_sharing": "spiral"}, "layer_sharing"),
        ({"method": "calibrated"}, "calibration batches go together"),
        ({"method": "first", "calibration": []}, "calibration batches go together"),
        ({"method": "calibrated", "calibration": []}, "there are no calibration batches"),
        (
            {"method": "calibrated", "calibration": iter([batch()] * 2), "updates": 3},
            "only 2 calibration batches, to be read once; give a list",
        ),
    ],
)
def test_impossible_collapses_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        collapse(marian(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_unique_layer": 3}, r"collapse\(\) got an unexpected keyword argument 'encoder_unique_layer'"),
        ({"updates": 3}, "updates is for calibration: give method='calibrated' and calibration batches too"),
        ({"method": "calibrated", "calibration": [], "update": 3}, "unexpected keyword argument 'update'"),
        ({"method": "calibrated", "calibration": [], "child": None}, "unexpected keyword argument 'child'"),
    ],
)
def test_arguments_that_a_collapse_does_not_know_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        collapse(marian(), **options)


def test_other_models_are_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(TypeError, match="expected a MarianMTModel or an RSMarian, got a T5ForConditionalGeneration"):
        collapse(t5)
    with pytest.raises(TypeError, match="MarianMTModel is not recurrently stacked; collapse"):
        expand(marian())
    with pytest.raises(TypeError, match="MarianMTModel is not recurrently stacked; collapse"):
        with_depth(marian(), decoder_layers=1)


# with_depth


@pytest.mark.parametrize(("encoder", "decoder"), [(None, 2), (3, None), (1, 1), (9, 12)])
def test_with_depth_is_what_loading_at_that_depth_gives(tmp_path, encoder, decoder):
    model = rs_model()
    model.save_pretrained(tmp_path)
    depths = {"encoder_layers": encoder, "decoder_layers": decoder}
    loaded = RSMarianForConditionalGeneration.from_pretrained(
        tmp_path, **{name: depth for name, depth in depths.items() if depth is not None}
    )
    changed = with_depth(model, **depths)
    assert changed.config.decoder_layer_map == loaded.config.decoder_layer_map == [0] * (decoder or 6)
    with torch.no_grad():
        assert torch.equal(changed(**batch()).logits, loaded(**batch()).logits)
    assert model.config.decoder_layers == 6
    assert changed.model.shared.weight.data_ptr() != model.model.shared.weight.data_ptr()


def test_with_depth_keeps_what_belongs_to_the_steps_that_stay(tmp_path):
    model = rs_model(step_embeddings=True, step_layer_norms=True, step_biases=True, step_adapter_rank=2)
    with torch.no_grad():
        expected = model(**batch(), encoder_depth=2, decoder_depth=4).logits
        assert torch.equal(with_depth(model, encoder_layers=2, decoder_layers=4)(**batch()).logits, expected)
    with pytest.raises(ValueError, match=r"decoder_layers must be at most 6, got 7: each step has parameters of"):
        with_depth(model, decoder_layers=7)
    for own in ({"step_biases": True}, {"step_adapter_rank": 1}):
        with pytest.raises(ValueError, match=rf"parameters of its own \({next(iter(own))}\)"):
            with_depth(rs_model(**own), encoder_layers=7)
    deeper = with_depth(rs_model(step_embeddings=True), decoder_layers=8)
    assert not deeper.model.decoder.step_embeddings[6].weight.any()


def test_with_depth_keeps_the_residual_scale_that_the_weights_were_trained_with():
    model = rs_model(deepnorm=True)
    assert with_depth(model, decoder_layers=2).config.decoder_residual_scale == model.config.decoder_residual_scale


def test_with_depth_refuses_less_than_the_unique_layers():
    with pytest.raises(ValueError, match=r"decoder_unique_layers must lie in 1..decoder_layers \(2\)"):
        with_depth(rs_model(decoder_unique_layers=3), decoder_layers=2)
    with pytest.raises(ValueError, match="decoder_layers must be at least 1, got 0"):
        with_depth(rs_model(), decoder_layers=0)


# calibration


def noisy_parent() -> MarianMTModel:
    """A parent whose layers are alike enough for a shared layer to do nearly what they do."""
    parent = expand(rs_model())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parent.named_parameters():
            if ".layers." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return parent


def test_calibrated_comes_closer_to_the_parent_than_the_other_methods():
    parent = noisy_parent()
    held_out = batch(seed=99)
    sample = [batch(seed=seed) for seed in range(20)]
    losses = {
        method: calibration_loss(collapse(parent, method=method), parent, held_out, 0.3).item()
        for method in ("first", "last", 3, "average")
    }
    child = collapse(parent, method="calibrated", calibration=sample, updates=60, learning_rate=1e-3)
    assert calibration_loss(child, parent, held_out, 0.3).item() < 0.7 * min(losses.values())


def test_calibration_trains_the_layers_of_the_child_alone():
    parent = noisy_parent().train()
    before = copy.deepcopy(parent.state_dict())
    child = collapse(parent)
    start = copy.deepcopy(child.state_dict())
    losses = calibrate(child, parent, [batch()], updates=3)
    assert len(losses) == 3
    assert parent.training
    assert child.training
    assert all(torch.equal(before[name], tensor) for name, tensor in parent.state_dict().items())
    assert all(parameter.grad is None for model in (parent, child) for parameter in model.parameters())
    assert [p.requires_grad for p in child.parameters()] == [p.requires_grad for p in collapse(parent).parameters()]
    for name, tensor in child.state_dict().items():
        assert torch.equal(tensor, start[name]) == (".layers." not in name), name


def test_calibration_leaves_out_tokens_that_minus_infinity_bars():
    parent, data = marian(), batch()
    barred = copy.deepcopy(parent)
    for model, bar in ((parent, -1e4), (barred, -float("inf"))):
        model.final_logits_bias[:, 3] = bar
        data["labels"].masked_fill_(data["labels"] == 3, 4)
    losses = [calibration_loss(collapse(model), model, data, 0.3) for model in (parent, barred)]
    torch.testing.assert_close(*losses)


def test_calibration_loss_is_nothing_for_the_parent_itself_and_ignores_padding():
    parent = expand(rs_model())
    child = collapse(parent)
    assert calibration_loss(child, parent, batch(), 1.0).item() < 1e-6
    other = collapse(noisy_parent())
    data = batch()
    padded = {
        "input_ids": torch.nn.functional.pad(data["input_ids"], (0, 3), value=PAD),
        "attention_mask": torch.nn.functional.pad(data["attention_mask"], (0, 3)),
        "labels": torch.nn.functional.pad(data["labels"], (0, 2), value=-100),
    }
    padded["labels"][0, -1] = PAD  # as `tokenizer(…, text_target=…, padding=True)` has it
    loss, padded_loss = (calibration_loss(other, parent, each, 1.0) for each in (data, padded))
    torch.testing.assert_close(padded_loss, loss)


def test_a_single_update_calibrates():
    parent = noisy_parent()
    child = collapse(parent, method="calibrated", calibration=[batch()], updates=1)
    assert not equal_states(child, collapse(parent))


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(ValueError, match="the child has decoder_layers 2 and the parent 6"):
        calibrate(rs_model(decoder_layers=2), marian(), [batch()], updates=1)
    nothing = batch() | {"labels": torch.full_like(batch()["labels"], -100)}
    with pytest.raises(ValueError, match="has no target: all of its labels are -100"):
        calibrate(rs_model(), marian(), [nothing], updates=1)


def test_calibration_that_diverges_is_named():
    with pytest.raises(ValueError, match=r"calibration diverged at update \d+: lower the learning rate"):
        collapse(marian(), method="calibrated", calibration=[batch()], updates=50, learning_rate=1e38)
