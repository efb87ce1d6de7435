"""Model cards for the Hub, filled from a finished run's folder: no figure in a card that is not in the folder's files.

What a folder cannot know, where its data came from and under which licence, is in its `card.yaml`. Its `data` and
`limits` are Markdown; all else that comes from a file is text, whatever it has in it, and a figure is a number.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, MarianConfig, MarianMTModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .configuration_rs_marian import SIDES, RSMarianConfig
from .export import TITLES
from .layer_transfer import count_parameters, stock_config
from .modeling_rs_marian import RSMarianForConditionalGeneration
from .pipeline_rs_marian import split_code
from .training.run_folder import LINEAGE, RESULTS, RUN_RECORD, resumed_lines, weights_digest
from .utils.files import atomic_file, write_text
from .utils.markdown import code, one_line, plain
from .utils.tables import markdown_table
from .versions_rs_marian import TESTED_TRANSFORMERS

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD = "README.md"
OWN_CARD = "rs-transformer"  # is in every card that was written here
NOT_MEASURED = "Not measured yet."
COMPARISON = "comparison.json"
# Where the Hub looks for the scores of a model on its benchmarks.
EVAL_RESULTS = ".eval_results/comparison.yaml"
BENCHMARK_METRIC = "bleu"
LISTS = ("datasets", "tags")  # of what a card's metadata has
BASE_MODEL = "base_model"  # text or a list
METRICS = {"bleu": "BLEU", "chrf": "chrF"}
SPLITS = ("validation", "test")
DEPTH_HEADER = ["encoder depth", "decoder depth", *METRICS.values(), "sentences/s", "speed-up"]
COMPARISON_HEADER = ["engine", "model", "MB", "single sentences/s", "speed-up", "batched sentences/s", "speed-up"]
# The last columns of a comparison: with references, and without.
COMPARED = (list(METRICS.values()), ["chrF to the parent's"])
# Tables that a card has only where the folder has the file.
OWN_TABLES = [DEPTH_HEADER, *(COMPARISON_HEADER + columns for columns in COMPARED)]
# How the template's first example loads a model that is on the Hub.
REPOSITORY = re.compile(r'(?:model=|from_pretrained\()"([\w.-]+/[\w.-]+)"')
FIGURE = re.compile(r"[\d.,]*\d")
TABLE_OR_BLANK = re.compile(r"\s*(\||$)")
LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*")
# What an RSMarian has that a stock Marian has not, beside shared layers.
OWN_FIELDS = (
    "deepnorm",
    "step_embeddings",
    "step_layer_norms",
    "step_biases",
    "step_adapter_rank",
    "tie_encoder_decoder_layers",
    "marian_positions",
)


@dataclass
class CardFacts:
    """What `card.yaml` in a model's folder may say.

    Args:
        license: of the weights, as the Hub names it.
        datasets: Hub ids of the training data.
        dataset: what the data that it was scored on is called; default: the recipe's `dataset_name` or file.
        data: Markdown about the training data: what, from where, under which licence; default: what the run knows.
        limits: Markdown list of what this model is not good at.
        base_model: Hub id of what it was made from, or a list of them.
        tags: further tags on the Hub.
    """

    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    dataset: str | None = None
    data: str | None = None
    limits: str = "- It was trained on the data above; text of another kind it translates worse."
    base_model: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)

    @classmethod
    def from_folder(cls, folder: Path) -> "CardFacts":
        """Those of a folder; the defaults if it has no `card.yaml`.

        Raises:
            ValueError: it is no YAML, no mapping, or has an unknown key or a value of another kind.
        """
        file = folder / "card.yaml"
        said = {name: value for name, value in (_read(file) or {}).items() if value is not None}
        known = {each.name: each.type for each in dataclasses.fields(cls)}
        for name, value in said.items():
            if name not in known:
                raise ValueError(f"{file} has an unknown key {name!r}; known: {', '.join(known)}")
            lists = known[name] == list[str]
            several = lists or (isinstance(value, list) and name == BASE_MODEL)
            if not _is_texts(value if several else [value]):
                wanted = "a list of texts" if lists else "text"
                raise ValueError(f"{file}: {name} must be {wanted}, got {value!r} (in quotes everything is text)")
        return cls(**said)


def build_card(folder: str | Path, repository: str | None = None, **said: Any) -> ModelCard:
    """The card of a model in a folder, from its `config.json`, weights, tokenizer and what of these is there:
    `results.json`, `recipe.yaml`, `collapse.json` and `trim.json` (of what it was fine-tuned from),
    `depth_sweep.json`, `comparison.json`, `card.yaml`.

    Args:
        folder: of a run, or laid out as a Hub repository.
        repository: its name in the snippets, `org/name`; default: the folder as given.
        said: fields of `CardFacts`, which win over those of `card.yaml`; its tags are added.

    Raises:
        OSError: the folder has no configuration or tokenizer.
        ValueError: it has no weights, or one of the files is damaged or does not hold what it should.
    """
    path = Path(folder)
    name = one_line((repository or str(path.resolve())).rstrip("/").rsplit("/", 1)[-1])
    repository = repository or str(folder)
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    facts = CardFacts.from_folder(path)
    facts = dataclasses.replace(facts, **said | {"tags": [*facts.tags, *said.get("tags", [])]})
    recipe = _read(path / "recipe.yaml") or {}
    results = _results(path)
    scores = {split: results[split] for split in SPLITS if split in results}
    comparison = _comparison(path)
    training = results.get("training")
    shared = _is_shared(config)
    languages = [str(language) for language in (tokenizer.source_lang, tokenizer.target_lang) if language]
    languages = [language for language in languages if LANGUAGE.fullmatch(language)]
    datasets = {
        split: facts.dataset or one_line(str(row.get("dataset") or _dataset_name(recipe, split)))
        for split, row in scores.items()
    }
    tags = ["translation", "marian", *(["recurrent-stacking"] if shared else []), *facts.tags]
    data = ModelCardData(
        model_name=name,
        language=[split_code(language)[0] for language in languages] or None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="translation",
        tags=list(dict.fromkeys(tags)),
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        metrics=list(METRICS) if scores or _compared_scores(comparison) else None,
        eval_results=[*_eval_results(scores, datasets), *_compared_scores(comparison)] or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text("utf-8"),
        name=plain(name),
        repository={"python": _quoted(repository), "shell": shlex.quote(one_line(repository))},
        converted={"python": _quoted(f"{name}-ct2"), "shell": shlex.quote(f"{name}-ct2")},
        languages=" to ".join(languages),
        shared=shared,
        stock=not isinstance(config, RSMarianConfig),
        remote_code=isinstance(config, RSMarianConfig)
        and (shared or any(getattr(config, name) for name in OWN_FIELDS)),
        tested=TESTED_TRANSFORMERS,
        stacking=_stacking(config),
        config=config,
        properties=_properties(config, _weights(path), shared),
        scores=_score_table(scores),
        signatures=list(dict.fromkeys(code(row[f"{m}_signature"]) for m in METRICS for row in scores.values())),
        depths=_depths(path),
        elastic=any(recipe.get(f"elastic_{side}_layers") for side in SIDES),
        comparison=_comparison_section(comparison),
        data=facts.data.strip() if facts.data else _training_data(recipe, training),
        lineage=_lineage(recipe, *(_read(path / name) for name in LINEAGE), _read(path / RUN_RECORD) or {}),
        training=training,
        seed=plain(recipe.get("seed")),
        script="distill.py" if _teachers(recipe) else "train.py",
        limits=facts.limits.strip(),
    )


def write_card(folder: str | Path, repository: str | None = None, **said: Any) -> None:
    """Build the card of a folder and save it there as `README.md`, in the place of what has this name.

    Where `comparison.json` names a benchmark of the Hub, the score is also in `.eval_results/comparison.yaml`, which
    else goes.
    """
    card = build_card(folder, repository, **said)
    with atomic_file(Path(folder, CARD)) as staged:
        card.save(staged)
    file = Path(folder, EVAL_RESULTS)
    if entries := _benchmark_entries(_comparison(Path(folder))):
        file.parent.mkdir(exist_ok=True)
        write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), file)
    else:
        file.unlink(missing_ok=True)


def renew_card(folder: str | Path, **said: Any) -> None:
    """Write a folder's card anew, with what its metadata say already.

    A README.md that is no card of this package stays. Where lines are gone that somebody may have put there, but for
    tables and the figures of a line, the card as it was is kept beside the new one, with a warning.
    """
    file = Path(folder, CARD)
    before = file.read_text("utf-8", errors="replace") if file.is_file() else OWN_CARD
    if OWN_CARD not in before:
        logger.warning(f"{file} is no card of this package and stays; training/publish.py --card true writes one.")
        return
    replace_card(folder, **card_facts(folder) | said)


def replace_card(folder: str | Path, repository: str | None = None, **said: Any) -> None:
    """As `write_card`; where lines are gone that somebody may have put there, the card before is kept, too."""
    file = Path(folder, CARD)
    before = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    former = card_facts(folder).get("repository")
    write_card(folder, repository, **said)
    now = {*file.read_text("utf-8").splitlines(), NOT_MEASURED}
    if former is not None:  # whose name is in it
        now |= set(str(build_card(folder, former, **said)).splitlines())
    keep_own_lines(before, now, file)


def keep_own_lines(before: str, now: Iterable[str], file: Path) -> None:
    """Keep a card that another one replaces, beside it, if it has lines that somebody may have put there; and say so.

    Args:
        before: the card that is replaced.
        now: lines that need not be kept.
        file: where the new one is.
    """
    # Figures, and tables, change by themselves.
    now = {FIGURE.sub("0", line) for line in now}
    own = [line for line in before.splitlines() if FIGURE.sub("0", line) not in now and not TABLE_OR_BLANK.match(line)]
    if own:
        kept, number = file.with_name(f"{file.stem}.before{file.suffix}"), 1
        while kept.exists():  # of a card before
            number += 1
            kept = file.with_name(f"{file.stem}.before-{number}{file.suffix}")
        write_text(before, kept)
        logger.warning(f"{file} is written anew and lacks lines that it had, as {own[0][:60]!r}: {kept} has them.")


def card_facts(folder: str | Path) -> dict[str, Any]:
    """What a folder's card says that `card.yaml` does not, as `build_card` takes it; nothing if there is no card.

    The repository, and of `CardFacts` what is in the card's metadata. A card that cannot be read says nothing.
    """
    file = Path(folder, CARD)
    if not file.is_file():
        return {}
    try:
        card = ModelCard.load(file)
    except (ValueError, yaml.YAMLError):
        return {}
    said = _read(Path(folder, "card.yaml")) or {}
    names = ("license", BASE_MODEL, *LISTS)
    facts = {name: getattr(card.data, name, None) for name in names if said.get(name) is None}
    if named := REPOSITORY.search(card.text):
        facts["repository"] = named[1]
    # Somebody's own card may have another kind of value.
    several = [name for name in facts if name in LISTS or (name == BASE_MODEL and isinstance(facts[name], list))]
    return {name: value for name, value in facts.items() if _is_texts(value if name in several else [value])}


def card_disagreements(folder: str | Path) -> list[str]:
    """What a folder's card says otherwise than its files: metrics of `results.json`, or a row of a card's tables.

    Returns:
        A line for each; none if they agree.

    Raises:
        OSError, ValueError: as `build_card`, once the metrics agree.
    """
    path = Path(folder)
    results = _results(path)
    scores = {split: results[split] for split in SPLITS if split in results}
    stated: dict[str, list[EvalResult]] = {RESULTS: [], COMPARISON: []}
    card = ModelCard.load(path / CARD)
    for result in card.data.eval_results or []:
        stated[COMPARISON if "engine" in (result.metric_args or {}) else RESULTS].append(result)
    due = {
        RESULTS: _eval_results(scores, dict.fromkeys(scores, "")),
        COMPARISON: _compared_scores(_comparison(path)),
    }
    disagreements = []
    for file in stated:
        said, measured = ({_key(result): result.metric_value for result in part[file]} for part in (stated, due))
        disagreements += [
            f"{' '.join(key)}: {said.get(key)} in {CARD}, {measured.get(key)} in {file}"
            for key in dict.fromkeys([*measured, *said])
            if said.get(key) != measured.get(key)
        ]
    if disagreements:
        return disagreements
    due = _tables(build_card(path).text)
    own = due.keys() | {f"| {' | '.join(header)} |" for header in OWN_TABLES}  # others somebody has put there
    for header, rows in _tables(card.text).items():
        expected = due.get(header, [])
        disagreements += [f"the files say {row!r}, {CARD} does not" for row in expected if row not in rows]
        if header in own:
            disagreements += [f"{CARD} says {row!r}, the files do not" for row in rows if row not in expected]
    return disagreements


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's weights: `model.safetensors` or, where there is none, what its index names.

    Raises:
        ValueError: there are none, or the index is damaged or names a file that is not in the folder itself.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    index = _read(folder / SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ValueError(f"{folder} has no safetensors weights")
    named = index.get("weight_map")
    names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    for name in names or [""]:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} names {name!r}, which is no safetensors file there")
    return names


def _is_shared(config: MarianConfig) -> bool:
    return isinstance(config, RSMarianConfig) and any(
        getattr(config, f"{side}_unique_layers") < getattr(config, f"{side}_layers") for side in SIDES
    )


def _eval_results(scores: dict[str, Any], datasets: dict[str, str]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="translation",
            dataset_type=one_line(datasets[split]),
            dataset_name=one_line(datasets[split]),
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{label}, beam {row['num_beams']}",
            metric_value=round(row[metric], 2),
            metric_args={"signature": one_line(row[f"{metric}_signature"])},
        )
        for split, row in scores.items()
        for metric, label in METRICS.items()
    ]


def _key(result: EvalResult) -> tuple[str, ...]:
    """By which the scores of a card are told apart: split, metric and, of a comparison, engine."""
    engine = (result.metric_args or {}).get("engine")
    return (result.dataset_split, result.metric_type, *([engine] if engine else []))


def _compared_scores(comparison: dict[str, Any] | None) -> list[EvalResult]:
    """The child's scores in each engine of a comparison."""
    if comparison is None or not comparison["references"]:
        return []
    return [
        EvalResult(
            task_type="translation",
            dataset_type=one_line(comparison["dataset"]),
            dataset_name=one_line(comparison["dataset"]),
            dataset_split=one_line(comparison["split"]),
            metric_type=metric,
            metric_name=f"{label}, {engine_title(row)}, beam {comparison['decoding']['num_beams']}",
            metric_value=round(row["quality"]["child"][metric], 2),
            metric_args={
                "signature": one_line(row["quality"]["child"][f"{metric}_signature"]),
                "engine": one_line(f"{row['engine']}:{row['quantization']}"),
            },
        )
        for row in comparison["engines"]
        for metric, label in METRICS.items()
    ]


