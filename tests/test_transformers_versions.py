"""One source for every transformers that pyproject.toml admits: names of arguments, none swallowed, caches checked."""

import inspect
import logging
import re
import sys
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from conftest import ROOT, run
from forked import fork
from oracle import PAD, batch, rs_config, rs_model, unrolled_marian
from packaging.requirements import Requirement
from packaging.version import Version
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, MarianMTModel
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from rs_transformer import RSMarianForConditionalGeneration
from rs_transformer import generation_rs_marian as generation
from rs_transformer.ensemble import EnsembleForSeq2SeqLM
from rs_transformer.versions_rs_marian import CACHE, TESTED_TRANSFORMERS


def inputs_of(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in batch(seed).items() if name != "labels"}


def new_cache() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def modules(model: RSMarianForConditionalGeneration) -> dict[str, torch.nn.Module]:
    """One of each class of ours that has a `forward` with arguments of transformers."""
    decoder = model.model.decoder
    parts = {"model": model, "stack": decoder, "layer": decoder.layers[0], "attention": decoder.layers[0].self_attn}
    encoder = model.model.encoder
    parts |= {"base": model.model, "encoder": encoder, "encoder layer": encoder.layers[0]}
    ensemble = EnsembleForSeq2SeqLM([model])
    return parts | {"ensemble": ensemble, "ensemble's encoder": ensemble.encoder}


def call(part: str, module: torch.nn.Module, **kwargs):
    """Call a part of the model with what it needs, and more."""
    hidden_states = torch.ones(3, 1, 32)
    start = torch.full((3, 1), PAD)
    arguments = {
        "attention": (hidden_states,),
        "layer": (hidden_states,),
        "encoder layer": (hidden_states, None),
        "stack": (start,),
        "encoder": (start,),
        "ensemble's encoder": (start,),
    }.get(part, ())
    if part in ("model", "base", "ensemble"):
        kwargs = {**inputs_of(), "decoder_input_ids": start, **kwargs}
    return module(*arguments, **({"step": 0} if part == "attention" else {}), **kwargs)


# Names


@pytest.mark.parametrize("part", ["model", "base", "stack", "layer", "attention", "ensemble"])
def test_the_cache_has_the_name_that_transformers_gives_it(part):
    module = modules(rs_model())[part]
    assert CACHE in inspect.signature(module.forward).parameters
    cache, needed = new_cache(), {"use_cache": True} if part == "ensemble" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = call(part, module, **{CACHE: cache}, **needed)
    assert cache.get_seq_length() == 1
    if part not in ("layer", "attention"):
        assert output[CACHE] is cache


@pytest.mark.parametrize("part", ["model", "base", "stack", "layer", "attention", "ensemble"])
def test_both_names_are_taken_where_transformers_takes_both_and_one_elsewhere(part):
    module, stock = modules(rs_model())[part], MarianMTModel.forward
    cache, needed = new_cache(), {"use_cache": True} if part == "ensemble" else {}
    if CACHE == "past_key_values":
        with pytest.raises(TypeError, match="unexpected keyword argument 'cache'"):
            call(part, module, cache=cache, **needed)
        return
    assert CACHE in inspect.signature(stock).parameters
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated and will be removed in version 5.40.0"):
        call(part, module, past_key_values=cache, **needed)
    assert cache.get_seq_length() == 1


def test_two_caches_by_the_two_names_are_refused():
    if CACHE == "past_key_values":
        return
    model, inputs = rs_model(), {**inputs_of(), "decoder_input_ids": torch.full((3, 1), PAD)}
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        model(**inputs, past_key_values=new_cache(), cache=new_cache())
    for by_new_name in (cache := new_cache(), None):
        with pytest.warns(FutureWarning, match="Use `cache` instead"):
            assert model(**inputs, past_key_values=cache, cache=by_new_name).cache is cache
    # Its prefix would be passed over, and the translation be the model's without it.
    prefixed = get_peft_model(model, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PEFT's prefix tuning gives both"):
        prefixed.generate(**inputs_of(), max_new_tokens=2)


def test_generate_takes_the_cache_by_the_names_that_transformers_takes():
    model, inputs = rs_model(), inputs_of()
    expected = model.generate(**inputs, max_new_tokens=8)
    cache = new_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, **{CACHE: cache}), expected)
    assert cache.get_seq_length()
    if CACHE != "past_key_values":
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated .*6.0.0") as said:
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, past_key_values=new_cache()), expected)
        assert said[0].filename == __file__  # where the caller finds it
    assert inspect.signature(model.generate) == inspect.signature(MarianMTModel.generate.__get__(model))


