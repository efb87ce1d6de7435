"""Model cards for the Hub, filled from a finished run's folder: no figure in a card that is not in the folder's files.

What a folder cannot know, where its data came from and under which licence, is in its `card.yaml`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, MarianConfig, MarianMTModel

from .configuration_rs_marian import SIDES, RSMarianConfig
from .layer_transfer import collapsed_config, count_parameters
from .modeling_rs_marian import TESTED_TRANSFORMERS, RSMarianForConditionalGeneration
from .pipeline_rs_marian import split_code

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD = "README.md"
METRICS = {"bleu": "BLEU", "chrf": "chrF"}


@dataclass
class CardFacts:
    """What `card.yaml` in a model's folder may say.

    Args:
        license: of the weights, as the Hub names it.
        datasets: Hub ids of the training data.
        dataset: what the data that it was scored on is called; default: the recipe's `dataset_name` or file.
        data: Markdown about the training data: what, from where, under which licence.
        limits: Markdown list of what this model is not good at.
        base_model: Hub id of what it was made from.
    """

    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    dataset: str | None = None
    data: str = "Nothing is said about the training data."
    limits: str = "- It was trained on the data above; text of another kind it translates worse."
    base_model: str | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "CardFacts":
        """Those of a folder; the defaults if it has no `card.yaml`.

        Raises:
            ValueError: an unknown key.
        """
        said = _read(folder / "card.yaml") or {}
        known = [each.name for each in dataclasses.fields(cls)]
        if unknown := sorted(said.keys() - set(known)):
            raise ValueError(f"{folder / 'card.yaml'} has an unknown key {unknown[0]!r}; known: {', '.join(known)}")
        return cls(**said)


def build_card(folder: str | Path, repository: str | None = None) -> ModelCard:
    """The card of a model in a folder, from its `config.json`, weights, tokenizer and what of these is there:
    `results.json`, `recipe.yaml`, `collapse.json` (of what it was fine-tuned from), `depth_sweep.json`, `card.yaml`.

    Args:
        folder: of a run, or laid out as a Hub repository.
        repository: its name in the snippets, `org/name`; default: the folder as given.

    Raises:
        OSError: the folder has no configuration or tokenizer.
        ValueError: it has no weights, or `card.yaml` an unknown key.
    """
    path = Path(folder)
    name = (repository or str(path.resolve())).rstrip("/").rsplit("/", 1)[-1]
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    facts = CardFacts.from_folder(path)
    recipe = _read(path / "recipe.yaml") or {}
    results = _read(path / "results.json") or {}
    scores = {split: results[split] for split in ("validation", "test") if split in results}
    shared = isinstance(config, RSMarianConfig) and any(
        getattr(config, f"{side}_unique_layers") < getattr(config, f"{side}_layers") for side in SIDES
    )
    languages = [language for language in (tokenizer.source_lang, tokenizer.target_lang) if language]
    datasets = {split: facts.dataset or _dataset_name(recipe, split) for split in scores}
    data = ModelCardData(
        model_name=name,
        language=[split_code(language)[0] for language in languages] or None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="translation",
        tags=["translation", "marian", *(["recurrent-stacking"] if shared else [])],
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        metrics=list(METRICS) if scores else None,
        eval_results=_eval_results(scores, datasets) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text("utf-8"),
        name=name,
        repository=repository or str(folder),
        languages=" to ".join(languages),
        shared=shared,
        remote_code=isinstance(config, RSMarianConfig),
        tested=TESTED_TRANSFORMERS,
        stacking=_stacking(config),
        config=config,
        maps={side: _layer_map(config, side) for side in SIDES},
        parameters=_parameters(config),
        weights=_weights(path),
        scores=scores,
        depths=_read(path / "depth_sweep.json"),
        data=facts.data.strip(),
        lineage=_lineage(recipe, _read(path / "collapse.json")),
        training=results.get("training"),
        recipe=recipe,
        script="distill.py" if recipe.get("teachers") else "train.py",
        limits=facts.limits.strip(),
    )


def write_card(folder: str | Path, repository: str | None = None) -> None:
    """Build the card of a folder and save it there as `README.md`."""
    build_card(folder, repository).save(Path(folder, CARD))


def card_disagreements(folder: str | Path) -> list[str]:
    """What the metrics in a folder's card say otherwise than its `results.json`; empty if they agree."""
    path = Path(folder)
    results = _read(path / "results.json") or {}
    measured = {
        (split, metric): round(results[split][metric], 2)
        for split in ("validation", "test")
        if split in results
        for metric in METRICS
    }
    said = {
        (result.dataset_split, result.metric_type): result.metric_value
        for result in ModelCard.load(path / CARD).data.eval_results or []
    }
    return [
        f"{split} {metric}: {said.get((split, metric))} in {CARD}, {measured.get((split, metric))} in results.json"
        for split, metric in dict.fromkeys([*measured, *said])
        if said.get((split, metric)) != measured.get((split, metric))
    ]