def _benchmark_entries(comparison: dict[str, Any] | None) -> list[EvalResultEntry]:
    """What the Hub's page of a benchmark takes: one score a task, that of the first engine."""
    scores = [score for score in _compared_scores(comparison) if score.metric_type == BENCHMARK_METRIC]
    if not scores or not comparison.get("benchmark"):
        return []
    score = scores[0]
    notes = f"{score.metric_name}, {score.metric_args['signature']}"
    benchmark = {name: comparison["benchmark"][name] for name in ("dataset_id", "task_id")}
    return [EvalResultEntry(**benchmark, value=score.metric_value, notes=notes)]


def engine_title(row: Mapping[str, Any]) -> str:
    """What an engine of a comparison is called, with its quantization."""
    return one_line(f"{TITLES.get(row['engine'], row['engine'])} {row['quantization']}")


def _dataset_name(recipe: dict[str, Any], split: str) -> str:
    """Of the Hub, or a file and the folder that it is in, not the path on somebody's machine."""
    files = _texts(recipe.get(f"{split}_file")) or ["unknown"]
    return str(recipe.get("dataset_name") or "/".join(Path(files[0]).parts[-2:]))


def _training_data(recipe: dict[str, Any], training: dict[str, Any] | None) -> str:
    """What a run knows about its training data."""
    pairs = (training or {}).get("pairs")
    names = _texts(recipe.get("dataset_name")) or [
        "/".join(Path(file).parts[-2:]) for file in _texts(recipe.get("train_file"))
    ]
    if not names and pairs is None:
        return "Nothing is said about the training data."
    what = "Sentence pairs" if pairs is None else f"{pairs:,} sentence pairs"
    where = f" of {' and '.join(map(code, names))}" if names else ""
    return f"{what}{where}. Where they come from, and under which licence, nobody has written into `card.yaml`."


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
            unrolled = count_parameters(MarianMTModel(stock_config(config)))
    return {"stored": counts["total"], "layers": counts["layers"], "unrolled": unrolled["total"]}