def test_arguments_come_in_marians_order():
    ours = list(inspect.signature(RSMarianForConditionalGeneration.forward).parameters)
    marians = list(inspect.signature(MarianMTModel.forward).parameters)
    assert ours[: len(marians) - 1] == marians[:-1]  # then come our own, and the keyword arguments


def test_a_cached_step_equals_marians_and_the_same_step_without_a_cache():
    model, inputs = rs_model(), inputs_of()
    marian = unrolled_marian(model)
    target = batch()["labels"].clamp(min=1)
    logits = []
    for translator in (model, marian):
        first = translator(**inputs, decoder_input_ids=target[:, :4], use_cache=True)
        cached = translator(
            **inputs, encoder_outputs=(first[-1],), decoder_input_ids=target[:, 4:], **{CACHE: first[CACHE]}
        )
        logits += [cached.logits, translator(**inputs, decoder_input_ids=target, use_cache=False).logits[:, 4:]]
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-5, rtol=1e-5)


# Deprecations that our code is warned of are errors

OLD_NAME = """
import torch
from transformers.utils.deprecation import deprecate_kwarg

class Renamed(torch.nn.Module):
    @deprecate_kwarg("old", "99.0.0", new_name="new")
    def forward(self, new=None):
        return new

def call():
    Renamed()(old=1)
"""


@pytest.mark.parametrize(("file", "fails"), [("src/rs_transformer/x.py", True), ("tests/x.py", False)])
def test_a_deprecated_argument_is_an_error_where_our_code_gives_it(file, fails):
    code = compile(OLD_NAME, str(ROOT / file), "exec")
    exec(code, names := {})
    with pytest.raises(FutureWarning) if fails else pytest.warns(FutureWarning):
        names["call"]()


@pytest.mark.parametrize(
    ("start", "file", "fails"),
    [
        ((run, sys.executable), "src/rs_transformer/x.py", True),
        ((fork,), "src/rs_transformer/x.py", True),
        ((fork,), "tests/x.py", False),
    ],
    ids=["run", "forked", "forked-not-ours"],
)
def test_a_deprecated_argument_is_an_error_in_a_process_that_a_test_starts(start, file, fails):
    start, *interpreter = start
    done = start(*interpreter, "-c", f"exec(compile({OLD_NAME!r}, {str(ROOT / file)!r}, 'exec')); call()", check=False)
    assert bool(done.returncode) == fails
    assert "`old` is deprecated" in done.stderr


# Nothing is swallowed


@pytest.mark.parametrize("part", sorted(modules(rs_model())))
def test_an_unknown_argument_is_a_type_error_that_names_it(part):
    module = modules(rs_model())[part]
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'key_value_store'"):
        call(part, module, key_value_store=new_cache())
    call(part, module, key_value_store=None)  # as transformers passes what it has not


@pytest.mark.parametrize("part", sorted(modules(rs_model()).keys() - {"layer", "attention", "encoder layer"}))
def test_transformers_own_arguments_are_taken(part):
    more = {"debug_io": False, "debug_io_dir": "x", "prune_layers": False} if part in ("stack", "encoder") else {}
    call(part, modules(rs_model())[part], output_attentions=False, num_items_in_batch=3, return_dict=True, **more)


def test_what_generate_hands_on_is_taken(trained, source):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = load(RSMarianForConditionalGeneration, trained)
    for search in ({}, {"num_beams": 2}):
        stopped = model.generate(**source, **search, stop_strings=["c"], tokenizer=tokenizer)
        assert tokenizer.batch_decode(stopped, skip_special_tokens=True)[0].endswith("c")
    # As `Seq2SeqTrainer` with `predict_with_generate` does.
    assert torch.equal(model.generate(**source, labels=source["input_ids"]), model.generate(**source))


def test_the_cache_is_told_of_the_attentions_arguments_from_5_24_on(monkeypatch):
    told, update = [], DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **kwargs: told.append(kwargs) or update(*args, **kwargs))
    rs_model()(**inputs_of(), decoder_input_ids=torch.full((3, 1), PAD), is_causal=True, use_cache=True)
    assert len(told) == 12
    assert all(("kwargs" in kwargs) == (CACHE == "cache") for kwargs in told)


@pytest.mark.parametrize("part", sorted(modules(rs_model())))
def test_keyword_arguments_are_annotated_as_transformers_tools_read_them(part):
    kwargs = inspect.signature(modules(rs_model())[part].forward).parameters["kwargs"]
    assert kwargs.annotation == Unpack[TransformersKwargs]


