"""Batches, loss, checkpoints: what TranslationTrainer promises beyond Seq2SeqTrainer."""

import json
import signal
import sys

import pytest
import torch
from conftest import CHECKPOINTING, RECIPE, launch, losses, run, script, task_options
from datasets import Dataset
from oracle import PAD, batch, rs_model
from reverse_task import reverse_pairs
from safetensors.torch import load_file
from torch import nn
from transformers import DataCollatorForSeq2Seq

from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.batches import TokenBatchSampler
from rs_transformer.training.losses import label_smoothed_cross_entropy
from rs_transformer.training.model import config_from_tokenizer
from rs_transformer.training.run_folder import (
    average_checkpoints,
    checkpoint_to_resume,
    complete_checkpoints,
    mark_complete,
)
from rs_transformer.training.trainer import TranslationTrainer

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
    options = [RECIPE, *task_options(task), *SHORT]
    launch("train.py", *options, "--max_tokens", 256, "--output_dir", tmp_path / "two", config="cpu.yaml")
    script("train")(*options, "--output_dir", tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) > 90
    torch.testing.assert_close(torch.tensor(two[:40]), torch.tensor(one[:40]), atol=2e-3, rtol=2e-3)
    # From there on rounding grows, as it does between two machines; the curves stay together.
    assert sum(two[-20:]) == pytest.approx(sum(one[-20:]), rel=0.1)
    scores = [json.loads((tmp_path / name / "results.json").read_text())["test"] for name in ("one", "two")]
    assert scores[1]["sentences"] == scores[0]["sentences"] == 100


@pytest.mark.parametrize(("frozen", "moved"), [(3, False), (2, True)])
def test_frozen_embeddings_stay_for_so_many_updates(trained, task, tmp_path, frozen, moved):
    options = ["--model_name_or_path", trained, "--max_steps", 3, "--eval_strategy", "no", "--save_strategy", "no"]
    options += ["--frozen_embedding_updates", frozen, "--warmup_steps", 1, "--output_dir", tmp_path]
    launch("train.py", RECIPE, *task_options(task), *options)
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert torch.equal(before["model.shared.weight"], after["model.shared.weight"]) != moved
    assert not torch.equal(before["model.encoder.layers.0.fc1.weight"], after["model.encoder.layers.0.fc1.weight"])


def test_streaming_trains(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.read_text().replace("max_tokens: 512", "per_device_train_batch_size: 64"))
    options = ["--streaming", "true", "--max_steps", 80, "--output_dir", tmp_path / "run"]
    script("train")(recipe, *task_options(task), *SHORT, *options)
    curve = losses(tmp_path / "run")
    assert len(curve) == 80
    assert curve[-1] < 0.7 * curve[0]


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


@pytest.fixture(scope="module")
def uninterrupted(task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    script("train")(RECIPE, *task_options(task), *RESUMABLE, "--output_dir", folder)
    return folder


# Checkpoints in the middle of epochs, dropout on: the data order and the random state must both come back.
RESUMABLE = ["--num_train_epochs", 3, "--save_strategy", "steps", "--save_steps", 37, "--logging_steps", 1]
RESUMABLE += ["--eval_strategy", "no", "--dropout", 0.1, "--save_total_limit", 2]

KILLED = """
import os, runpy, signal, sys, torch
save, saved = torch.save, []
def killed_in_the_middle(data, file, *args, **kwargs):
    saved.append(file)
    if len(saved) == {number}:  # each checkpoint: arguments, optimizer, scheduler, random state
        save(data, file, *args, **kwargs)
        os.truncate(file, 100)
        os.kill(os.getpid(), signal.SIGKILL)
    save(data, file, *args, **kwargs)
torch.save = killed_in_the_middle
sys.argv = ["training/train.py", *sys.argv[1:]]
sys.path.insert(0, "training")
runpy.run_path("training/train.py", run_name="__main__")
"""


def test_a_run_killed_while_saving_goes_on_to_the_same_losses_and_weights(task, tmp_path, uninterrupted):
    # The third checkpoint is half written when the process dies.
    options = [RECIPE, *task_options(task), *RESUMABLE, "--output_dir", tmp_path]
    done = run(sys.executable, "-c", KILLED.format(number=10), *options, check=False)
    assert done.returncode == -signal.SIGKILL
    folders = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-111", "checkpoint-37", "checkpoint-74"]
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-37", "checkpoint-74"]
    script("train")(*options, "--resume_from_checkpoint", "true")
    assert losses(tmp_path) == losses(uninterrupted)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(complete_checkpoints(tmp_path)) == 2


# Steps with parameters of their own, of which a shallow update leaves some without a gradient.
CHANGING_DEPTH = ["--encoder_layers", 3, "--growing_depths", 1, "--growing_updates", 30, "--elastic_decoder_layers", 1]
CHANGING_DEPTH += ["--step_layer_norms", "true", "--step_embeddings", "true", f"--{CHECKPOINTING}", "true"]


def test_resuming_two_processes_in_the_middle_of_an_epoch_gives_the_same_losses(task, tmp_path):
    options = [RECIPE, *task_options(task), *RESUMABLE, "--max_tokens", 256, "--dropout", 0, *CHANGING_DEPTH]
    folder = tmp_path / "run"
    launch("train.py", *options, "--max_steps", 100, "--output_dir", folder, processes=2)
    whole = losses(folder)
    (folder / "checkpoint-100").rename(tmp_path / "aside")
    launch(
        "train.py",
        *options,
        "--max_steps",
        100,
        "--output_dir",
        folder,
        "--resume_from_checkpoint",
        "true",
        processes=2,
    )
    assert losses(folder) == pytest.approx(whole, abs=1e-4)


def test_a_disk_that_is_full_while_saving_loses_no_finished_checkpoint(task, tmp_path, monkeypatch):
    options = [RECIPE, *task_options(task), *RESUMABLE, "--output_dir", tmp_path, "--save_total_limit", 1]
    save, saved = torch.save, []

    def full_disk(data, file, *args, **kwargs):
        saved.append(file)
        if len(saved) > 4:
            raise OSError("No space left on device")
        save(data, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        script("train")(*options)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-37"]


def test_incomplete_and_shortened_checkpoints_do_not_count(tmp_path):
    for step in (10, 20, 30, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)
        if step != 40:
            mark_complete(folder)
    (tmp_path / "checkpoint-30" / "model.safetensors").write_bytes(b"x" * 50)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / "checkpoint-20")
    assert not (tmp_path / "checkpoint-40").exists()


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