def _vocabulary(config: MarianConfig) -> str:
    if config.share_encoder_decoder_embeddings:
        return f"{config.vocab_size:,} entries"
    return f"{config.vocab_size:,} source and {config.decoder_vocab_size:,} target entries"


def _weights(folder: Path) -> str:
    """Type and size of the stored weights."""
    files = [folder / name for name in weight_files(folder)]
    with safe_open(files[0], "pt") as opened:
        dtype = str(opened.get_slice(next(iter(opened.keys()))).get_dtype())
    return f"{dtype}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _properties(config: MarianConfig, weights: str, shared: bool) -> str:
    """The table of what the model is."""
    parameters = _parameters(config)
    ffn, heads = ([getattr(config, f"{side}_{what}") for side in SIDES] for what in ("ffn_dim", "attention_heads"))
    rows = [
        ("parameters stored", f"{parameters['stored']:,}, of these {parameters['layers']:,} in layers"),
        ("parameters of the model with its layers written out", f"{parameters['unrolled']:,}"),
        ("depth", ", ".join(f"{side} {getattr(config, f'{side}_layers')}" for side in SIDES)),
        ("layer of each step", ", ".join(f"{side} {_layer_map(config, side)}" for side in SIDES)),
        ("width", f"d_model {config.d_model}, feed-forward {ffn[0]} and {ffn[1]}, {heads[0]} and {heads[1]} heads"),
        ("vocabulary", f"{_vocabulary(config)}, SentencePiece"),
        ("longest input", f"{config.max_position_embeddings} tokens"),
        ("weights", weights),
    ]
    if not shared:
        del rows[1]
    return markdown_table(["", ""], rows)


