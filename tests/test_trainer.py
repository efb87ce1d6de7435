"""Batches, loss, checkpoints: what TranslationTrainer promises beyond Seq2SeqTrainer."""

import gc
import json
import math
import multiprocessing
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKPOINTING, RECIPE, ROOT, losses, run, script, task_options
from datasets import Dataset, IterableDataset
from forked import fork
from hypothesis import example, given, settings
from hypothesis import strategies as st
from killing import kill
from oracle import PAD, batch, rs_model, unrolled_marian
from peft import LoraConfig, get_peft_model
from reverse_task import reverse_pairs
from safetensors.torch import load_file
from torch import nn
from transformers import DataCollatorForSeq2Seq

from rs_transformer.checkpoints import load_translator
from rs_transformer.commands.train import set_search, shuffled
from rs_transformer.corpus import CorpusArguments, prepare_training_pairs
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.subword_sampling import SubwordSampler
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.batches import SetEpochCallback, TokenBatchSampler
from rs_transformer.training.losses import barred_tokens, label_smoothed_cross_entropy, symmetric_divergence
from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.training.progress import log_line
from rs_transformer.training.run_folder import (
    average_checkpoints,
    complete_checkpoints,
    is_finished,
)
from rs_transformer.training.trainer import TranslationTrainer

FUZZ = settings(deadline=None, derandomize=True, database=None)
LENGTHS = [3 + (7 * index) % 11 for index in range(500)]


# Token budget


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_token_batches_hold_every_pair_once_within_the_budget(processes):
    sampler = TokenBatchSampler(LENGTHS, max_tokens=60, num_processes=processes, seed=5)
    shares = list(sampler)
    assert len(shares) == len(sampler)
    assert len(sampler) % processes == 0
    assert sorted(index for share in shares for index in share) == list(range(500))
    for start in range(0, len(shares), processes):
        indices = [index for share in shares[start : start + processes] for index in share]
        longest = max(LENGTHS[index] for index in indices)
        assert longest * len(indices) <= 60 * processes
        assert longest - min(LENGTHS[index] for index in indices) <= 1  # little padding
    assert all(share for share in shares)


@FUZZ
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    room=st.integers(0, 100),
    processes=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
@example([10] * 20 + [100], 0, 2, 0)
@example([100] * 3, 0, 2, 0)
@example([1, 1, 1, 50, 50, 50, 50, 50], 0, 3, 0)
def test_shares_hold_the_bound_for_any_lengths_budget_and_number_of_processes(lengths, room, processes, epoch):
    if len(lengths) < processes:
        lengths = lengths * processes
    budget = max(lengths) + room
    sampler = TokenBatchSampler(lengths, budget, num_processes=processes, seed=1)
    number = len(list(sampler))
    sampler.set_epoch(epoch)
    shares = list(sampler)
    assert len(shares) == len(sampler) == number
    assert number % processes == 0
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    assert all(share for share in shares)
    for share in shares:
        longest = max(lengths[index] for index in share)
        assert longest * len(share) <= budget + longest
    if processes == 1:
        assert all(max(lengths[index] for index in share) * len(share) <= budget for share in shares)


@FUZZ
@given(lengths=st.lists(st.integers(1, 40), min_size=60, max_size=120), processes=st.integers(2, 4))
def test_batches_are_those_of_one_process_where_each_has_a_sentence_for_every_process(lengths, processes):
    one = list(TokenBatchSampler(lengths, 50 * processes, seed=5))
    if all(len(batch) >= processes for batch in one):
        several = list(TokenBatchSampler(lengths, 50, num_processes=processes, seed=5))
        shares = [several[start : start + processes] for start in range(0, len(several), processes)]
        assert [[index for share in batch for index in share] for batch in shares] == one


def test_token_batches_of_two_processes_are_those_of_one_with_twice_the_budget():
    one = list(TokenBatchSampler(LENGTHS, max_tokens=120, seed=5))
    two = list(TokenBatchSampler(LENGTHS, max_tokens=60, num_processes=2, seed=5))
    assert [set(batch) for batch in one] == [
        set(first) | set(second) for first, second in zip(two[::2], two[1::2], strict=True)
    ]


def test_token_batches_are_shuffled_by_seed_and_epoch_and_constant_in_number():
    sampler = TokenBatchSampler(LENGTHS, max_tokens=60, seed=5)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert first != second
    assert len(first) == len(second)


def test_a_pair_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="4 processes cannot share 3 training pairs"):
        TokenBatchSampler([5, 6, 7], max_tokens=60, num_processes=4)
    with pytest.raises(ValueError, match=r"max_tokens=12 is less than the longest training pair \(13 tokens\)"):
        TokenBatchSampler(LENGTHS, max_tokens=12)


# Loss


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_label_smoothing_equals_torchs_over_the_vocabulary_without_padding(epsilon):
    logits = torch.randn(2, 5, 9, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100, 8], [4, 5, 6, 7, 0]])  # padded by the padding token, too
    loss = label_smoothed_cross_entropy(logits, labels, epsilon, pad_token_id=8)
    normalised = nn.functional.log_softmax(logits, dim=-1)[..., :8]
    nll = -normalised.gather(-1, labels.clamp(0, 7)[..., None])[..., 0]
    expected = (1 - epsilon) * nll - epsilon * normalised.mean(-1)
    targets = (labels != -100) & (labels != 8)
    torch.testing.assert_close(loss, expected[targets].mean())
    parts = [label_smoothed_cross_entropy(logits[i], labels[i], epsilon, 8, targets.sum()) for i in range(2)]
    torch.testing.assert_close(sum(parts), loss)
    plain = label_smoothed_cross_entropy(logits, labels, epsilon)
    torch_loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=epsilon)
    torch.testing.assert_close(plain, torch_loss)


