"""Learning from a teacher's distributions, hidden states and attention: losses, trainer, cache, ensemble."""

import math

import pytest
import torch
from datasets import Dataset
from oracle import batch, marian, rs_model
from torch.nn import functional as F

from rs_transformer.distillation.cache import DistillationCollator, cache_top_k
from rs_transformer.distillation.losses import (
    DistillationLossArguments,
    attention_loss,
    check_match,
    hidden_state_loss,
    layer_mapping,
    top_k_word_level_loss,
    word_level_loss,
)
from rs_transformer.distillation.trainer import DistillationTrainer
from rs_transformer.ensemble import EnsembleForSeq2SeqLM
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.losses import barred_tokens, label_smoothed_cross_entropy, label_smoothed_nll

EAGER = {"output_hidden_states": True, "output_attentions": True}


def forward(model, data, **options):
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(data["labels"])
    return model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False, **options)


def tempered(logits, temperature=1.0):
    return (logits / temperature).log_softmax(-1)


def one_by_one(logits, teacher_logits, labels, temperature, top_k=None):
    """The definition, token by token and entry by entry."""
    total = 0.0
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1]):
            if labels[row, position] == -100:
                continue
            given, wanted = logits[row, position] / temperature, teacher_logits[row, position] / temperature
            entries = range(len(given)) if top_k is None else wanted.argsort(descending=True)[:top_k].tolist()
            mass = sum(math.exp(wanted[entry]) for entry in entries)
            normaliser = math.log(sum(math.exp(value) for value in given))
            for entry in entries:
                total -= temperature**2 * math.exp(wanted[entry]) / mass * (float(given[entry]) - normaliser)
    return total


# Losses


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_word_level_loss_equals_its_definition(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 3, 4, 11, generator=generator).double()
    labels = torch.tensor([[3, 5, 1, -100], [2, -100, -100, -100], [7, 7, 0, 4]])
    loss = word_level_loss(tempered(logits, temperature), teacher_logits, labels, temperature)
    assert loss.item() == pytest.approx(one_by_one(logits, teacher_logits, labels, temperature), rel=1e-5)
    values, ids = teacher_logits.log_softmax(-1).topk(4)
    loss = top_k_word_level_loss(tempered(logits, temperature), ids, values, labels, temperature)
    assert loss.item() == pytest.approx(one_by_one(logits, teacher_logits, labels, temperature, top_k=4), rel=1e-5)
    values, ids = teacher_logits.log_softmax(-1).topk(11)
    whole = top_k_word_level_loss(tempered(logits, temperature), ids, values, labels, temperature)
    torch.testing.assert_close(
        whole, word_level_loss(tempered(logits, temperature), teacher_logits, labels, temperature)
    )


def test_word_level_loss_is_smallest_at_the_teachers_own_distribution():
    teacher_logits = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(0))
    logits = (teacher_logits + 3.0).requires_grad_()  # the same distribution
    labels = torch.tensor([[1, 2]])
    word_level_loss(tempered(logits, 2.0), teacher_logits, labels, 2.0).backward()
    assert logits.grad.abs().max() < 1e-6


