"""Self-speculative decoding: the first decoder steps draft, all of them verify, and nothing but the speed changes."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import script
from oracle import PAD, batch, rs_model, unrolled_marian
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    pipeline,
)

from rs_transformer.decoding import DecodingArguments, DraftedDecodingArguments, translate
from rs_transformer.versions_rs_marian import CACHE

OF_STEPS = {"step_biases": True, "step_adapter_rank": 2, "step_layer_norms": True, "step_embeddings": True}
MODELS = {
    "unique1": {},
    "unique2-cycle": {"decoder_unique_layers": 2},
    "unique3-sequence": {"decoder_unique_layers": 3, "layer_sharing": "sequence"},
    "unique2-cycle_rev": {"decoder_unique_layers": 2, "layer_sharing": "cycle_rev"},
    "unique3-sandwich": {"decoder_unique_layers": 3, "layer_sharing": "sandwich"},
    "step-embeddings": {"step_embeddings": True},
    "step-layer-norms": {"step_layer_norms": True, "decoder_unique_layers": 2},
    "step-biases": {"step_biases": True},
    "step-adapters": {"step_adapter_rank": 3},
    "all-of-steps": OF_STEPS,
    "all-of-steps-cycle_rev": {**OF_STEPS, "decoder_unique_layers": 2, "layer_sharing": "cycle_rev"},
    "deepnorm": {"deepnorm": True, "step_embeddings": True},
    "tied-sides": {"tie_encoder_decoder_layers": True, "encoder_unique_layers": 2, "decoder_unique_layers": 2},
    "separate-vocabularies": {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 48},
    "untied-output": {"tie_word_embeddings": False},
    "encoder4-decoder3": {"encoder_layers": 4, "decoder_layers": 3},
}
every_model = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
# A random model says one word over and over, which hides mistakes; it must not. Some words end a sentence.
SEARCH = {"max_new_tokens": 24, "no_repeat_ngram_size": 1, "eos_token_id": [*range(0, PAD, 9)]}
DRAFTS = {
    "long": {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0.0},
    "heuristic": {
        "num_assistant_tokens": 2,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.0,
    },
    "defaults": {},
}


def sources(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch(seed).items() if name != "labels"}


def decoder_calls(model) -> list[dict]:
    """The arguments of each call of the decoder from now on."""
    calls = []
    model.model.decoder.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def passes(calls: list[dict], depth: int) -> tuple[int, int]:
    """How many calls drafted and how many verified, at a depth of the verification."""
    verifying = sum(call["decoder_depth"] == depth for call in calls)
    return len(calls) - verifying, verifying


def check_greedy_search(overrides, draft):
    model = rs_model(**overrides)
    lengths = set()
    for seed in range(3):
        plain = model.generate(**sources(seed), **SEARCH)
        lengths |= {(row != PAD).sum().item() for row in plain}
        for depth in range(model.config.decoder_unique_layers, model.config.decoder_layers):
            drafted = model.generate(**sources(seed), **SEARCH, **draft, draft_decoder_depth=depth)
            assert torch.equal(drafted, plain)
    assert len(lengths) > 1


@every_model
def test_greedy_search_with_a_draft_equals_that_without(overrides):
    check_greedy_search(overrides, DRAFTS["long"])


@pytest.mark.parametrize("draft", [DRAFTS["heuristic"], DRAFTS["defaults"]], ids=["heuristic", "defaults"])
@pytest.mark.parametrize("name", ["unique1", "all-of-steps-cycle_rev"])
def test_greedy_search_does_not_depend_on_how_much_is_drafted(name, draft):
    check_greedy_search(MODELS[name], draft)


@pytest.mark.parametrize("overrides", [{}, OF_STEPS, MODELS["unique2-cycle_rev"]], ids=["1", "steps", "cycle_rev"])
def test_a_batch_of_one_equals_greedy_search_at_every_depth(overrides):
    model = rs_model(**overrides)
    inputs = {name: tensor[1:2, :5] for name, tensor in sources().items()}
    for depth in range(model.config.decoder_unique_layers + 1, 6):
        plain = model.generate(**inputs, max_new_tokens=20, no_repeat_ngram_size=1, decoder_depth=depth)
        options = {"draft_decoder_depth": depth - 1, **DRAFTS["long"]}
        drafted = model.generate(**inputs, max_new_tokens=20, no_repeat_ngram_size=1, decoder_depth=depth, **options)
        assert torch.equal(drafted, plain)


@every_model
def test_steps_go_on_from_the_hidden_states_of_a_draft_where_its_layers_are_the_first(overrides):
    model = rs_model(**overrides)
    depth, layer_map = model.config.decoder_layers, model.config.decoder_layer_map
    calls = decoder_calls(model)
    for draft_depth in range(model.config.decoder_unique_layers, depth):
        calls.clear()
        model.generate(**sources(), **SEARCH, **DRAFTS["long"], draft_decoder_depth=draft_depth)
        first_steps = {call.get("first_step", 0) for call in calls if call["decoder_depth"] == depth}
        begins = layer_map[:draft_depth] == model.config.layer_map("decoder", draft_depth)
        assert first_steps == {draft_depth if begins else 0}
        if begins:
            given = {"encoder_hidden_states": model.model.encoder(sources()["input_ids"])[0], "use_cache": False}
            tokens = batch()["input_ids"]
            states = model.model.decoder(tokens, decoder_depth=draft_depth, **given)[0]
            rest = model.model.decoder(inputs_embeds=states, first_step=draft_depth, **given)[0]
            torch.testing.assert_close(rest, model.model.decoder(tokens, **given)[0])


class Dictated(LogitsProcessor):
    """Has every sentence say the words 1, 2, 3 …, whatever the model would."""

    def __call__(self, input_ids, scores):
        word = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        return torch.where(torch.arange(scores.shape[-1]) == word[:, None], 0.0, -torch.inf)


@pytest.mark.parametrize("overrides", [{}, MODELS["unique2-cycle_rev"]], ids=["goes-on", "own-cache"])
def test_a_draft_that_agrees_needs_few_passes_at_full_depth(overrides):
    model = rs_model(**overrides)
    calls = decoder_calls(model)
    options = {"max_new_tokens": 20, "draft_decoder_depth": 3}
    output = model.generate(**sources(), logits_processor=[Dictated()], **options)
    assert output[:, 1:].tolist() == [[*range(1, 21)]] * 3
    assert passes(calls, 6) == (20, 4)
    assert sum(call["first_step"] for call in calls if "first_step" in call) == (0 if overrides else 4 * 3)
    calls.clear()
    config = GenerationConfig(max_new_tokens=20, num_assistant_tokens=10)
    model.generate(**sources(), logits_processor=[Dictated()], generation_config=config, draft_decoder_depth=3)
    assert passes(calls, 6) == (20, 2)
    calls.clear()
    options |= {"num_assistant_tokens": 1, "num_assistant_tokens_schedule": "heuristic_transient"}
    model.generate(**sources(), logits_processor=[Dictated()], **options)
    assert passes(calls, 6) == (20, 5)  # 1 + 3 + 5 + 7 + 4
    assert model.generation_config.num_assistant_tokens is None


def test_drafting_stops_at_a_token_that_is_not_sure_and_at_the_end_of_all_sentences():
    model = rs_model()
    calls = decoder_calls(model)
    model.generate(**sources(), max_new_tokens=8, draft_decoder_depth=2, assistant_confidence_threshold=1.1)
    assert passes(calls, 6) == (8, 8)
    calls.clear()
    output = model.generate(
        **sources(), logits_processor=[Dictated()], max_new_tokens=20, draft_decoder_depth=2, eos_token_id=4
    )
    assert output.shape[1] == 5
    assert passes(calls, 6) == (4, 1)


class OneTokenPerCall(LogitsProcessor):
    """Gives the token whose turn it is, and keeps what it must not copy."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.tensor([self.calls % PAD]), 1e4)

    def __deepcopy__(self, memo):
        assert id(self.model) in memo
        copied = type(self)(self.model)
        copied.calls = self.calls
        return copied