def test_label_smoothing_leaves_the_start_embedding_at_zero():
    model = rs_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for seed in range(3):
        inputs = batch(seed)
        loss = label_smoothed_cross_entropy(model(**inputs).logits, inputs["labels"], 0.1, pad_token_id=PAD)
        assert loss < 20  # the barred logit of padding does not leak into it
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.count_nonzero(model.model.shared.weight[PAD]) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_padding_among_the_labels_is_neither_learned_nor_counted(tokenizer, tmp_path, epsilon):
    pairs = reverse_pairs(8, seed=4)
    columns = [tokenizer([source for source, _ in pairs]), tokenizer(text_target=[target for _, target in pairs])]
    dataset = Dataset.from_dict({"input_ids": columns[0]["input_ids"], "labels": columns[1]["input_ids"]})
    options = {"label_smoothing_factor": epsilon, "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {"per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "use_cpu": True}
    logged = []
    for padding in (-100, tokenizer.pad_token_id):
        model = rs_model(**config_from_tokenizer(tokenizer))
        trainer = TranslationTrainer(
            model,
            TranslationTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **options),
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=padding),
        )
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert not model.model.shared.weight[tokenizer.pad_token_id].any()
    assert logged[0] == logged[1]


# The trainer in a program, with a model that has learned nothing


PAIRS = reverse_pairs(60, seed=7)


@pytest.fixture
def small(tmp_path, tokenizer):
    """Makes trainers of a small model; the same one each time."""

    def make(model=None, tokenizer=tokenizer, **options):
        own = ("eval_dataset", "train_dataset", "decoding", "compute_metrics", "compute_loss_func", "data_collator")
        fields = {name: options.pop(name) for name in own if name in options}
        size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "encoder_layers": 2}
        start = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = model or rs_model(**size, **start, decoder_layers=2, dropout=0.1)
        options = {"output_dir": tmp_path / "run", "report_to": "none", "seed": 5, "disable_tqdm": True} | options
        options = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1} | options
        ids, labels = (tokenizer(list(side))["input_ids"] for side in zip(*PAIRS, strict=True))
        lengths = [max(map(len, pair)) for pair in zip(ids, labels, strict=True)]
        train = Dataset.from_dict({"input_ids": ids, "labels": labels, "length": lengths})
        fields = {"decoding": DecodingArguments(num_beams=1, max_new_tokens=8), "train_dataset": train} | fields
        args = TranslationTrainingArguments(**options)
        return TranslationTrainer(model, args, processing_class=tokenizer, **fields)

    return make


def text(pairs):
    return Dataset.from_dict({"source": [source for source, _ in pairs], "target": [target for _, target in pairs]})


def ids(pairs, tokenizer):
    """Without text, so that nothing is translated."""
    encoded = [tokenizer(source, text_target=target) for source, target in pairs]
    return Dataset.from_list([dict(row) for row in encoded])


def token_loss(model, tokenizer, pairs):
    """The mean cross-entropy of all target tokens, sentence by sentence."""
    nll, tokens = 0.0, 0
    for source, target in pairs:
        labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(**tokenizer(source, return_tensors="pt"), labels=labels).logits
        nll += nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        tokens += labels.numel()
    return nll / tokens


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in second) and first.keys() == second.keys()


def test_predict_scores_the_dataset_that_it_is_given(small, trained):
    model, tokenizer = load_translator(str(trained))
    trainer = small(model, tokenizer, eval_dataset=text([(source, source) for source, _ in PAIRS[:8]]))
    test, sources = text(PAIRS[:12]), text(PAIRS[:12]).remove_columns("target")
    first = trainer.predict(test)
    assert first.metrics["test_bleu"] > 90
    assert len(first.predictions[0]) == len(first.label_ids) == 12
    assert trainer.evaluate()["eval_bleu"] < 50
    again = trainer.predict(test)
    assert again.metrics["test_bleu"] == first.metrics["test_bleu"]
    assert again.metrics["test_loss"] == trainer.evaluate(test)["eval_loss"]
    translations = translate(model, tokenizer, sources["source"][:], trainer.decoding)
    assert trainer.translations == translations
    trainer.args.predict_with_generate = True
    for dataset in (test, sources):
        output = trainer.predict(dataset)
        assert ("test_bleu" in output.metrics) == ("test_loss" in output.metrics) == (dataset is test)
        assert trainer.translations == translations
        assert tokenizer.batch_decode(output.predictions, skip_special_tokens=True) == translations


def test_several_validation_sets_are_scored_by_name_and_choose_the_best_model(small):
    sets = {"one": text(PAIRS[:3]), "two": text(PAIRS[3:9])}
    trainer = small(eval_dataset=sets, max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="no")
    metrics = trainer.evaluate()
    assert {f"eval_{name}_{score}" for name in sets for score in ("loss", "bleu", "chrf")} <= metrics.keys()
    assert {name: len(found) for name, found in trainer.translations.items()} == {"one": 3, "two": 6}
    assert trainer.evaluate("two")["eval_loss"] == metrics["eval_two_loss"]
    assert trainer.evaluate({"three": sets["two"]})["eval_three_loss"] == metrics["eval_two_loss"]
    assert trainer.evaluate(sets["two"])["eval_loss"] == metrics["eval_two_loss"]
    trainer.train()
    assert trainer.state.log_history[-2]["eval_two_bleu"] >= 0
    with pytest.raises(ValueError, match=r"metric_for_best_model must be one of one_loss, .*two_chrf, got 'bleu'"):
        small(eval_dataset=sets, metric_for_best_model="bleu")
    with pytest.raises(ValueError, match="metric_for_best_model must be one of loss, bleu, chrf, got 'blue'"):
        small(eval_dataset=sets["one"], metric_for_best_model="blue")
    alone = {"one": sets["one"], "ids": ids(PAIRS[:3], trainer.processing_class)}
    with pytest.raises(ValueError, match="must be one of one_loss, one_bleu, one_chrf, ids_loss, got 'ids_bleu'"):
        small(eval_dataset=alone, metric_for_best_model="ids_bleu")
    line = log_line(metrics | {"epoch": 1.0}, 1, 2)
    figures = " ".join(rf" {name}_{score} [\d.]+ ?" for name in sets for score in ("loss", "bleu", "chrf"))
    assert re.fullmatch(rf"update 1 of 2  validation:{figures}  epoch 1.00", line)