# A transformers that is newer than any that was tested


def test_versions_tested_are_those_that_the_package_admits_and_is_pinned_to():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    oldest, newest = TESTED_TRANSFORMERS
    assert str(requirement.specifier) == f">={oldest}"
    assert f"transformers=={newest}\n" in (ROOT / "constraints.txt").read_text()
    assert Version(oldest) <= Version(transformers_version)


class Renamed(RSMarianForConditionalGeneration):
    """As our source was when 5.24 renamed the cache: `**kwargs` swallow it, and each step is decoded as the first."""

    def forward(self, *args, **kwargs):
        kwargs.pop(CACHE, None)
        return super().forward(*args, **kwargs)


class Refusing(RSMarianForConditionalGeneration):
    """As our source is, after another renaming: the cache is an argument that it does not know."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, key_value_store=kwargs.pop(CACHE, None), **kwargs)


class NotANumber(RSMarianForConditionalGeneration):
    """A cached step gives no finite logits."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if kwargs.get(CACHE) is not None:
            outputs.logits.fill_(torch.nan)
        return outputs


@pytest.fixture
def newer(monkeypatch, caplog):
    """A process that has translated nothing yet, on a transformers that is newer than the newest tested."""
    monkeypatch.setattr(generation, "TESTED_TRANSFORMERS", ("5.0.0", "5.0.0"))
    monkeypatch.setattr(generation, "cache_verdicts", {})
    logging.Logger.warning_once.cache_clear()
    # Scripts that ran in this process have given the package transformers' handlers, which tell caplog too.
    package = logging.getLogger("rs_transformer")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "propagate", True)
    return caplog


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "decodes without a cache" in r.getMessage()]


def load(kind: type, folder) -> RSMarianForConditionalGeneration:
    return kind.from_pretrained(folder).eval()


@pytest.fixture
def source(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    return tokenizer(["a b c d e", "f g h i"], return_tensors="pt", padding=True)


SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "configuration": {"generation_config": GenerationConfig(max_new_tokens=12, num_beams=2), "use_cache": True},
}
HOW = {
    Renamed: "gives other results than without",
    NotANumber: "gives other results than without",
    Refusing: r"fails \(TypeError: .*'key_value_store'",
}


@pytest.mark.parametrize("kind", HOW)
def test_a_cache_that_is_passed_over_is_noticed_and_the_translation_right(newer, trained, source, kind):
    right, model = AutoModelForSeq2SeqLM.from_pretrained(trained).eval(), load(kind, trained)
    for search in SEARCHES.values():
        expected = right.generate(**source, **search | {"use_cache": False})
        assert torch.equal(model.generate(**source, **search), expected)
    assert SEARCHES["configuration"]["generation_config"].use_cache is not False  # the caller's own
    (message,) = said(newer)
    assert f"transformers {transformers_version} is newer than 5.0.0" in message
    assert "install transformers==5.0.0" in message
    assert re.search(f"decoding with a cache {HOW[kind]}", message)


def test_what_the_check_catches_would_be_wrong_without_it(trained, source):
    expected = AutoModelForSeq2SeqLM.from_pretrained(trained).eval().generate(**source)
    assert not torch.equal(load(Renamed, trained).generate(**source), expected)


def test_assisted_generation_and_a_cache_of_the_callers_go_without_them(newer, trained, source):
    model, source = load(Renamed, trained), {name: tensor[:1] for name, tensor in source.items()}
    expected = load(RSMarianForConditionalGeneration, trained).generate(**source)
    draft = AutoModelForSeq2SeqLM.from_pretrained(trained, decoder_layers=1).eval()
    lookup = GenerationConfig(prompt_lookup_num_tokens=3)
    for options in ({"assistant_model": draft}, {"generation_config": lookup}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(**source, **options), expected)
    assert torch.equal(model.generate(**source, **{CACHE: new_cache()}), expected)
    assert torch.equal(model.generate(source["input_ids"], None, None, None, None, None, draft), expected)
    model.generation_config.prompt_lookup_num_tokens = 3
    assert torch.equal(model.generate(**source), expected)
    assert model.generation_config.prompt_lookup_num_tokens == 3