def _eval_results(scores: dict[str, Any], datasets: dict[str, str]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="translation",
            dataset_type=datasets[split],
            dataset_name=datasets[split],
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{label}, beam {row['num_beams']}",
            metric_value=round(row[metric], 2),
            metric_args={"signature": row[f"{metric}_signature"]},
        )
        for split, row in scores.items()
        for metric, label in METRICS.items()
    ]


def _dataset_name(recipe: dict[str, Any], split: str) -> str:
    """Of the Hub, or a file and the folder that it is in, not the path on somebody's machine."""
    files = recipe.get(f"{split}_file") or ["unknown"]
    return recipe.get("dataset_name") or "/".join(Path(files[0]).parts[-2:])


def _layer_map(config: MarianConfig, side: str) -> str:
    steps = getattr(config, f"{side}_layer_map", range(getattr(config, f"{side}_layers")))
    return " ".join(str(layer) for layer in steps)


def _stacking(config: MarianConfig) -> str:
    """In words how often the stored layers are applied."""
    parts = []
    for side in SIDES:
        depth = getattr(config, f"{side}_layers")
        stored = getattr(config, f"{side}_unique_layers", depth)
        layers = "layer" if stored == 1 else "layers"
        parts.append(f"{stored} {side} {layers}" + (f" applied in {depth} steps" if stored < depth else ""))
    return " and ".join(parts)


def _parameters(config: MarianConfig) -> dict[str, int]:
    """Trainable parameters: stored, of these in layers, and with the layers written out."""
    kind = RSMarianForConditionalGeneration if isinstance(config, RSMarianConfig) else MarianMTModel
    with torch.device("meta"):
        counts = count_parameters(kind(config))
        unrolled = counts
        if isinstance(config, RSMarianConfig):
            depths = {f"{side}_unique_layers": getattr(config, f"{side}_layers") for side in SIDES}
            unrolled = count_parameters(RSMarianForConditionalGeneration(collapsed_config(config, **depths)))
    return {"stored": counts["total"], "layers": counts["layers"], "unrolled": unrolled["total"]}


def _weights(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors weights")
    with safe_open(files[0], "pt") as opened:
        dtype = str(opened.get_slice(next(iter(opened.keys()))).get_dtype())
    return {"dtype": dtype, "megabytes": sum(file.stat().st_size for file in files) / 1e6}


def _lineage(recipe: dict[str, Any], collapse: dict[str, Any] | None) -> list[str]:
    """What the model was made from, by the names that its recipe has for it."""
    lines = []
    origin = ""
    if collapse is not None:
        origin = f"a collapse of `{collapse['parent']}`, method {collapse['method']}"
    if parent := recipe.get("model_name_or_path"):
        lines.append(f"Fine-tuned from `{parent}`" + (f", which goes back to {origin}" if origin else ""))
    elif origin:
        lines.append(f"It is {origin}, without fine-tuning")
    if teachers := recipe.get("teachers"):
        names = ", ".join(f"`{teacher}`" for teacher in teachers)
        lines.append(
            f"Distilled from {names}: targets {recipe['targets']}, weight of the teacher's distributions "
            f"{recipe['word_weight']}"
        )
    return lines


def _read(file: Path) -> Any:
    """The contents of a JSON or YAML file, None if there is none."""
    if not file.is_file():
        return None
    text = file.read_text("utf-8")
    return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