def test_the_trainer_goes_on_from_the_last_checkpoint_that_is_complete(small, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    small(**options, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "checkpoint_complete.json").unlink()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()  # as a kill leaves it
    trainer = small(**options, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        small(max_steps=1, output_dir=str(tmp_path / "empty")).train(resume_from_checkpoint=True)


def test_the_search_of_one_evaluation_can_be_another(small):
    trainer = small(eval_dataset={"set": text(PAIRS[:4])})
    for search in ({"max_new_tokens": 1}, {"max_length": 2, "num_beams": 2}):
        trainer.evaluate(**search)
        assert max(len(line.split()) for line in trainer.translations["set"]) <= 1
    trainer.evaluate()
    assert max(len(line.split()) for line in trainer.translations["set"]) > 1
    with pytest.raises(TypeError, match=r"the search takes max_length, num_beams, .*; not temperature"):
        trainer.evaluate(temperature=2.0)


def test_workers_that_stay_do_not_hand_out_the_dataset_of_before(small):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer, plain = (small(eval_dataset=text(PAIRS[:4]), **more) for more in (options, {}))
    trainer.evaluate()
    assert trainer.evaluate(text(PAIRS[4:10]))["eval_loss"] == plain.evaluate(text(PAIRS[4:10]))["eval_loss"]
    gc.collect()
    assert not multiprocessing.active_children()  # nor do they outlive the evaluation


def test_the_loss_of_an_evaluation_is_that_of_its_tokens_in_any_batches(small, tokenizer):
    pairs = ids(PAIRS, tokenizer)
    found = [small(per_device_eval_batch_size=size).evaluate(pairs)["eval_loss"] for size in (1, 7, 60, 64)]
    assert found == pytest.approx([token_loss(small().model.eval(), tokenizer, PAIRS)] * 4, rel=1e-5)


def test_tokens_that_a_bias_bars_take_no_part_in_the_smoothing(small):
    losses = []
    for barred in ([], [3, 4]):
        trainer = small(label_smoothing_factor=0.1)
        model = trainer.model.train()
        model.final_logits_bias[:, barred] = -math.inf
        trainer._barred = barred_tokens(model, trainer.pad_token_id)
        labels = torch.tensor([[5, 6, 7]])
        logits = torch.zeros(1, 3, model.config.vocab_size) + model.final_logits_bias
        losses.append(trainer.translation_loss({"logits": logits}, labels).item())
        size = model.config.vocab_size - 1 - len(barred)
        assert losses[-1] == pytest.approx(math.log(size), rel=1e-5)
    plain = small()
    assert barred_tokens(plain.model, plain.pad_token_id) is None  # padding alone costs nothing


def test_of_a_model_that_grows_no_checkpoint_of_less_depth_is_averaged(small, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "average_checkpoints": 4}
    trainer = small(**options, growing_depths=[1], growing_updates=[3])
    trainer.train()
    assert trainer.weights_from == "the average of checkpoint-4, checkpoint-5"


@pytest.mark.parametrize(("temperature", "alpha"), [(2.5, 0.0), (1.0, 4.0), (2.0, 3.0)])
def test_tempering_and_r_drop_give_the_gradients_of_their_papers_formulas(small, temperature, alpha):
    trainer = small(softmax_temperature=temperature, r_drop_alpha=alpha, label_smoothing_factor=0.0)
    model, pad = trainer.model, trainer.pad_token_id
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.3
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    pairs = inputs["labels"].shape[0] // (2 if alpha else 1)
    assert torch.equal(inputs["labels"][:pairs], inputs["labels"][-pairs:])
    items = int((inputs["labels"][:pairs] != -100).sum())

    def gradients(loss_of):
        torch.manual_seed(3)
        model.zero_grad()
        loss_of().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def formula():
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        logits = model(**given, decoder_input_ids=decoder_input_ids, use_cache=False).logits
        targets = inputs["labels"].masked_fill(inputs["labels"] == pad, -100)
        nll = nn.functional.cross_entropy((logits / temperature).flatten(0, 1), targets.flatten(), reduction="sum")
        loss = temperature * nll
        if alpha:
            mask = targets[:pairs] != -100
            p, q = (each[mask].log_softmax(-1) for each in logits.chunk(2))
            divergence = nn.functional.kl_div(q, p, log_target=True, reduction="sum")
            divergence = divergence + nn.functional.kl_div(p, q, log_target=True, reduction="sum")
            assert divergence > 0  # the passes differ
            loss = (loss + alpha / 2 * divergence) / 2
        return loss / items

    found, expected = (
        gradients(lambda: trainer.compute_loss(model, inputs, num_items_in_batch=items)),
        gradients(formula),
    )
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    model.eval()
    pairs = ids(PAIRS[:8], trainer.processing_class)
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(small().evaluate(pairs)["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_full_depth_teaches_the_one_that_was_drawn(small, alpha):
    trainer = small(elastic_decoder_layers=1, elastic_teaching=0.3, r_drop_alpha=alpha, label_smoothing_factor=0.1)
    plain = small(r_drop_alpha=alpha, label_smoothing_factor=0.1)
    model = trainer.model.eval()  # without dropout, but in training
    for each in (trainer, plain):
        each.model.training = True
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    items = 20
    while trainer.depth_schedule.depths(trainer.state.global_step)["decoder_depth"] == 2:
        trainer.state.global_step += 1

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients(trainer.compute_loss(model, inputs, num_items_in_batch=items))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    full, drawn = (model(**given, decoder_depth=depth, use_cache=False).logits for depth in (2, 1))
    losses = [plain.translation_loss({"logits": logits}, inputs["labels"], items) for logits in (full, drawn)]
    mask = (inputs["labels"] != -100) & (inputs["labels"] != trainer.pad_token_id)
    wanted, taught = full.detach()[mask].log_softmax(-1), drawn[mask].log_softmax(-1)
    divergence = nn.functional.kl_div(taught, wanted, log_target=True, reduction="sum") / items / (2 if alpha else 1)
    expected = gradients((losses[0] + 0.7 * losses[1] + 0.3 * divergence) / 2)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    # An update at full depth is an ordinary one.
    while trainer.depth_schedule.depths(trainer.state.global_step)["decoder_depth"] == 1:
        trainer.state.global_step += 1
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    assert loss.item() == pytest.approx(losses[0].item(), rel=1e-5)
    with pytest.raises(ValueError, match="elastic_teaching needs elastic_encoder_layers or elastic_decoder_layers"):
        small(elastic_teaching=0.5)


def test_frozen_embeddings_take_no_part_in_the_norm_that_gradients_are_clipped_by(small):
    norms = {}
    for frozen in (0, 1):
        trainer = small(max_steps=1, frozen_embedding_updates=frozen, lr_scheduler_type="constant")
        parameters, seen = dict(trainer.model.named_parameters()), {}
        trainer.create_optimizer().register_step_pre_hook(
            lambda *_, seen=seen, parameters=parameters: seen.update(
                {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}
            )
        )
        trainer.train()
        norms[frozen] = trainer.state.log_history[0]["grad_norm"]
        assert ("model.shared.weight" in seen) != bool(frozen)
        assert torch.nn.utils.get_total_norm(list(seen.values())).item() == pytest.approx(1.0, rel=1e-4)
    assert norms[1] < 0.9 * norms[0]


def test_options_of_the_loader_hold_for_token_batches_too(small):
    loader = small(max_tokens=64, dataloader_num_workers=1, dataloader_prefetch_factor=3).get_train_dataloader()
    assert (loader.prefetch_factor, loader.num_workers) == (3, 1)
    orders = [
        list(small(max_tokens=64, **seeds).get_train_dataloader().batch_sampler) for seeds in ({"data_seed": 9}, {})
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("batches", [{"max_tokens": 64}, {"per_device_train_batch_size": 5}])
def test_pairs_are_segmented_anew_in_each_epoch_within_the_budget(small, tokenizer, batches):
    corpus = CorpusArguments(source_lang="fw", target_lang="bw", max_source_length=14, max_target_length=14)
    sampling = SubwordSampler(tokenizer, 0.4)
    train = prepare_training_pairs(text(PAIRS), tokenizer, corpus, sampling=sampling)

    def epochs(**options):
        trainer = small(train_dataset=train, subword_sampling=0.4, num_train_epochs=2, **batches, **options)
        loader, callback = trainer.get_train_dataloader(), trainer.pop_callback(SetEpochCallback)
        for epoch in range(2):
            trainer.segmentation.set_epoch(epoch)
            if callback is not None:
                callback.on_epoch_begin(trainer.args, SimpleNamespace(epoch=epoch), None)
            yield [{name: tensor.tolist() for name, tensor in each.items()} for each in loader]

    first, second = epochs()
    read = []
    for epoch in (first, second):
        rows = [row for each in epoch for row in zip(each["input_ids"], each["labels"], strict=True)]
        labels = [[tokenizer.pad_token_id if index == -100 else index for index in row[1]] for row in rows]
        decoded = tokenizer.batch_decode(labels, skip_special_tokens=True)
        assert sorted(decoded) == sorted(target for _, target in PAIRS)
        read.append({target: source for target, (source, _) in zip(decoded, rows, strict=True)})
        for each in epoch:
            longest = max(len(each["input_ids"][0]), len(each["labels"][0]))
            assert longest <= 14
            assert "max_tokens" not in batches or longest * len(each["labels"]) <= 64
    assert read[0] != read[1]
    assert list(epochs()) == [first, second]
    assert list(epochs(dataloader_num_workers=1, dataloader_persistent_workers=True)) == [first, second]
    assert next(epochs(data_seed=8)) != first


def test_what_cannot_be_segmented_by_chance_is_said_before_the_training(small):
    with pytest.raises(ValueError, match="the training pairs need columns source, target, length, as"):
        small(subword_sampling=0.1)
    with pytest.raises(ValueError, match="subword_sampling must be more than 0 and at most 1, got 0"):
        small(subword_sampling=0.0)
    stream = iter([{"input_ids": [1], "labels": [1]}])
    with pytest.raises(ValueError, match="the training pairs need columns source, target, length, as"):
        small(train_dataset=IterableDataset.from_generator(lambda: stream), subword_sampling=0.1, max_steps=1).train()
    for options in ({"r_drop_alpha": 1.0}, {"elastic_teaching": 0.5, "elastic_decoder_layers": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is of the trainer's own loss, not of another"):
            small(**options, compute_loss_func=lambda *_: None)
    assert small(compute_loss_func=None, data_collator=None).compute_loss_func is not None


def test_a_stream_is_segmented_anew_each_time_that_it_is_gone_through(small, tokenizer, monkeypatch):
    corpus = CorpusArguments(source_lang="fw", target_lang="bw")
    stream = text(PAIRS[:8]).to_iterable_dataset()
    train = prepare_training_pairs(stream, tokenizer, corpus, sampling=SubwordSampler(tokenizer, 0.4))
    trainer = small(train_dataset=train, subword_sampling=0.4, max_steps=6)
    seen, collate = [], trainer.segmentation.collate
    trainer.segmentation.collate = lambda features: seen.append(features[0]["input_ids"]) or collate(features)
    trainer.train()
    assert len(seen) >= 6  # of two batches each time
    assert len({tuple(ids) for ids in seen[::2]}) > 1


def test_a_barred_token_has_no_part_in_the_divergence_of_two_passes():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100]] * 2)
    barred = torch.cat([logits, torch.full((2, 3, 1), -math.inf)], dim=-1).requires_grad_()
    expected = symmetric_divergence(logits.log_softmax(-1), labels)
    found = symmetric_divergence(barred.log_softmax(-1), labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert barred.grad.isfinite().all()


def test_training_pairs_longer_than_the_model_takes_are_named_before_the_training(small):
    size = {"max_position_embeddings": 6, "vocab_size": 28, "pad_token_id": 27, "decoder_start_token_id": 27}
    model = rs_model(encoder_layers=1, decoder_layers=1, **size)
    with pytest.raises(ValueError, match="the longest training pair has 8 tokens and the model 6 positions"):
        small(model)


@pytest.mark.parametrize(("rate", "how"), [(1e30, "weights are no longer finite"), (10.0, "the loss ended at")])
def test_training_that_diverges_is_an_error(small, tmp_path, rate, how):
    trainer = small(learning_rate=rate, max_steps=10, save_steps=10, lr_scheduler_type="constant")
    with pytest.raises(ValueError, match=f"training diverged: .*{how}.*Lower learning_rate"):
        trainer.train()
    if rate > 1e6:
        assert not complete_checkpoints(tmp_path / "run")


def test_a_tempered_loss_is_no_divergence_where_it_ends_above_the_first_one(small):
    trainer = small(softmax_temperature=4.0, learning_rate=0, max_steps=2, logging_steps=1)
    trainer.train()
    last = trainer.state.log_history[-2]["loss"]
    assert last > 2 * math.log(trainer.model.config.vocab_size)
    trainer._first_loss = last - 0.1
    trainer._check_loss(last)
    trainer.args.softmax_temperature = None
    with pytest.raises(ValueError, match="training diverged"):
        trainer._check_loss(last)


def test_the_precision_of_accelerates_configuration_is_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = TranslationTrainingArguments(output_dir=tmp_path, use_cpu=True)
    assert args.bf16
    assert not args.fp16


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("label_smoothing_factor", 1.5, "label_smoothing_factor must be at least 0 and less than 1, got 1.5"),
        ("label_smoothing_factor", -0.1, "label_smoothing_factor must be at least 0 and less than 1, got -0.1"),
        ("learning_rate", math.nan, "learning_rate must be a finite number, got nan"),
        ("weight_decay", math.inf, "weight_decay must be a finite number, got inf"),
        ("num_train_epochs", -math.inf, "num_train_epochs must be a finite number, got -inf"),
        ("logging_steps", math.nan, "logging_steps must be a finite number, got nan"),
        ("adam_beta2", 1.0, "adam_beta2 must be at least 0 and less than 1, got 1.0"),
        ("num_train_epochs", 0, "num_train_epochs must be more than 0, got 0"),
        ("max_steps", 0, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        ("eval_num_beams", 0, "eval_num_beams must be at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be at least 1, got 0"),
        ("early_stopping_patience", 0, "early_stopping_patience must be at least 1, got 0"),
        ("generation_num_beams", 4, "generation_num_beams is not read here: give eval_num_beams"),
        ("enable_jit_checkpoint", True, "enable_jit_checkpoint is not read here"),
        (
            "accelerator_config",
            {"split_batches": True},
            "accelerator_config: split_batches does not go with max_tokens",
        ),
        (
            "accelerator_config",
            {"even_batches": False},
            "accelerator_config: even_batches does not go with max_tokens",
        ),
        ("dataloader_drop_last", True, "dataloader_drop_last does not go with max_tokens"),
        ("train_sampling_strategy", "sequential", "train_sampling_strategy: sequential does not go with max_tokens"),
        ("fp16", True, "fp16 needs a GPU"),
        (
            "save_strategy",
            "best",
            "save_strategy: best saves what an evaluation finds the best: set eval_strategy too",
        ),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TranslationTrainingArguments(output_dir=tmp_path, max_tokens=64, use_cpu=True, **{option: value})


def test_a_best_model_is_one_of_which_there_is_a_checkpoint(tmp_path):
    options = {"output_dir": tmp_path, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(
        ValueError, match=r"needs a checkpoint of each evaluation, save_steps=2 and eval_steps=1 differ"
    ):
        TranslationTrainingArguments(**options, save_steps=2, load_best_model_at_end=True)
    with pytest.raises(ValueError, match="save_strategy: best needs metric_for_best_model"):
        TranslationTrainingArguments(**options, save_strategy="best")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "set fsdp_version to 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
    ],
)
def test_sharding_that_could_not_end_is_refused(tmp_path, monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        TranslationTrainingArguments(output_dir=tmp_path, use_cpu=True)


def test_a_run_of_epochs_that_goes_on_in_other_batches_is_an_error(small, tmp_path):
    small(max_tokens=64, num_train_epochs=2, save_strategy="epoch").train()
    checkpoint = str(complete_checkpoints(tmp_path / "run")[0])
    with pytest.raises(
        ValueError, match=r"of a run with \d+ updates an epoch, and now, .* there are \d+: give max_steps"
    ):
        small(max_tokens=136, num_train_epochs=2).train(resume_from_checkpoint=checkpoint)
    last = small(max_tokens=136, max_steps=30)
    last.train(resume_from_checkpoint=checkpoint)
    assert last.state.global_step == 30


def test_validation_is_translated_as_the_saved_model_translates(small):
    trainer = small(bf16=True, use_cpu=True, max_steps=1)
    seen = []
    trainer.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.evaluate(text(PAIRS[:2]))
    loss, *decoding = seen
    assert (loss, set(decoding)) == (torch.bfloat16, {torch.float32})
    seen.clear()
    trainer.evaluate(ids(PAIRS[:2], trainer.processing_class))
    assert set(seen) == {torch.bfloat16}


def test_of_the_average_and_the_best_checkpoint_the_better_one_is_kept(small, tmp_path, tokenizer):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    options |= {"eval_steps": 2, "save_steps": 2, "eval_dataset": ids(PAIRS[:20], tokenizer)}
    options |= {"average_checkpoints": 2}
    # At a rate this high the last ones are worse, and so is their average.
    trainer = small(max_steps=12, learning_rate=0.03, lr_scheduler_type="constant", **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.weights_from.startswith(f"{Path(best).name}: the average has loss")
    assert same(weights(Path(best)), {n: t for n, t in trainer.model.state_dict().items() if n in weights(Path(best))})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)
    shutil.rmtree(tmp_path / "run")
    # Steps that overshoot to both sides: their mean is better than each.
    trainer = small(
        max_steps=40, learning_rate=0.01, lr_scheduler_type="constant", **options | {"average_checkpoints": 6}
    )
    trainer.train()
    assert trainer.weights_from.startswith("the average of checkpoint-30, ")
    assert trainer.evaluate()["eval_loss"] < trainer.state.best_metric
    average = average_checkpoints(complete_checkpoints(tmp_path / "run")[-6:])
    assert same(average, {n: t for n, t in trainer.model.state_dict().items() if n in average})


def test_a_run_that_had_ended_makes_no_more_updates_and_keeps_its_figures(small, tmp_path):
    options = {"max_steps": 7, "save_steps": 5, "logging_steps": 3}  # in the middle of an epoch, and between two logs
    whole = small(**options)
    outcome = whole.train()
    whole.save_model(tmp_path / "whole")
    curve = [entry for entry in whole.state.log_history if "loss" in entry]
    for checkpoint in ("checkpoint-7", "checkpoint-5"):
        again = small(**options)
        resumed = again.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        again.save_model(tmp_path / "again")
        assert resumed.global_step == 7
        assert same(weights(tmp_path / "again"), weights(tmp_path / "whole"))
        assert [entry for entry in again.state.log_history if "loss" in entry] == curve
        assert resumed.training_loss == pytest.approx(outcome.training_loss)
        assert resumed.metrics["train_runtime"] > 0.5 * outcome.metrics["train_runtime"]


TAUGHT = {"elastic_decoder_layers": 1, "elastic_teaching": 0.5}


@pytest.mark.parametrize("options", [{}, {"growing_depths": [1], "growing_updates": [2]}, TAUGHT])
def test_operations_are_those_of_a_stock_model_of_copies(small, tokenizer, options):
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": eos}
    model = rs_model(vocab_size=len(tokenizer), encoder_layers=3, decoder_layers=2, **special)
    counted = {
        name: small(each, max_steps=3, **given).train().metrics["total_flos"]
        for name, each, given in (("stock", unrolled_marian(model), {}), ("rs", model, options))
    }
    if options is TAUGHT:  # and beside the full depth another one
        assert counted["stock"] < counted["rs"] < 2 * counted["stock"]
    elif options:
        assert 0 < counted["rs"] < counted["stock"]
    else:
        assert counted["rs"] == counted["stock"]


@pytest.mark.parametrize("options", [{"max_steps": 30}, {"num_train_epochs": 2}])
def test_the_speed_of_a_training_is_of_the_sentences_that_were_learned_from(small, options):
    trainer = small(max_tokens=64, logging_strategy="no", **options)
    updates_an_epoch = len(trainer.get_train_dataloader())
    metrics = trainer.train().metrics
    learned = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert learned == pytest.approx(len(PAIRS) * trainer.state.global_step / updates_an_epoch, rel=0.01)


def test_early_stopping_goes_on_counting_after_a_resume(small, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "bleu", "early_stopping_patience": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_dataset": text(PAIRS[:2])}
    options |= {"max_steps": 20, "learning_rate": 0, "decoding": DecodingArguments(num_beams=1, max_new_tokens=2)}
    assert small(**options).train().global_step == 8  # nothing improves: the first is the best
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        resumed = small(**options).train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint))
        assert resumed.global_step == 8


def test_the_evaluation_that_a_resume_begins_with_costs_no_patience(small, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "bleu", "early_stopping_patience": 1}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "eval_dataset": text(PAIRS[:2])}
    options |= {"max_steps": 6, "learning_rate": 0, "decoding": DecodingArguments(num_beams=1, max_new_tokens=2)}
    small(**options | {"max_steps": 2}).train()
    resumed = small(**options, eval_on_start=True).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.global_step == 4


def test_a_checkpoint_that_is_written_over_does_not_count_before_it_is_whole(small, tmp_path, monkeypatch):
    small(max_steps=2, save_steps=2).train()
    assert len(complete_checkpoints(tmp_path / "run")) == 1

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        small(max_steps=2, save_steps=2).train()
    assert not complete_checkpoints(tmp_path / "run")


def test_an_adapter_gets_the_base_classes_card(small, tmp_path):
    lora = get_peft_model(small().model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trainer = small(lora, max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "adapter_model.safetensors" in {file.name for file in (tmp_path / "run").iterdir()}
    assert "base_model:adapter" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(ValueError, match="average_checkpoints averages whole models"):
        small(get_peft_model(small().model, LoraConfig(target_modules=["q_proj"], r=2)), average_checkpoints=2)


# Training by the script


SHORT = ["--num_train_epochs", 2, "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", 1]


def test_gradient_accumulation_trains_to_the_losses_of_the_large_batch(task, tmp_path):
    for name, options in {
        "large": ["--per_device_train_batch_size", 64],
        "accumulated": ["--per_device_train_batch_size", 16, "--gradient_accumulation_steps", 4],
    }.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(RECIPE.read_text().replace("max_tokens: 512", ""))
        options += ["--num_train_epochs", 1, "--max_train_samples", 1000, "--output_dir", tmp_path / name]
        script("train")(recipe, *task_options(task), *SHORT, *options)
    large, accumulated = losses(tmp_path / "large"), losses(tmp_path / "accumulated")
    assert len(large) == 16
    assert large[-1] < 0.9 * large[0]
    torch.testing.assert_close(torch.tensor(accumulated), torch.tensor(large), atol=1e-3, rtol=1e-3)


def test_two_processes_train_to_the_losses_of_one_with_the_same_global_batch(task, tmp_path):
    options = [RECIPE, *task_options(task), *SHORT, "--max_steps", 60]  # more than an epoch
    uneven = ["--max_tokens", 256, "--per_device_eval_batch_size", 30]  # the last batch is filled up for the second
    accelerate, config = Path(sys.executable).with_name("accelerate"), ROOT / "training" / "accelerate" / "cpu.yaml"
    command = [accelerate, "launch", "--config_file", config, "-m", "rs_transformer.commands.train"]
    run(*command, *options, *uneven, "--output_dir", tmp_path / "two")
    script("train")(*options, "--output_dir", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 60
    torch.testing.assert_close(torch.tensor(two[:40]), torch.tensor(one[:40]), atol=2e-3, rtol=2e-3)
    # From there on rounding grows, as it does between two machines; the curves stay together.
    assert sum(two[40:]) == pytest.approx(sum(one[40:]), rel=0.1)
    scores = [json.loads((tmp_path / name / "results.json").read_text())["test"] for name in ("one", "two")]
    assert scores[1]["sentences"] == scores[0]["sentences"] == 100
    rows = [json.loads(line)["translation"] for line in task["test"].read_text().splitlines()]
    truth = token_loss(*load_translator(str(tmp_path / "two")), [(row["fw"], row["bw"]) for row in rows])
    assert scores[1]["loss"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("frozen", "moved"), [(3, False), (2, True)])
def test_frozen_embeddings_stay_for_so_many_updates(trained, task, tmp_path, frozen, moved):
    options = ["--model_name_or_path", trained, "--max_steps", 3, "--eval_strategy", "no", "--save_strategy", "no"]
    options += ["--frozen_embedding_updates", frozen, "--warmup_steps", 1, "--output_dir", tmp_path]
    script("train")(RECIPE, *task_options(task), *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert torch.equal(before["model.shared.weight"], after["model.shared.weight"]) != moved
    assert not torch.equal(before["model.encoder.layers.0.fc1.weight"], after["model.encoder.layers.0.fc1.weight"])


def test_streaming_trains_and_two_processes_share_the_stream(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text().replace("max_tokens: 512", ""))
    options = [recipe, *task_options(task), *SHORT, "--streaming", "true"]
    script("train")(*options, "--per_device_train_batch_size", 64, "--max_steps", 80, "--output_dir", tmp_path / "one")
    shared = ["--per_device_train_batch_size", 32, "--max_steps", 8, "--output_dir", tmp_path / "two"]
    fork("training/train.py", *options, *shared, processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 80
    assert one[-1] < 0.7 * one[0]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one[:8]), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("option", "same"),
    [({}, True), ({"data_seed": 9}, False), ({"train_sampling_strategy": "sequential"}, False)],
    ids=["same", "data_seed", "sequential"],
)
def test_a_stream_is_shuffled_as_the_options_say(tmp_path, option, same):
    stream = Dataset.from_dict({"number": list(range(20))}).to_iterable_dataset()
    orders = [
        [row["number"] for row in shuffled(stream, TranslationTrainingArguments(output_dir=tmp_path, **each), 20)]
        for each in ({}, option)
    ]
    assert (orders[0] == orders[1]) == same
    assert (orders[1] == sorted(orders[1])) == ("train_sampling_strategy" in option)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stream_goes_on_in_the_pass_in_which_it_was(small, tmp_path, tokenizer, accumulated):
    stream = ids(PAIRS[:24], tokenizer).to_iterable_dataset().shuffle(seed=2, buffer_size=24)  # 6 batches
    half, end = 10 // accumulated, 20 // accumulated
    options = {"train_dataset": stream, "max_steps": end, "save_steps": half}
    options |= {"gradient_accumulation_steps": accumulated}
    small(**options).train()
    again = small(**options, output_dir=tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{half}"))
    whole, resumed = (losses(tmp_path / name / f"checkpoint-{end}") for name in ("run", "again"))
    assert resumed == whole


def test_what_a_stream_leaves_over_amid_an_update_is_in_no_other(small, tokenizer):
    stream = ids(PAIRS[:1] * 12, tokenizer).to_iterable_dataset()  # 3 batches
    trainer = small(train_dataset=stream, max_steps=4, gradient_accumulation_steps=2, learning_rate=0, logging_steps=1)
    for module in trainer.model.modules():
        module.dropout = 0.0
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == 4
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in steps] == pytest.approx([steps[0][name]] * 4, rel=1e-3)


def test_a_stream_that_is_too_short_for_an_update_is_named(small, tokenizer):
    stream = ids(PAIRS[:1] * 4, tokenizer).to_iterable_dataset()  # one batch
    with pytest.raises(ValueError, match=r"fewer batches than gradient_accumulation_steps \(3\), and no update"):
        small(train_dataset=stream, max_steps=4, gradient_accumulation_steps=3).train()


def test_a_run_goes_on_with_the_rates_and_the_intervals_that_it_is_given_now(small, tmp_path):
    small(max_steps=2, save_steps=2, learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.98).train()
    given = {"learning_rate": 1e-5, "weight_decay": 0.0, "adam_beta2": 0.9, "save_steps": 1, "logging_steps": 1}
    again = small(max_steps=4, output_dir=tmp_path / "again", **given)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    rates = [
        entry["learning_rate"] for entry in again.state.log_history if entry.get("step", 0) > 2 and "loss" in entry
    ]
    assert len(rates) == 2
    assert max(rates) <= 1e-5
    for group in again.optimizer.param_groups:
        assert (group["initial_lr"], group["weight_decay"], group["betas"][1]) == (1e-5, 0.0, 0.9)
    names = {folder.name for folder in complete_checkpoints(tmp_path / "again")}
    assert names == {"checkpoint-3", "checkpoint-4"}


def test_an_evaluation_leaves_no_pair_out_where_the_training_drops_the_last_batch(small):
    trainer = small(dataloader_drop_last=True, max_tokens=None, eval_dataset=text(PAIRS[:1]))
    assert "eval_loss" in trainer.evaluate()


def test_length_groups_are_of_the_seed_and_the_epoch_after_a_resume_too(small, tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "max_steps": 40, "save_steps": 20}  # 15 an epoch
    small(**options).train()
    torch.rand(7)  # what another process has drawn
    again = small(**options, output_dir=tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-20"))
    whole, resumed = (losses(tmp_path / name / "checkpoint-40") for name in ("run", "again"))
    assert resumed == whole
    sampler = again._get_train_sampler()
    orders = [list(sampler), list(sampler)]
    sampler.set_epoch(1)
    assert orders[0] == orders[1] != list(sampler)


def test_an_evaluation_in_half_precision_leaves_the_weights_as_they_are(small):
    trainer = small(eval_dataset=text(PAIRS[:4]), bf16_full_eval=True, use_cpu=True)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.evaluate()
    assert same(trainer.model.state_dict(), before)
    assert trainer.model.dtype == torch.float32


def test_without_a_checkpoint_to_average_the_weights_stay(small, caplog, monkeypatch):
    monkeypatch.setattr("rs_transformer.training.trainer.logger.propagate", True)
    trainer = small(average_checkpoints=2)
    assert trainer._choose_weights() == "update 0"
    assert "no checkpoint to average" in caplog.text


def test_several_gpus_need_as_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(TranslationTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process with 2 GPUs would train to other gradients"):
        TranslationTrainingArguments(output_dir=tmp_path)


def test_a_greedy_search_takes_the_place_of_the_parents_beams(tmp_path):
    model = rs_model()
    model.generation_config.update(num_beams=5, length_penalty=0.6, early_stopping=True)
    set_search(model, DecodingArguments(num_beams=1), 32)
    model.generation_config.save_pretrained(tmp_path)
    search = json.loads((tmp_path / "generation_config.json").read_text())
    assert (search["max_length"], search["length_penalty"], search["early_stopping"]) == (32, 1.0, False)
    model.generation_config.temperature = 0.5  # of sampling, which is off
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be saved again"):
        set_search(model, DecodingArguments(num_beams=1), 32)


def test_training_goes_on_by_length_groups_bf16_and_early_stopping(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text().replace("max_tokens: 512", "per_device_train_batch_size: 64"))
    options = ["--train_sampling_strategy", "group_by_length", "--bf16", "true", "--use_cpu", "true"]
    stopping = ["--load_best_model_at_end", "true", "--metric_for_best_model", "bleu", "--early_stopping_patience", 1]
    stopping += ["--learning_rate", 0]
    options += [*stopping, "--max_train_samples", 500, "--output_dir", tmp_path / "run"]
    script("train")(recipe, *task_options(task), *options)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    # Nothing improves at a learning rate of 0: the second evaluation is one too many.
    assert state["epoch"] == 2
    assert {"eval_loss", "eval_bleu", "eval_chrf"} <= state["log_history"][-2].keys() | state["log_history"][-1].keys()


# Stopping and going on


# Checkpoints in the middle of epochs, dropout on: the data order and the random state must both come back.
RESUMABLE = ["--num_train_epochs", 3, "--save_strategy", "steps", "--save_steps", 37, "--logging_steps", 1]
RESUMABLE += ["--eval_strategy", "no", "--dropout", 0.1, "--save_total_limit", 2]


def test_a_run_killed_while_saving_goes_on_to_the_same_losses_and_weights(task, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = [RECIPE, *task_options(task), *RESUMABLE, "--save_steps", 20, "--max_steps", 70, "--output_dir"]
    # Each checkpoint is arguments, optimizer, scheduler, random state: of the third the second is half written.
    kill("training/train.py", *options, killed, at="torch.save", call=10, moment="amid")
    assert {folder.name for folder in killed.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (20, 40, 60)}
    assert [folder.name for folder in complete_checkpoints(killed)] == ["checkpoint-20", "checkpoint-40"]
    script("train")(*options, killed, "--resume_from_checkpoint", "true")
    script("train")(*options, whole)
    assert losses(killed) == losses(whole)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(complete_checkpoints(killed)) == 2


def test_a_run_goes_on_from_a_named_checkpoint_in_another_folder(trained, task, tmp_path):
    checkpoint = complete_checkpoints(trained)[-1]
    options = ["--max_steps", 290, "--max_train_samples", 500, "--output_dir", tmp_path / "new"]
    options += ["--eval_strategy", "no", "--resume_from_checkpoint", checkpoint]
    script("train")(RECIPE, *task_options(task), *options)
    vocabularies = [(folder / "vocab.json").read_text() for folder in (trained, tmp_path / "new")]
    assert vocabularies[0] == vocabularies[1]
    assert json.loads((tmp_path / "new" / "results.json").read_text())["test"]["bleu"] > 90


# Steps with parameters of their own, of which a shallow update leaves some without a gradient.
CHANGING_DEPTH = ["--encoder_layers", 3, "--growing_depths", 1, "--growing_updates", 30, "--elastic_decoder_layers", 1]
CHANGING_DEPTH += ["--step_layer_norms", "true", "--step_embeddings", "true", f"--{CHECKPOINTING}", "true"]
CHANGING_DEPTH += ["--subword_sampling", 0.5, "--elastic_teaching", 0.5]


def test_resuming_two_processes_in_the_middle_of_an_epoch_gives_the_same_losses(task, tmp_path):
    options = [RECIPE, *task_options(task), *RESUMABLE, "--max_tokens", 256, "--dropout", 0, *CHANGING_DEPTH]
    options += ["--max_steps", 60, "--output_dir", folder := tmp_path / "run"]
    fork("training/train.py", *options, processes=2)
    whole = losses(folder)
    (folder / "checkpoint-60").rename(tmp_path / "aside")
    fork("training/train.py", *options, "--resume_from_checkpoint", "true", processes=2)
    assert losses(folder) == pytest.approx(whole, abs=1e-4)


def test_a_disk_that_is_full_while_saving_loses_no_finished_checkpoint(task, tmp_path, monkeypatch):
    options = [RECIPE, *task_options(task), *RESUMABLE, "--output_dir", tmp_path, "--save_total_limit", 1]
    save, saved = torch.save, []

    def full_disk(data, file, *args, **kwargs):
        saved.append(file)
        if len(saved) > 4:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"
            )  # as torch says it
        save(data, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="checkpoint-74 could not be written: the disk is full"):
        script("train")(*options)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-37"]


def test_a_run_that_is_extended_is_not_finished_before_its_own_scores_are_there(task, tmp_path, monkeypatch):
    options = [RECIPE, *task_options(task), "--max_train_samples", 500, "--eval_strategy", "no"]
    options += ["--output_dir", tmp_path, "--num_train_epochs"]
    script("train")(*options, 1)
    first = json.loads((tmp_path / "results.json").read_text())
    assert is_finished(tmp_path)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TranslationTrainer, "evaluate", killed)
    extended = [*options, 2, "--seed", 4, "--resume_from_checkpoint", "true"]
    with pytest.raises(KeyboardInterrupt):
        script("train")(*extended)
    assert json.loads((tmp_path / "results.json").read_text()) == first
    assert not is_finished(tmp_path)
    with pytest.raises(ValueError, match="has not finished"):
        script("publish")(tmp_path, "--repo", "org/name", "--card")
    monkeypatch.undo()
    script("train")(*extended)
    results, record = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "run.json"))
    assert is_finished(tmp_path)
    assert results["training"]["updates"] == 2 * first["training"]["updates"]
    assert results["training"]["train_seconds"] > first["training"]["train_seconds"]
    changed = {"num_train_epochs": [1.0, 2.0], "seed": [3, 4]}
    assert [part["changed"] for part in record["resumed"]] == [changed, {}]
    for name in ("recipe.yaml", "results.json", "run.json"):
        (tmp_path / name).write_text("")
    assert not is_finished(tmp_path)
    script("train")(*extended)
    again = json.loads((tmp_path / "results.json").read_text())
    assert [again[part] for part in ("test", "weights")] == [results[part] for part in ("test", "weights")]


# Averaging


def test_the_average_of_checkpoints_is_that_of_their_weights(tmp_path):
    models = [rs_model(seed) for seed in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    average = average_checkpoints([tmp_path / str(number) for number in range(3)])
    for name, tensor in average.items():
        mean = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        torch.testing.assert_close(tensor, mean)
    assert average.keys() == load_file(tmp_path / "0" / "model.safetensors").keys()


def test_checkpoints_of_different_models_are_not_averaged(tmp_path):
    rs_model().save_pretrained(tmp_path / "a")
    rs_model(decoder_unique_layers=2).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="holds other tensors than"):
        average_checkpoints([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="no checkpoint to average"):
        average_checkpoints([])


def test_the_final_model_of_a_run_is_the_average_of_its_last_checkpoints(trained):
    expected = average_checkpoints(complete_checkpoints(trained)[-2:])
    final = load_file(trained / "model.safetensors")
    assert all(torch.equal(final[name], expected[name]) for name in final)