def test_a_logits_processor_that_counts_sees_each_token_once():
    model = rs_model()
    search = {"max_new_tokens": 12, "eos_token_id": None}
    plain = model.generate(**sources(), **search, logits_processor=[OneTokenPerCall(model)])
    counting = OneTokenPerCall(model)
    drafted = model.generate(**sources(), **search, logits_processor=[counting], draft_decoder_depth=2)
    assert torch.equal(drafted, plain)
    assert counting.calls == 12


def test_the_encoder_runs_once():
    model = rs_model()
    runs = []
    model.model.encoder.register_forward_hook(lambda *_: runs.append(1))
    model.generate(**sources(), **SEARCH, draft_decoder_depth=2)
    assert len(runs) == 1


def test_eight_threads_with_drafts_of_different_depths_generate_what_one_does():
    model = rs_model(**OF_STEPS)
    requests = [(sources(seed), 1 + seed % 5) for seed in range(16)]

    def generate(request):
        inputs, depth = request
        return model.generate(**inputs, **SEARCH, **DRAFTS["long"], draft_decoder_depth=depth)

    plain = [model.generate(**inputs, **SEARCH) for inputs, _ in requests]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(generate, requests))
    assert all(map(torch.equal, plain, together))


@pytest.mark.parametrize("overrides", [{}, MODELS["unique2-cycle_rev"]], ids=["goes-on", "own-cache"])
def test_sampling_keeps_the_distribution(overrides):
    # Four words and two places: the probability of each translation is known.
    model = rs_model(vocab_size=6, pad_token_id=5, decoder_start_token_id=5, init_std=0.5, **overrides)
    model.final_logits_bias[:, 0] = model.final_logits_bias[:, 5]
    model.generation_config.forced_eos_token_id = None
    sentence = torch.tensor([[1, 3, 2]])
    words = range(1, 5)
    pairs = torch.tensor([[5, *pair] for pair in itertools.product(words, words)])
    logits = model(sentence.expand(16, -1), decoder_input_ids=pairs).logits[:, :2].detach()
    expected = logits.log_softmax(-1).gather(-1, pairs[:, 1:, None]).sum((1, 2)).exp()
    torch.manual_seed(1)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "num_return_sequences": 50}
    options |= {"draft_decoder_depth": model.config.decoder_unique_layers, **DRAFTS["long"]}
    counts, draws = Counter(), 4000
    for _ in range(draws // 50):
        counts.update(map(tuple, model.generate(sentence, **options)[:, 1:].tolist()))
    found = torch.tensor([counts[tuple(pair)] for pair in pairs[:, 1:].tolist()], dtype=torch.float)
    statistic = ((found - draws * expected) ** 2 / (draws * expected)).sum().item()
    assert statistic < 37.7  # chi squared, 15 degrees of freedom, p = 0.001
    options |= {"decoder_depth": options.pop("draft_decoder_depth")}
    shallow = torch.stack([model.generate(sentence, **options)[:, 1:] for _ in range(draws // 50)]).flatten(0, 1)
    of_draft = torch.tensor([(shallow == pair).all(-1).sum().item() for pair in pairs[:, 1:]])
    assert ((of_draft - draws * expected) ** 2 / (draws * expected)).sum().item() > 100  # the draft's own is another


def test_scores_logits_and_cache_are_those_of_greedy_search():
    model = rs_model()
    options = {"max_new_tokens": 12, "no_repeat_ngram_size": 1, "eos_token_id": None, "pad_token_id": PAD}
    options |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = model.generate(**sources(), **options)
    drafted = model.generate(**sources(), **options, draft_decoder_depth=2, **DRAFTS["long"])
    assert drafted.keys() <= plain.keys()
    assert torch.equal(drafted.sequences, plain.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(drafted, name), getattr(plain, name), atol=1e-4, rtol=1e-4)
    assert [drafted[CACHE].get_seq_length(step) for step in range(6)] == [12] * 6
    mask = torch.ones_like(plain.sequences)
    options |= {"max_new_tokens": 6, "decoder_input_ids": plain.sequences, "decoder_attention_mask": mask}
    expected = model.generate(**sources(), **options).sequences
    assert torch.equal(model.generate(**sources(), **options, **{CACHE: drafted[CACHE]}).sequences, expected)
    with pytest.raises(ValueError, match="needs an empty cache"):
        model.generate(**sources(), **options, **{CACHE: plain[CACHE]}, draft_decoder_depth=2)


@pytest.mark.parametrize("overrides", [{}, MODELS["unique2-cycle_rev"]], ids=["goes-on", "own-cache"])
def test_a_prompt_of_several_tokens_and_its_mask_are_heeded(overrides):
    model = rs_model(**overrides)
    prompt = torch.tensor([[PAD, 7, 9, 5], [PAD, PAD, 11, 2], [PAD, 3, 4, 1]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]])
    given = {"decoder_input_ids": prompt, "decoder_attention_mask": mask}
    options = SEARCH | {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    plain = model.generate(**sources(), **given, **options)
    drafted = model.generate(**sources(), **given, **options, draft_decoder_depth=3)
    assert torch.equal(drafted.sequences, plain.sequences)
    torch.testing.assert_close(drafted.logits, plain.logits, atol=1e-4, rtol=1e-4)
    unmasked = model.generate(**sources(), decoder_input_ids=prompt, **options)
    assert not torch.allclose(unmasked.logits[0], plain.logits[0], atol=1e-2)


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_streamers_and_stopping_criteria_see_every_token():
    model = rs_model()
    inputs = {name: tensor[:1] for name, tensor in sources().items()}
    heard = []
    for draft in ({}, {"draft_decoder_depth": 2, **DRAFTS["long"]}):
        streamer = Heard()
        options = {"max_new_tokens": 20, "no_repeat_ngram_size": 1, "stopping_criteria": [MaxLengthCriteria(9)]}
        output = model.generate(**inputs, **options, **draft, streamer=streamer)
        assert streamer.tokens == [*output[0].tolist(), "end"]
        assert output.shape[1] == 9
        heard.append(streamer.tokens)
    assert heard[0] == heard[1]


@pytest.mark.parametrize("depth", [0, 1, 6, 7, -1, 2.0, "2", True])
def test_impossible_depths_of_a_draft_are_named(depth):
    model = rs_model(decoder_unique_layers=2)
    limits = (
        r"draft_decoder_depth must be a whole number in decoder_unique_layers \(2\)..5, less than the .* \(6\), got"
    )
    with pytest.raises(ValueError, match=f"{limits} {depth!r}"):
        model.generate(**sources(), draft_decoder_depth=depth)
    with pytest.raises(ValueError, match=r"\(2\)..3, less than the decoder's depth \(4\), got 4"):
        model.generate(**sources(), draft_decoder_depth=4, decoder_depth=4)


def test_what_does_not_go_together_with_a_draft_is_named():
    model = rs_model()
    for options, message in (
        ({"num_beams": 2}, "give num_beams=1, got 2"),
        ({"cache_implementation": "static"}, "needs a dynamic cache"),
        ({"cache_implementation": "offloaded"}, "needs a dynamic cache"),
        ({"use_cache": False}, "needs a dynamic cache"),
        ({"assistant_model": rs_model()}, "draft_decoder_depth and assistant_model exclude each other"),
        ({"stop_strings": ["a"]}, "stop_strings exclude"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "for greedy search and sampling, and not for contrastive_search"),
        ({"dola_layers": "low"}, "and not for dola_generation"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens exclude"),
        ({"generation_config": GenerationConfig(stop_strings=["a"])}, "stop_strings exclude"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions exclude"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**sources(), draft_decoder_depth=2, **options)
    with pytest.raises(ValueError, match=r"more steps than unique layers \(6\), this call's has 6"):
        rs_model(decoder_unique_layers=6).generate(**sources(), draft_decoder_depth=2)
    with pytest.raises(ValueError, match="draft_decoder_depth"):
        unrolled_marian(model).generate(**sources(), draft_decoder_depth=2)
    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PEFT's prefixes"):
        prefixed.generate(**sources(), draft_decoder_depth=2)
    model = rs_model()
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match="needs a model that is not compiled"):
        model.generate(**sources(), draft_decoder_depth=2)


def test_without_a_cache_that_is_right_nothing_is_drafted(monkeypatch):
    model = rs_model()
    plain = model.generate(**sources(), **SEARCH)
    monkeypatch.setattr(type(model), "_cache_is_right", lambda self: False)
    calls = decoder_calls(model)
    assert torch.equal(model.generate(**sources(), **SEARCH, draft_decoder_depth=2), plain)
    assert not any(call["use_cache"] for call in calls)


SENTENCES = ["a b c d", "f e", "g h i j k", "b"]


def test_pipeline_drafts(trained):
    plain = pipeline("translation", model=str(trained), num_beams=1)(SENTENCES, batch_size=3)
    translator = pipeline("translation", model=str(trained), num_beams=1, draft_decoder_depth=1)
    calls = decoder_calls(translator.model)
    assert translator(SENTENCES, batch_size=3) == plain
    assert {call["decoder_depth"] for call in calls} == {1, 2}
    scored = translator("a b c d", output_scores=True)
    assert scored[0]["score"] < 0


def test_lists_are_translated_with_a_draft(trained):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    drafted = DraftedDecodingArguments(num_beams=1, max_new_tokens=12, draft_decoder_depth=1)
    plain = translate(model, tokenizer, SENTENCES, DecodingArguments(num_beams=1, max_new_tokens=12))
    calls = decoder_calls(model)
    assert translate(model, tokenizer, SENTENCES, drafted) == plain
    assert {call["decoder_depth"] for call in calls} == {1, 2}
    with pytest.raises(ValueError, match="draft_decoder_depth needs num_beams 1, got 5"):
        DraftedDecodingArguments(draft_decoder_depth=1)
    with pytest.raises(ValueError, match="draft_decoder_depth must be at least 1, got 0"):
        DraftedDecodingArguments(num_beams=1, draft_decoder_depth=0)
    with pytest.raises(ValueError, match="draft_decoder_depth is for RSMarian models, got a MarianMTModel"):
        translate(unrolled_marian(model), tokenizer, SENTENCES, drafted)


def test_commands_translate_with_a_draft(trained, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES) + "\n")
    (tmp_path / "pairs.jsonl").write_text('{"translation": {"fw": "a b c", "bw": "c b a"}}\n')
    outputs = []
    for number, draft in enumerate(([], ["--draft_decoder_depth", 1])):
        options = ["--num_beams", 1, "--max_new_tokens", 12, *draft]
        files = ["--input_file", tmp_path / "in.txt", "--output_file", tmp_path / f"{number}.txt"]
        script("translate")("--model_name_or_path", trained, *files, *options)
        pairs = ["--test_file", tmp_path / "pairs.jsonl", "--source_lang", "fw", "--target_lang", "bw"]
        script("evaluate")("--systems", trained, *pairs, *options)
        outputs.append(((tmp_path / f"{number}.txt").read_text(), capsys.readouterr().out.count("BLEU 100.00")))
    assert outputs[0] == outputs[1]
