"""Depth that changes while training: growing stacks, and stacks of sampled depth."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import CHECKPOINTING, RECIPE, losses, script, task_options
from datasets import Dataset
from oracle import batch, marian, rs_config, rs_model
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, TrainerControl, TrainerState, pipeline

from rs_transformer.checkpoints import load_translator
from rs_transformer.decoding import DecodingArguments, translate
from rs_transformer.distillation.losses import DistillationLossArguments
from rs_transformer.distillation.trainer import DistillationTrainer
from rs_transformer.layer_transfer import expand, with_depth
from rs_transformer.training.arguments import TranslationTrainingArguments
from rs_transformer.training.depth_schedule import DepthSchedule, GrownEarlyStopping
from rs_transformer.training.trainer import TranslationTrainer

# The loss of each update tells at which depth it ran.
SHORT = ["--max_steps", 24, "--eval_strategy", "no", "--logging_steps", 1, "--warmup_steps", 4]
CHANGING = ["--encoder_layers", 3, "--growing_depths", 1, 2, "--growing_updates", 6, 14, "--elastic_decoder_layers", 1]


def test_growing_depths_are_those_of_the_recipe_and_at_most_the_sides_own():
    schedule = DepthSchedule(rs_config(encoder_layers=6, decoder_layers=3), [1, 2, 4], [10, 20, 30])
    depths = [tuple(schedule.depths(update).values()) for update in (0, 9, 10, 19, 20, 29, 30, 1000)]
    assert depths == [(1, 1), (1, 1), (2, 2), (2, 2), (4, 3), (4, 3), (6, 3), (6, 3)]


def test_elastic_depths_are_drawn_evenly_and_alike_in_every_process():
    schedule, other = (DepthSchedule(rs_config(), elastic_layers={"decoder": 1}, seed=5) for _ in range(2))
    drawn = [schedule.depths(update) for update in range(1200)]
    assert drawn == [other.depths(update) for update in range(1200)]
    assert {depths["encoder_depth"] for depths in drawn} == {6}
    counts = Counter(depths["decoder_depth"] for depths in drawn)
    assert counts.keys() == {1, 2, 3, 4, 5, 6}
    assert all(150 < count < 250 for count in counts.values())
    assert drawn != [DepthSchedule(rs_config(), elastic_layers={"decoder": 1}, seed=6).depths(u) for u in range(1200)]


def test_the_two_sides_are_drawn_apart_and_below_the_grown_depth():
    schedule = DepthSchedule(rs_config(), [2], [500], {"encoder": 1, "decoder": 3})
    drawn = [tuple(schedule.depths(update).values()) for update in range(1000)]
    assert set(drawn[:500]) == {(1, 2), (2, 2)}
    assert set(drawn[500:]) == {(encoder, decoder) for encoder in range(1, 7) for decoder in range(3, 7)}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"growing_depths": [1, 6], "growing_updates": [1, 2]}, r"below the model's depth 6, got \[1, 6\]"),
        (
            {"decoder_unique_layers": 2},
            {"growing_depths": [1], "growing_updates": [5]},
            r"growing_depths must start at decoder_unique_layers \(2\) at least, got \[1\]",
        ),
        (
            {"encoder_unique_layers": 3},
            {"elastic_layers": {"encoder": 2}},
            r"elastic_encoder_layers must lie between encoder_unique_layers \(3\) and encoder_layers \(6\), got 2",
        ),
        ({}, {"elastic_layers": {"decoder": 7}}, r"elastic_decoder_layers must lie between .* got 7"),
    ],
)
def test_impossible_depths_are_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        DepthSchedule(rs_config(**config), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"growing_depths": [1, 2], "growing_updates": [5]}, "growing_depths and growing_updates go together"),
        ({"growing_depths": [2, 2], "growing_updates": [5, 6]}, r"growing_depths must start at 1 at least and grow"),
        ({"growing_depths": [1, 2], "growing_updates": [6, 5]}, r"growing_updates must start at 1 at least and grow"),
    ],
)
def test_impossible_schedules_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TranslationTrainingArguments(output_dir=tmp_path, **options)


def test_a_model_that_is_not_recurrent_is_refused():
    with pytest.raises(ValueError, match="need a recurrently stacked model, not a marian"):
        DepthSchedule(marian().config, elastic_layers={"decoder": 1})


def test_a_stack_that_would_never_grow_up_is_refused_before_the_first_update(task, tmp_path):
    options = ["--growing_depths", 1, "--growing_updates", 24, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=r"growing_updates must end before the last update \(24\), got \[24\]"):
        script("train")(RECIPE, *task_options(task), *SHORT, *options)


def test_training_at_changing_depth_goes_on_to_the_same_losses_and_weights(task, tmp_path):
    options = [RECIPE, *task_options(task), *SHORT, *CHANGING, "--save_strategy", "steps", "--save_steps", 10]
    options += ["--output_dir", tmp_path]
    script("train")(*options)
    whole, weights = losses(tmp_path), load_file(tmp_path / "model.safetensors")
    for later in (20, 24):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    script("train")(*options, "--resume_from_checkpoint", "true")
    assert losses(tmp_path) == whole
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
def test_updates_run_at_their_depth_and_evaluation_at_the_models_own(tmp_path, tokenizer, distilled):
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "encoder_layers": 3}
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model, teacher = (rs_model(seed=seed, **size, **start) for seed in (0, 1))
    growing = {"growing_depths": [1, 2], "growing_updates": [2, 4], "elastic_decoder_layers": 2}
    args = TranslationTrainingArguments(
        output_dir=tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to="none",
        seed=5,
        **growing,
    )
    text = {"source": ["a b c"] * 80, "target": ["c b a"] * 80}
    ids = tokenizer(text["source"])["input_ids"]
    options = {
        "train_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "eval_dataset": Dataset.from_dict(text).select(range(4)),
        "processing_class": tokenizer,
        "decoding": DecodingArguments(num_beams=1, max_new_tokens=4),
    }
    if distilled:
        loss = DistillationLossArguments(word_weight=0.5)
        trainer = DistillationTrainer(model, args, **options, teacher=teacher, distillation=loss)
    else:
        trainer = TranslationTrainer(model, args, **options)
    seen: dict[bool, list] = {True: [], False: []}

    def look(module, _, inputs):
        seen[module.training].append((inputs.get("encoder_depth"), inputs.get("decoder_depth")))

    model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()
    schedule = DepthSchedule(model.config, [1, 2], [2, 4], {"decoder": 2}, seed=5)
    expected = [tuple(schedule.depths(update).values()) for update in range(8) for _ in range(2)]
    assert seen[True] == expected
    assert expected[0] == (1, 1)
    assert len(set(expected[8:])) > 1
    assert set(seen[False]) == {(None, None)}


def test_early_stopping_counts_from_the_grown_model_on(tmp_path):
    args = TranslationTrainingArguments(
        output_dir=tmp_path,
        early_stopping_patience=1,
        load_best_model_at_end=True,
        save_strategy="no",
        metric_for_best_model="bleu",
        greater_is_better=True,
    )
    state, callback = TrainerState(best_metric=5.0), GrownEarlyStopping(1, grown=100)
    for update, stopped in ((90, False), (100, False), (110, True)):
        state.global_step, control = update, TrainerControl()
        callback.on_evaluate(args, state, control, metrics={"eval_bleu": 0.0})
        assert control.should_training_stop == stopped


def test_an_update_trains_the_first_steps_alone():
    model = rs_model(step_embeddings=True, step_layer_norms=True, step_biases=True, step_adapter_rank=2).train()
    model(**batch(), encoder_depth=2, decoder_depth=3).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name in reached if ".decoder.step_embeddings." in name} == {
        f"model.decoder.step_embeddings.{step}.weight" for step in (0, 1)
    }
    assert {name.split(".")[3] for name in reached if ".encoder.step_norms." in name} == {"0", "1"}


def test_an_elastic_model_translates_at_every_depth_where_another_does_not(trained, task, tmp_path):
    script("train")(
        RECIPE, *task_options(task), "--elastic_decoder_layers", 1, "--eval_strategy", "no", "--output_dir", tmp_path
    )
    rows = [json.loads(line)["translation"] for line in task["test"].read_text().splitlines()]
    right = {}
    for name, folder in (("elastic", tmp_path), ("plain", trained)):
        model, tokenizer = load_translator(str(folder))
        for depth in (1, 2):
            shallow = with_depth(model, decoder_layers=depth)
            found = translate(shallow, tokenizer, [row["fw"] for row in rows], DecodingArguments(num_beams=1))
            right[name, depth] = sum(text == row["bw"] for text, row in zip(found, rows, strict=True))
    assert right["elastic", 2] > 90
    assert right["elastic", 1] > right["plain", 1] + 40
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config.decoder_layers == 2


@pytest.mark.parametrize("sharings", [("cycle_rev", "sandwich"), ("sequence", "cycle")], ids="-".join)
def test_sharing_schemes_go_from_a_recipe_through_training_collapse_expand_and_pipeline(task, tmp_path, sharings):
    sides = ("encoder", "decoder")
    options = [
        part for side, sharing in zip(sides, sharings, strict=True) for part in (f"--{side}_layer_sharing", sharing)
    ]
    options += [
        "--encoder_layers",
        5,
        "--encoder_unique_layers",
        3,
        "--decoder_layers",
        4,
        "--decoder_unique_layers",
        2,
    ]
    more = ["--deepnorm", "true", "--step_embeddings", "true", f"--{CHECKPOINTING}", "true"]
    script("train")(RECIPE, *task_options(task), *SHORT, *options, *more, "--output_dir", tmp_path / "trained")
    assert losses(tmp_path / "trained")[-1] < losses(tmp_path / "trained")[0] - 0.3
    model, tokenizer = load_translator(str(tmp_path / "trained"))
    maps = {"cycle_rev": [0, 1, 2, 2, 1], "sequence": [0, 0, 1, 1, 2], "sandwich": [0, 1, 1, 0], "cycle": [0, 1, 0, 1]}
    assert [model.config.encoder_layer_map, model.config.decoder_layer_map] == [maps[sharing] for sharing in sharings]
    sources = ["a b c", "d e f g h"]
    translations = [
        record["translation_text"] for record in pipeline("translation", model=str(tmp_path / "trained"))(sources)
    ]
    expanded = pipeline("translation", model=expand(model), tokenizer=tokenizer)
    assert [record["translation_text"] for record in expanded(sources)] == translations
    again = ["--step_layer_norms", "true", *options[:4], "--encoder_unique_layers", 2]
    script("collapse")("--model_name_or_path", tmp_path / "trained", "--output_dir", tmp_path / "again", *again)
    child, _ = load_translator(str(tmp_path / "again"))
    assert (len(child.model.encoder.layers), len(child.model.decoder.step_norms)) == (2, 4)
    assert child.config.deepnorm
    assert pipeline("translation", model=str(tmp_path / "again"))(sources)