@pytest.mark.parametrize("own", [{"stop_strings": ["c"]}, {"assistant_early_exit": 2}, {"num_beams": 4, "top_k": 4}])
def test_a_models_own_way_of_generating_does_not_disturb_the_check(newer, trained, source, own):
    model = load(RSMarianForConditionalGeneration, trained)
    model.generation_config.update(**own)
    assert model._cache_is_right()
    assert generation.cache_verdicts == {RSMarianForConditionalGeneration: True}
    assert not said(newer)


def test_a_model_that_hardly_looks_back_clears_no_other(newer, trained, source):
    expected = load(RSMarianForConditionalGeneration, trained).generate(**source)
    blind = Renamed(rs_model().config).eval()
    blind.load_state_dict(rs_model().state_dict())
    blind.generate(**inputs_of(), max_new_tokens=2)
    assert Renamed not in generation.cache_verdicts
    assert torch.equal(load(Renamed, trained).generate(**source), expected)
    assert len(said(newer)) == 1


def test_a_right_cache_is_used_and_nothing_said(newer, trained, source):
    model = load(RSMarianForConditionalGeneration, trained)
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["decoder_input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(**source)
    # The check: two steps, then the second without a cache, whole and by itself. The translation, a token at a time.
    assert lengths[:4] == [1, 1, 2, 1]
    assert set(lengths[4:]) == {1}
    checked = len(lengths)
    model.generate(**source)
    assert len(lengths) == 2 * checked - 4
    assert not said(newer)


def test_nothing_is_checked_on_a_version_that_was_tested(newer, monkeypatch, trained, source):
    monkeypatch.setattr(generation, "TESTED_TRANSFORMERS", ("5.0.0", transformers_version))
    monkeypatch.setattr(generation.CheckedGenerationMixin, "_judge_cache", lambda self: pytest.fail("checked"))
    load(RSMarianForConditionalGeneration, trained).generate(**source)


def test_nothing_is_checked_under_compile_in_training_mode_without_a_cache_and_under_a_prefix_of_pefts(
    newer, monkeypatch, trained, source
):
    checked = []
    judge = lambda self: (checked.append(self) or True, None)  # noqa: E731
    monkeypatch.setattr(generation.CheckedGenerationMixin, "_judge_cache", judge)
    model = load(RSMarianForConditionalGeneration, trained)
    model.train().generate(**source)
    model.eval().generate(**source, use_cache=False)
    model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
    model.generate(**source)
    del model.prepare_inputs_for_generation
    forward, model.forward = model.forward, torch.compile(model.forward, backend="eager")
    model.generate(**source, max_new_tokens=2)
    torch.compiler.reset()
    assert not checked
    model.forward = forward
    model.generate(**source)
    assert checked == [model]


def test_eight_threads_that_start_at_once_check_once_and_translate_right(newer, monkeypatch, trained, source):
    judged, judge = [], generation.CheckedGenerationMixin._judge_cache
    monkeypatch.setattr(
        generation.CheckedGenerationMixin, "_judge_cache", lambda self: judged.append(judge(self)) or judged[-1]
    )
    model = load(Renamed, trained)
    expected = load(RSMarianForConditionalGeneration, trained).generate(**source, use_cache=False)
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda _: model.generate(**source), range(8)))
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(judged) == len(said(newer)) == 1


def test_an_offloaded_model_is_checked_and_used_as_it_is(newer, trained, source):
    expected = load(RSMarianForConditionalGeneration, trained).generate(**source)
    model = cpu_offload(load(RSMarianForConditionalGeneration, trained), execution_device="cpu")
    generation.cache_verdicts.clear()
    assert torch.equal(model.generate(**source), expected)
    assert generation.cache_verdicts == {RSMarianForConditionalGeneration: True}


def test_ensembles_are_checked_for_themselves(newer, trained, source):
    model = load(RSMarianForConditionalGeneration, trained)
    expected = model.generate(**source)
    ensemble = EnsembleForSeq2SeqLM([model]).eval()
    assert ensemble.can_generate()
    assert torch.equal(ensemble.generate(**source)[:, : expected.shape[1]], expected)
    assert generation.cache_verdicts == {RSMarianForConditionalGeneration: True, EnsembleForSeq2SeqLM: True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_told_from_a_fault(dtype, trained):
    deep = rs_config(d_model=128, decoder_layers=48, deepnorm=True, init_std=0.02)
    for model in (load(RSMarianForConditionalGeneration, trained), RSMarianForConditionalGeneration(deep).eval()):
        error, passed_over = model.to(dtype)._cached_step_errors()
        tolerance = model.cache_tolerance
        assert error < 0.5 * tolerance < 2 * tolerance < passed_over