def test_a_barred_token_gives_no_nan():
    logits, teacher_logits = torch.zeros(1, 1, 3, requires_grad=True), torch.tensor([[[0.0, 1.0, -math.inf]]])
    barred = logits + torch.tensor([0.0, 0.0, -math.inf])
    loss = word_level_loss(tempered(barred), teacher_logits, torch.tensor([[0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.isfinite(logits.grad).all()


def test_padding_contributes_nothing_to_any_loss():
    student, teacher = rs_model(seed=1), marian(seed=2)
    short = {name: tensor[1:2] for name, tensor in batch().items()}  # 5 of 9 source tokens
    short["labels"][0, 4:] = -100
    cut = {"input_ids": 5, "attention_mask": 5, "labels": 4}
    values = []
    for data in (short, {name: tensor[:, : cut[name]] for name, tensor in short.items()}):
        given, wanted = (forward(model, data, **EAGER) for model in eager(student, teacher))
        masks = {"encoder": data["attention_mask"].bool(), "decoder": data["labels"] != -100}
        mapping = list(range(6))
        values.append(
            [
                word_level_loss(tempered(given.logits), wanted.logits, data["labels"]),
                hidden_state_loss(
                    given.encoder_hidden_states, wanted.encoder_hidden_states, mapping, masks["encoder"]
                ),
                hidden_state_loss(
                    given.decoder_hidden_states, wanted.decoder_hidden_states, mapping, masks["decoder"]
                ),
                attention_loss(given.encoder_attentions, wanted.encoder_attentions, mapping, masks["encoder"]),
                attention_loss(given.decoder_attentions, wanted.decoder_attentions, mapping, masks["decoder"]),
                attention_loss(given.cross_attentions, wanted.cross_attentions, mapping, masks["decoder"]),
            ]
        )
    assert [value.item() for value in values[0]] == pytest.approx([value.item() for value in values[1]], rel=1e-4)
    assert min(value.item() for value in values[0]) > 1e-3


def eager(*models):
    for model in models:
        model.set_attn_implementation("eager")
    return models


def test_hidden_and_attention_losses_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    states, targets = ([torch.randn(2, 3, 5, generator=generator) for _ in range(4)] for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = 0.0
    for step, layer in ((0, 1), (2, 2)):  # step 1 is mapped to none
        for row, position in mask.nonzero().tolist():
            state, target = states[step + 1][row, position], targets[layer + 1][row, position]
            expected += float(((state - target) ** 2).mean() / ((target - target.mean()) ** 2).mean()) / 2
    assert hidden_state_loss(states, targets, [1, -1, 2], mask).item() == pytest.approx(expected, rel=1e-5)

    maps, wanted = ([torch.randn(2, 4, 3, 6, generator=generator).softmax(-1) for _ in range(2)] for _ in range(2))
    expected = 0.0
    for row, query in mask.nonzero().tolist():
        for head in range(4):
            p, q = wanted[0][row, head, query], maps[1][row, head, query]
            expected += float((p * (p / q).log()).sum()) / 4
    assert attention_loss(maps, wanted, [-1, 0], mask).item() == pytest.approx(expected, rel=1e-5)
    assert attention_loss(maps, maps, [0, 1], mask).item() == pytest.approx(0, abs=1e-6)
    assert hidden_state_loss(states, states, [0, 1, 2], mask).item() == 0


@pytest.mark.parametrize(
    ("steps", "layers", "mapping"), [(6, 6, [0, 1, 2, 3, 4, 5]), (2, 6, [2, 5]), (1, 6, [5]), (4, 2, [0, 0, 1, 1])]
)
def test_the_default_mapping_is_even_and_ends_at_the_last_layer(steps, layers, mapping):
    assert layer_mapping(None, steps, layers, "decoder") == mapping


def test_a_mapping_that_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match="decoder_layer_mapping needs an entry for each of the student's 2 steps, got 3"
    ):
        layer_mapping([0, 1, 2], 2, 6, "decoder")
    with pytest.raises(ValueError, match=r"encoder_layer_mapping holds the teacher's layers 0..5, or -1, got 6"):
        layer_mapping([0, 6], 2, 6, "encoder")


def test_shapes_that_cannot_be_matched_are_named():
    student = rs_model().config
    with pytest.raises(ValueError, match=r"hidden_weight needs equal widths, got d_model 32 \(student\) and 48"):
        check_match(student, rs_model(d_model=48).config, DistillationLossArguments(hidden_weight=1.0))
    teacher = rs_model(decoder_attention_heads=2).config
    with pytest.raises(ValueError, match="attention_weight needs equal decoder_attention_heads, got 4"):
        check_match(student, teacher, DistillationLossArguments(attention_weight=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"word_weight": 1.5}, "word_weight must be at least 0 and at most 1, got 1.5"),
        ({"word_temperature": 0.0}, "word_temperature must be more than 0, got 0.0"),
        ({"hidden_weight": -1.0}, r"hidden_weight must be at least 0, got -1.0"),
        ({"word_top_k": 8}, "word_top_k needs a word_weight above 0"),
    ],
)
def test_impossible_weights_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationLossArguments(**options)


# Trainer


def trainer(tokenizer, tmp_path, student, teacher, loss, **options):
    args = TranslationTrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1, **options
    )
    return DistillationTrainer(student.train(), args, processing_class=tokenizer, distillation=loss, teacher=teacher)


ALL = DistillationLossArguments(
    word_weight=0.6, word_temperature=2.0, hidden_weight=0.3, attention_weight=0.2, decoder_layer_mapping=[2, -1, 5]
)


def test_loss_is_the_weighted_sum_and_its_gradient_reaches_the_student_alone(tokenizer, tmp_path):
    student, teacher = rs_model(seed=1, decoder_layers=3), marian(seed=2)
    data = batch()
    data["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(data["labels"])
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distilling = trainer(tokenizer, tmp_path, student, teacher, ALL)
    loss = distilling.compute_loss(student, dict(data))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    moved = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    assert any("encoder.layers.0" in name for name in moved)
    assert any("decoder.layers.0" in name for name in moved)
    assert not teacher.training

    with torch.no_grad():
        given, wanted = (forward(model, data, **EAGER) for model in (student, teacher))
    labels, masks = data["labels"], {"encoder": data["attention_mask"].bool(), "decoder": data["labels"] != -100}
    mappings = {"encoder": list(range(6)), "decoder": [2, -1, 5]}
    items = (labels != -100).sum()
    pad = tokenizer.pad_token_id
    log_probs, barred = given.logits.log_softmax(-1), barred_tokens(student, pad)  # the model's own padding is another
    plain = label_smoothed_nll(log_probs, labels, 0.1, pad, barred) / items
    word = word_level_loss(tempered(given.logits, 2.0), wanted.logits, labels, 2.0) / items
    hidden = sum(
        hidden_state_loss(given[f"{side}_hidden_states"], wanted[f"{side}_hidden_states"], mappings[side], masks[side])
        for side in ("encoder", "decoder")
    )
    attention = sum(
        attention_loss(given[name], wanted[name], mappings[side], masks[side])
        for name, side in (
            ("encoder_attentions", "encoder"),
            ("decoder_attentions", "decoder"),
            ("cross_attentions", "decoder"),
        )
    )
    expected = 0.4 * plain + 0.6 * word + 0.3 * hidden / 2 / items + 0.2 * attention / 3 / items
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    padded = labels.masked_fill(labels == -100, tokenizer.pad_token_id)
    assert distilling.compute_loss(student, data | {"labels": padded}).item() == pytest.approx(loss.item(), rel=1e-5)


def test_tempering_and_r_drop_go_with_a_teacher(tokenizer, tmp_path):
    student, teacher = rs_model(seed=1, decoder_layers=3), marian(seed=2)
    data = batch()
    data["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(data["labels"])
    options = {"softmax_temperature": 2.0, "r_drop_alpha": 5.0}
    plain, regularized = (trainer(tokenizer, tmp_path, student, teacher, ALL, **each) for each in ({}, options))
    found = regularized.compute_loss(student, regularized._prepare_inputs(dict(data)))
    logits = forward(student, data).logits
    # Without dropout two passes are one; the references' part is tempered, the teacher's has its own temperature.
    labels, pad = data["labels"], tokenizer.pad_token_id
    cross_entropies = [t * label_smoothed_cross_entropy(logits / t, labels, 0.1, pad) for t in (1.0, 2.0)]
    change = 0.4 * (cross_entropies[1] - cross_entropies[0])
    assert found.item() == pytest.approx((plain.compute_loss(student, dict(data)) + change).item(), rel=1e-5)


def test_evaluation_loss_is_the_plain_cross_entropy(tokenizer, tmp_path):
    student, teacher = rs_model(seed=1), marian(seed=2)
    data = batch()
    data["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(data["labels"])
    distilling = trainer(tokenizer, tmp_path, student, teacher, DistillationLossArguments(word_weight=0.5))
    student.eval()
    with torch.no_grad():
        loss = distilling.compute_loss(student, dict(data))
        expected = F.cross_entropy(forward(student, data).logits.flatten(0, 1), data["labels"].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [ALL, DistillationLossArguments(word_weight=1.0)], ids=["all", "word"])
def test_gradient_of_parts_is_that_of_the_large_batch(tokenizer, tmp_path, loss):
    student, teacher = rs_model(seed=1, decoder_layers=3), marian(seed=2)
    distilling = trainer(tokenizer, tmp_path, student, teacher, loss)
    data = batch()
    data["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(data["labels"])
    items = (data["labels"] != -100).sum()

    def gradient(parts):
        student.zero_grad()
        for rows in parts:
            part = {name: tensor[rows] for name, tensor in data.items()}
            distilling.compute_loss(student, part, num_items_in_batch=items).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    whole, parts = gradient([[0, 1, 2]]), gradient([[0], [1, 2]])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


def test_start_embedding_stays_at_zero_under_a_teacher(tokenizer, models_of_the_tokenizer, tmp_path):
    teacher, student = models_of_the_tokenizer
    pairs = {"input_ids": tokenizer(["a b c"])["input_ids"], "labels": tokenizer(text_target=["c b a"])["input_ids"]}
    data = {name: torch.tensor(rows) for name, rows in pairs.items()}
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["decoder_input_ids"] = student.prepare_decoder_input_ids_from_labels(data["labels"])
    distilling = trainer(tokenizer, tmp_path, student, teacher, DistillationLossArguments(word_weight=0.5))
    distilling.compute_loss(student, dict(data)).backward()
    assert not student.model.shared.weight[tokenizer.pad_token_id].any()
    assert not student.model.shared.weight.grad[tokenizer.pad_token_id].any()


def test_distributions_that_are_kept_are_of_one_segmentation(tokenizer, tmp_path):
    loss = DistillationLossArguments(word_weight=0.5, word_top_k=4)
    with pytest.raises(ValueError, match="word_top_k keeps the distributions of one segmentation"):
        trainer(tokenizer, tmp_path, rs_model(), marian(), loss, subword_sampling=0.1)


def test_a_teacher_that_is_needed_and_missing_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        trainer(tokenizer, tmp_path, rs_model(), None, DistillationLossArguments(word_weight=0.5))


# Cache


def test_cached_distributions_give_the_loss_of_the_running_teacher(tokenizer, models_of_the_tokenizer, tmp_path):
    teacher, student = models_of_the_tokenizer
    pairs = [(f"{a} {b} c", f"c {b} {a}") for a in "abcdef" for b in "ghijkl"] + [("a b c d e", "e d c b a")]
    rows = {
        "input_ids": [tokenizer(source)["input_ids"] for source, _ in pairs],
        "labels": [tokenizer(text_target=target)["input_ids"] for _, target in pairs],
    }
    dataset = Dataset.from_dict(rows)
    size = teacher.config.vocab_size
    options = {"teacher_digest": "t", "max_tokens": 64, "shard_size": 10}
    cached = cache_top_k(dataset, teacher, tokenizer, size, tmp_path / "all.parquet", **options)
    features = [cached[index] for index in (0, 36, 5)]  # of different lengths
    collated = DistillationCollator(tokenizer, model=student)([dict(feature) for feature in features])
    assert collated["teacher_ids"].shape == (*collated["labels"].shape, size)
    losses = []
    for top_k in (0, size):
        distilling = trainer(
            tokenizer, tmp_path, student, teacher, DistillationLossArguments(word_weight=1.0, word_top_k=top_k)
        )
        data = {name: tensor for name, tensor in collated.items() if top_k or not name.startswith("teacher")}
        losses.append(distilling.compute_loss(student, data).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the cache is in half precision

    with pytest.raises(ValueError, match="was made with top_k=28, now it is 4"):
        cache_top_k(dataset, teacher, tokenizer, 4, tmp_path / "all.parquet", **options)


@pytest.fixture
def models_of_the_tokenizer(tokenizer):
    size = len(tokenizer)
    fields = {"vocab_size": size, "decoder_vocab_size": size, "pad_token_id": size - 1}
    fields["decoder_start_token_id"] = size - 1
    return marian(seed=4, **fields), rs_model(seed=5, **fields)


# Ensemble


SEARCHES = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 4},
    "n-best": {"num_beams": 4, "num_return_sequences": 3},
}
SEARCH = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())


def decode(model, search, **options):
    data = batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**inputs, max_length=12, **search, **options).tolist()


@SEARCH
def test_an_ensemble_of_one_model_twice_decodes_like_the_model(search):
    model = rs_model(seed=1)
    assert decode(EnsembleForSeq2SeqLM([model, model]).eval(), search) == decode(model, search)


@SEARCH
def test_an_ensembles_cached_search_equals_that_without_a_cache_in_any_order(search):
    models = [rs_model(seed=1), marian(seed=2, d_model=48, decoder_layers=6), rs_model(seed=3, decoder_layers=2)]
    outputs = [decode(EnsembleForSeq2SeqLM(models).eval(), search, use_cache=cache) for cache in (True, False)]
    outputs.append(decode(EnsembleForSeq2SeqLM(models[::-1]).eval(), search))
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0] not in [decode(model, search) for model in models]


def test_an_ensemble_names_the_cache_that_it_cannot_have():
    with pytest.raises(ValueError, match="decodes with a dynamic cache, not a StaticCache: leave cache_impl"):
        decode(EnsembleForSeq2SeqLM([rs_model(0), rs_model(1)]).eval(), {}, cache_implementation="static")


def test_an_ensembles_distribution_is_the_mean_of_the_models():
    models, data = [rs_model(seed=1), rs_model(seed=2)], batch()
    with torch.no_grad():
        mean = torch.stack([forward(model, data).logits.softmax(-1) for model in models]).mean(0)
        ensemble = EnsembleForSeq2SeqLM(iter(models)).eval()
        given = forward(ensemble, data).logits.exp()
    torch.testing.assert_close(given, mean)
    with pytest.raises(ValueError, match="an ensemble has no loss"):
        ensemble(**data)


def test_models_that_cannot_decode_together_are_named():
    with pytest.raises(ValueError, match=r"must have one vocabulary, got sizes \[48, 50\]"):
        EnsembleForSeq2SeqLM([rs_model(), rs_model(vocab_size=50, decoder_vocab_size=50)])
    with pytest.raises(ValueError, match="must agree in pad_token_id"):
        EnsembleForSeq2SeqLM([rs_model(), rs_model(pad_token_id=3)])