def _score_table(scores: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        (split, row["sentences"], row["num_beams"], f"{row['bleu']:.2f}", f"{row['chrf']:.2f}")
        for split, row in scores.items()
    ]
    return markdown_table(["split", "sentences", "beam", *METRICS.values()], rows) if rows else ""


def _depths(folder: Path) -> dict[str, Any] | None:
    """The table of `depth_sweep.json`, its split and beam; None if it has no other depth of these weights.

    Models that were fine-tuned at a depth, and measured beside this one, are others.
    """
    file = folder / "depth_sweep.json"
    rows = _read(file, list)
    if not rows:
        return None
    depths = [f"{side}_layers" for side in SIDES]
    for number, row in enumerate(rows, start=1):
        _check(row, [*depths, *METRICS, "sentences_per_second", "speedup", "num_beams"], [], f"{file}: row {number}")
    first = rows[0]
    rows = [row for row in rows if row.get("system") == first.get("system")]
    if len(rows) == 1 or not _is_of_its_weights(file, first.get("weights_sha256")):
        return None
    cells = [
        [row[depth] for depth in depths]
        + [f"{row['bleu']:.2f}", f"{row['chrf']:.2f}", f"{row['sentences_per_second']:.1f}", f"{row['speedup']:.2f}"]
        for row in rows
    ]
    # A record of an earlier version does not say of which split it is.
    split = plain(first.get("split", "test"))
    return {"split": split, "beam": first["num_beams"], "table": markdown_table(DEPTH_HEADER, cells)}


def _is_of_its_weights(file: Path, measured: str | None) -> bool:
    """Whether a file's figures are those of the weights beside it, by the digest of those measured; or says so."""
    folder = file.parent
    scored = (_results(folder).get("weights") or {}).get("scored_sha256")  # those of a copy in half precision
    if measured in (None, scored, weights_digest(folder)):
        return True
    logger.warning(f"{file} is of other weights than those in {folder}: its figures are left out of the card.")
    return False


def _comparison(folder: Path) -> dict[str, Any] | None:
    """`comparison.json`, if it is there and of these weights, with the figures that a card has."""
    file = folder / COMPARISON
    record = _read(file)
    if record is None:
        return None
    _check(record, ["sentences"], ["dataset", "split"], str(file))
    for part, numbers, texts in (
        ("parent", ["parameters"], ["model"]),
        ("child", ["parameters"], ["weights_sha256"]),
        ("decoding", ["num_beams"], []),
        ("timed_sentences", ["single", "batched"], []),
        ("machine", ["threads"], ["cpu"]),
    ):
        _check(record.get(part), numbers, texts, f"{file}: {part}")
    rows = record.get("engines")
    for number, row in enumerate(rows if isinstance(rows, list) and rows else [None], start=1):
        where = f"{file}: engine {number}"
        _check(row, ["same", "chrf_to_parent"], ["engine", "quantization"], where)
        _check(row.get("speedup"), ["single", "batched"], [], f"{where}, speedup")
        for side in ("parent", "child"):
            _check(row.get(side), ["bytes", "load_seconds", "single", "batched"], [], f"{where}, {side}")
            if record.get("references"):
                texts = [f"{metric}_signature" for metric in METRICS]
                numbers = [*METRICS, *(f"{metric}_ci" for metric in METRICS)]
                quality = row.get("quality") if isinstance(row.get("quality"), dict) else {}
                _check(quality.get(side), numbers, texts, f"{where}, quality of the {side}")
    if record.get("benchmark") is not None:
        _check(record["benchmark"], [], ["dataset_id", "task_id"], f"{file}: benchmark")
    return record if _is_of_its_weights(file, record["child"]["weights_sha256"]) else None


def _comparison_section(record: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the card says of a comparison, and its table."""
    if record is None:
        return None
    header = COMPARISON_HEADER + COMPARED[0 if record["references"] else 1]
    rows = []
    for row in record["engines"]:
        for side in ("parent", "child"):
            its = row[side]
            cells = [plain(engine_title(row)), f"{side} with shortlist" if its.get("shortlist") else side]
            shortlist = f" + {its['shortlist_bytes'] / 1e6:.1f}" if isinstance(its.get("shortlist_bytes"), int) else ""
            cells.append(f"{its['bytes'] / 1e6:.1f}{shortlist}")
            for way in ("single", "batched"):
                cells += [f"{its[way]:.1f}", "1.00" if side == "parent" else f"{row['speedup'][way]:.2f}"]
            if record["references"]:
                score = row["quality"][side]
                cells += [f"{score[metric]:.2f} ± {score[f'{metric}_ci']:.2f}" for metric in METRICS]
            else:
                cells.append("–" if side == "parent" else f"{row['chrf_to_parent']:.2f}")
            rows.append(cells)
    return {
        "parent": code(record["parent"]["model"]),
        "parameters": f"{record['parent']['parameters']:,}",
        "dataset": plain(record["dataset"]),
        "sentences": f"{record['sentences']:,}",
        "timed": record["timed_sentences"],
        "beam": record["decoding"]["num_beams"],
        "threads": record["machine"]["threads"],
        "cpu": plain(record["machine"]["cpu"]),
        "scored": bool(record["references"]),
        "shortlist": any(row[side].get("shortlist") for row in record["engines"] for side in ("parent", "child")),
        "table": markdown_table(header, rows),
    }


def _results(folder: Path) -> dict[str, Any]:
    """`results.json`, if it is there, with the figures that a card has."""
    file = folder / "results.json"
    results = _read(file) or {}
    for split in SPLITS:
        if split in results:
            texts = [f"{metric}_signature" for metric in METRICS]
            _check(results[split], [*METRICS, "sentences", "num_beams"], texts, f"{file}: {split}")
    if (training := results.get("training")) is not None:
        _check(training, ["updates", "train_seconds"], [], f"{file}: training")
        _check({"pairs": 0} | training, ["pairs"], [], f"{file}: training")
    return results


def _check(row: Any, numbers: Sequence[str], texts: Sequence[str], where: str) -> None:
    """Raise `ValueError` unless a record has these figures and these texts."""
    row = row if isinstance(row, dict) else {}
    for name in numbers:
        if not isinstance(row.get(name), (int, float)) or isinstance(row[name], bool):
            raise ValueError(f"{where} must have a number {name!r}, got {row.get(name)!r}")
    for name in texts:
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where} must have a text {name!r}, got {row.get(name)!r}")


def _lineage(
    recipe: dict[str, Any], collapse: dict[str, Any] | None, trim: dict[str, Any] | None, record: dict[str, Any]
) -> list[str]:
    """What the model was made from, by the names that its recipe has for it, and what was changed on the way."""
    lines = []
    origin = ""
    trimmed = (collapse or {}).get("trimmed") or trim or {}
    if collapse is not None:
        parent = code(trimmed.get("parent") or collapse.get("parent"))
        origin = f"a collapse of {parent}, method {plain(collapse.get('method'))}"
        if trimmed:
            origin += f", whose vocabulary was trimmed to {_entries(trimmed)} entries"
            origin += " and which was then trained on" if trimmed.get("trained") else ""
    elif trimmed:
        origin = f"{code(trimmed.get('parent'))}, with its vocabulary trimmed to {_entries(trimmed)} entries"
    if parent := recipe.get("model_name_or_path"):
        lines.append(f"Fine-tuned from {code(parent)}" + (f", which goes back to {origin}" if origin else ""))
    elif origin:
        lines.append(f"It is {origin}, without fine-tuning")
    if teachers := _teachers(recipe):
        lines.append(
            f"Distilled from {', '.join(map(code, teachers))}: targets {plain(recipe.get('targets'))}, weight of "
            f"the teacher's distributions {plain(recipe.get('word_weight'))}"
        )
    if changed := resumed_lines(record):
        lines.append(f"The training went on with other options or data: {plain('; '.join(changed))}")
    return lines


def _teachers(recipe: Mapping[str, Any]) -> list[str]:
    """The models that a recipe calls teachers, or the program."""
    return [*_texts(recipe.get("teachers")), *_texts(recipe.get("teacher_command"))]


def _entries(trimmed: dict[str, Any]) -> str:
    """What a trimming has left, of each vocabulary where there are two."""
    try:
        sizes = [int(trimmed[side]["entries"]["trimmed"]) for side in ("source", "target")]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{' or '.join(LINEAGE)} does not hold what it should of a trimming: {error}") from error
    # A record of an earlier version does not say whether there are two.
    separate = trimmed.get("separate_vocabs", sizes[0] != sizes[1])
    return " + ".join(f"{size:,}" for size in (sizes if separate else sizes[:1]))


def _tables(text: str) -> dict[str, list[str]]:
    """The tables of a card, header -> rows, however wide their columns are."""
    tables: dict[str, list[str]] = {}
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        header, *lines = [re.sub(" +", " ", line) for line in block.splitlines()]
        tables[header] = lines[1:]
    return tables


def _quoted(text: str) -> str:
    """As Python reads it."""
    return json.dumps(text, ensure_ascii=False)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _texts(value: Any) -> list[str]:
    """What a recipe may have as one item or as a list."""
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def _read(file: Path, kind: type = dict) -> Any:
    """The contents of a JSON or YAML file, None if there is none or nothing in it.

    Raises:
        ValueError: it is damaged, or holds something else than a mapping (or a list).
    """
    if not file.is_file():
        return None
    try:
        text = file.read_text("utf-8")
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        language = "JSON" if file.suffix == ".json" else "YAML"
        raise ValueError(f"{file} is no {language}: {one_line(error)}") from error
    if data is not None and not isinstance(data, kind):
        wanted = {dict: "a mapping, `name: value`", list: "a list"}[kind]
        raise ValueError(f"{file} must hold {wanted}, got {one_line(data)[:60]!r}")
    return data
