"""A parent model and a child made from it, side by side: size, speed, memory and quality in every engine, in one run.

Not for how it is shown (`report.py`).
"""

import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file, logging

from ..checkpoints import MODEL_TYPES, coded_sources, load_config, load_with_tokenizer, model_digest
from ..decoding import DecodingArguments, encode_sources
from ..export import TARGETS, install, is_installed, load_engine, version_of
from ..metrics import corpus_scores, paired_bootstrap, sentence_chrf
from ..model_card import weight_files
from ..pipeline_rs_marian import is_blank, same_language
from ..training.run_folder import RECORDED_PACKAGES
from ..utils.files import claimed, read_mapping, staged_folder, write_json
from ..utils.map_shards import check_settings
from ..utils.masking import masked, without_secrets
from ..utils.measuring import interleave, processor
from ..utils.text_files import digest
from .measurement import WAYS, Deployment, EngineProcess

logger = logging.get_logger(__name__)

SIDES = ("parent", "child")
WEIGHTS = (".safetensors", ".bin", ".onnx", ".npz")
QUANTIZED = "int8"


@dataclass(frozen=True)
class Model:
    """One of the two: its name, what it is known by, and the sources as it reads them."""

    name: str
    revision: str
    digest: str
    parameters: int
    languages: tuple[str | None, str | None]
    is_told: bool  # its target language, in the sources
    input_ids: list[list[int]]
    timed: dict[str, list[list[int]]]
    decoding: DecodingArguments


def compare(
    parent: str,
    child: str,
    sources: Sequence[str],
    references: Sequence[str] | None,
    output_dir: str | Path,
    *,
    engines: Sequence[str] | None = None,
    parent_exports: Sequence[str | Path] = (),
    child_exports: Sequence[str | Path] = (),
    revision: str = "main",
    decoding: DecodingArguments | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    dataset: str = "test data",
    split: str = "test",
    threads: int = 1,
    timed_sentences: int = 100,
    rounds: int = 5,
    examples: int = 20,
    bootstrap_samples: int = 1000,
) -> dict[str, Any]:
    """Measure a parent and a child in the same engines, taking turns, each engine in a process of its own on the CPU.

    What is finished is kept in `output_dir/work`, and the same call goes on from there: exports, translations, and the
    timings of an engine. It starts processes: a program that calls it does so under `if __name__ == "__main__":`.

    Args:
        parent: a Marian or RSMarian model, on the Hub or in a folder.
        child: likewise; of the same languages, with a tokenizer of its own.
        sources: the test sentences.
        references: one for each source; None where there are none.
        output_dir: made if need be; it holds this comparison or nothing.
        engines: each `NAME` or `NAME:QUANTIZATION`, such as `ctranslate2:int8`, of `export.TARGETS`; `transformers` is
            the model itself in PyTorch. Without a quantization it is int8 where the engine has it. Default: those of
            `child_exports`, or without them all that are installed and take both models.
        parent_exports, child_exports: folders that the command `export` has written, which are taken as they are, with
            their shortlists. What is not among them is exported into `output_dir/work`, without one.
        revision: of the parent: branch, tag or commit.
        decoding: how to translate, for quality and speed alike.
        source_lang, target_lang: what a model of several target languages is told, and by which BLEU splits words;
            default: what the child's tokenizer says.
        dataset, split: what the test data is called, and the part of it that the sentences are.
        threads: of each engine; Marian's takes one.
        timed_sentences: the first so many that are not blank are timed one at a time, in batches the first
            `WAYS["batched"]` times as many.
        rounds: times that each model translates them, in turn; a speed is the median.
        examples: translations that are shown, those in which parent and child differ most.
        bootstrap_samples: resamplings of the paired bootstrap.

    Returns:
        What `report.write_report` shows and `report.json` holds: `parent`, `child`, `dataset`, `sentences`, `decoding`
        and so on; `engines`, a row for each with the figures of both (`_measure`, `_score`); and `examples`.

    Raises:
        ValueError: models of different languages, no sentences, an engine that is not installed, an export of another
            kind or of other weights, or an `output_dir` with another comparison in it.
        OSError: there is no such model.
        RuntimeError: the process of an engine ended, as where there is too little memory.
    """
    output, decoding = Path(output_dir), decoding or DecodingArguments()
    # One name for each folder, however it is written.
    parent, child = (str(Path(name)) if Path(name).is_dir() else name for name in (parent, child))
    if None in sources or None in (references or ()):
        raise ValueError("a test sentence is null: leave its pair out")
    if not any(source.strip() for source in sources):
        raise ValueError("there are no test sentences to compare on")
    if references is not None and len(references) != len(sources):
        raise ValueError(f"there are {len(sources)} test sentences and {len(references)} references")
    exports = {"parent": _exports(parent_exports, "parent"), "child": _exports(child_exports, "child")}
    chosen = choose_engines(engines, exports)
    models = {
        "parent": _load(parent, revision, sources, (source_lang, target_lang), decoding, timed_sentences),
        "child": _load(child, "main", sources, (source_lang, target_lang), decoding, timed_sentences),
    }
    _check_languages(models)
    _check_exports(models, exports)
    settings = {
        **{side: model.digest for side, model in models.items()},
        **{name: _digest(texts) for name, texts in (("sources", sources), ("references", references))},
        **asdict(decoding),
        **{"threads": threads, "timed_sentences": timed_sentences, "rounds": rounds},
    }
    if target_lang is not None and any(model.is_told for model in models.values()):
        settings["target_lang"] = target_lang
    target_lang = target_lang or models["child"].languages[1]
    with claimed(output):
        work = _open(output, settings)
        given = {*exports["parent"], *exports["child"]}
        for name, (target, quantization) in list(chosen.items()):
            try:
                for side, model in models.items():
                    if target == "marian":
                        load_engine(target).check_path(exports[side].get(name, output))
                    if name not in exports[side]:
                        exports[side][name] = _export(model, target, quantization, work / f"{side}-{_file_name(name)}")
            except ValueError as error:
                if engines is not None or name in given or len(chosen) == 1:
                    raise
                logger.warning(f"Without {name}: {error}")
                del chosen[name]
        rows, shown = [], None
        for name, (target, quantization) in chosen.items():
            deployments = {
                side: _deployment(model, target, exports[side][name], threads) for side, model in models.items()
            }
            figures, translations = _measure(name, deployments, work, rounds)
            scores = _score(translations, references, target_lang, bootstrap_samples)
            rows.append({"engine": target, "quantization": quantization, **figures, **scores})
            shown = shown or translations  # the first engine's
    return {
        **{
            side: {"model": model.name, "parameters": model.parameters, "sha256": model.digest}
            for side, model in models.items()
        },
        "languages": models["child"].languages,
        "dataset": dataset,
        "split": split,
        "sentences": len(sources),
        "references": references is not None,
        "decoding": asdict(decoding),
        "timed_sentences": {way: len(timed) for way, timed in models["child"].timed.items()},
        "rounds": rounds,
        "machine": {"cpu": processor(), "threads": threads},
        **_origin(chosen),
        "engines": rows,
        "examples": _examples(sources, references, shown, examples),
    }


def _origin(chosen: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The command, without secrets, and the versions of what it ran on."""
    command, secrets = without_secrets(sys.argv)
    packages = dict.fromkeys([*RECORDED_PACKAGES, *(TARGETS[target] for target, _ in chosen.values())])
    versions = {"python": sys.version.split()[0]} | {package: version_of(package) for package in packages}
    return {"command": masked(command, secrets), "versions": versions}


def choose_engines(
    engines: Sequence[str] | None, exports: Mapping[str, Mapping[str, Path]]
) -> dict[str, tuple[str, str]]:
    """The engines to compare in, by `NAME:QUANTIZATION`, each with its two parts.

    Raises:
        ValueError: an unknown engine or quantization, one that is named twice or not installed, or an export that is
            for none of them.
    """
    if engines is None:
        engines = list(exports["child"]) or [target for target in TARGETS if _is_usable(target)]
    chosen: dict[str, tuple[str, str]] = {}
    for given in engines:
        target, _, quantization = given.partition(":")
        if target not in TARGETS:
            raise ValueError(f"engines: {given!r} is none of {', '.join(TARGETS)}")
        if not is_installed(target):
            raise ValueError(f"engines={target} needs: {install(target)}")
        known = load_engine(target, "engines").QUANTIZATIONS
        quantization = quantization or (QUANTIZED if QUANTIZED in known else known[0])
        if quantization not in known:
            raise ValueError(f"engines: {given!r} must have one of {', '.join(known)} behind the colon")
        name = f"{target}:{quantization}"
        if target == "transformers" and quantization != known[0] and any(name not in its for its in exports.values()):
            raise ValueError(f"engines: transformers is the models as they are, and {name} needs exports of both")
        if name in chosen:
            raise ValueError(f"engines: {name} is named twice")
        chosen[name] = (target, quantization)
    for side, folders in exports.items():
        for name, folder in folders.items():
            if name not in chosen:
                raise ValueError(f"{side}_exports: {folder} is of {name}, and the engines are {', '.join(chosen)}")
    return chosen


def _is_usable(target: str) -> bool:
    try:
        load_engine(target)
    except ValueError:
        return False
    return is_installed(target)


def _exports(folders: Sequence[str | Path], side: str) -> dict[str, Path]:
    """Folders that the command `export` has written, by engine and quantization."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        made = read_mapping(folder / "export.json").get("arguments", {})
        if not made:
            raise ValueError(f"{side}_exports: {folder} has no export.json: it must be made by training/export.py")
        name = f"{made.get('to')}:{made.get('quantization')}"
        if name in found:
            raise ValueError(f"{side}_exports: {found[name]} and {folder} are both of {name}")
        found[name] = folder
    return found


def _load(
    name: str,
    revision: str,
    sources: Sequence[str],
    languages: tuple[str | None, str | None],
    decoding: DecodingArguments,
    timed_sentences: int,
) -> Model:
    config = load_config(name, revision)
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"{name} is a {config.model_type} model; it must be Marian or RSMarian")
    model, tokenizer = load_with_tokenizer(name, revision)
    told, _ = coded_sources(name, tokenizer, sources, *languages)
    input_ids = encode_sources(model, tokenizer, told)
    # No engine has positions for more.
    longest = min(decoding.max_new_tokens, model.config.max_position_embeddings - 1)
    filled = [ids for ids in input_ids if not is_blank(tokenizer, ids)]
    return Model(
        name=name,
        revision=revision,
        digest=model_digest(model, tokenizer),
        parameters=model.num_parameters(only_trainable=True),
        languages=_languages(tokenizer),
        is_told=told != list(sources),
        input_ids=input_ids,
        timed={way: filled[: times * timed_sentences] for way, times in WAYS.items()},
        decoding=replace(decoding, max_new_tokens=longest),
    )


def _languages(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str | None]:
    return getattr(tokenizer, "source_lang", None), getattr(tokenizer, "target_lang", None)


def _check_languages(models: Mapping[str, Model]) -> None:
    """Raise `ValueError` unless both translate between the same languages, as far as they say."""
    pairs = [model.languages for model in models.values()]
    if any(None not in pair and not same_language(*pair) for pair in zip(*pairs, strict=True)):
        parent, child = (
            f"{model.name} translates {model.languages[0]} to {model.languages[1]}" for model in models.values()
        )
        raise ValueError(f"{parent}, {child}: compare models of one language pair")


def _check_exports(models: Mapping[str, Model], exports: Mapping[str, Mapping[str, Path]]) -> None:
    """Raise `ValueError` for an export of another model than its side's.

    One that an earlier version has made does not say of which it is, and is believed.
    """
    for side, model in models.items():
        for folder in exports[side].values():
            if read_mapping(folder / "export.json").get("model_digest", model.digest) != model.digest:
                raise ValueError(f"{side}_exports: {folder} is of other weights than {model.name}: export that again")


def _digest(texts: Sequence[str] | None) -> str | None:
    return None if texts is None else hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _open(output: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of what is finished, of this comparison and no other."""
    work = output / "work"
    file = work / "settings.json"
    if file.is_file():
        check_settings(output, read_mapping(file), settings)
    else:
        if output.is_dir() and any(each.name != f".{output.name}.lock" for each in output.iterdir()):
            raise FileExistsError(f"output_dir: {output} is there already and not empty; choose another, or remove it")
        work.mkdir(parents=True, exist_ok=True)
        write_json(settings, file)
    return work


def _file_name(engine: str) -> str:
    return engine.replace(":", "-")


def _export(model: Model, target: str, quantization: str, folder: Path) -> Path:
    """The folder that an engine loads of a model, made if it is not there."""
    if target == "transformers":
        return Path(model.name)
    if not folder.is_dir():
        with staged_folder(folder) as staging:
            load_engine(target).convert(model.name, staging, quantization, model.revision)
    return folder


def _deployment(model: Model, target: str, folder: Path, threads: int) -> Deployment:
    shortlist = getattr(load_engine(target), "SHORTLIST_FILE", None)
    return Deployment(
        target=target,
        folder=str(folder),
        model=model.name,
        revision=model.revision,
        use_shortlist=shortlist is not None and (folder / shortlist).is_file(),
        decoding=model.decoding,
        threads=threads,
        input_ids=model.input_ids,
        timed=model.timed,
    )


def _measure(
    name: str, deployments: Mapping[str, Deployment], work: Path, rounds: int
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What an engine is measured at, unless the folder has it, and the translations of both models.

    Returns:
        For each side `bytes` of the weights, `shortlist` (whether it has one) and `shortlist_bytes`, `load_seconds`,
        `peak_mib`, and of each way of translating the sentences per second: `single` (one at a time), `batched`, and
        their rounds; `speedup` by way, the median of the rounds' ratios. And the translations by side.
    """
    processes: dict[str, EngineProcess] = {}

    def process(side: str) -> EngineProcess:
        if side not in processes:
            processes[side] = EngineProcess(deployments[side])
        return processes[side]

    figures: dict[str, Any] = {}
    translations: dict[str, list[str]] = {}
    fingerprints = {side: _fingerprint(deployment) for side, deployment in deployments.items()}
    try:
        for side, deployment in deployments.items():
            file = work / f"{side}-{_file_name(name)}.json"
            record = read_mapping(file)
            if record.get("fingerprint") != fingerprints[side]:
                found = _translate(process(side), f"{name}, {side}", len(deployment.input_ids))
                record = {"fingerprint": fingerprints[side], "load_seconds": process(side).load_seconds, **found}
                write_json(record, file)
            translations[side] = record["translations"]
            figures[side] = _sizes(deployment) | {part: record[part] for part in ("load_seconds", "peak_mib")}
        file = work / f"speed-{_file_name(name)}.json"
        record = read_mapping(file)
        if record.get("fingerprints") != fingerprints:
            seconds = {
                way: interleave({side: partial(process(side).time, way) for side in SIDES}, rounds, warm_up=1)
                for way in WAYS
            }
            record = {"fingerprints": fingerprints, "seconds": seconds}
            write_json(record, file)
    finally:
        for each in processes.values():
            each.close()
    for way, seconds in record["seconds"].items():
        ratios = [before / after for before, after in zip(*(seconds[side] for side in SIDES), strict=True)]
        figures.setdefault("speedup", {})[way] = statistics.median(ratios)
        for side, deployment in deployments.items():
            speeds = [len(deployment.timed[way]) / spent for spent in seconds[side]]
            figures[side] |= {way: statistics.median(speeds), f"{way}_rounds": speeds}
    return figures, translations


def _translate(process: EngineProcess, what: str, sentences: int) -> dict[str, Any]:
    with tqdm(total=sentences, unit=" sentences", desc=what, disable=None, leave=False) as bar:
        return process.translate(bar.update)


def _fingerprint(deployment: Deployment) -> dict[str, Any]:
    """What measurements of a deployment depend on beside the comparison's settings."""
    packages = ("torch", "transformers", "rs-transformer", TARGETS[deployment.target])
    folder = Path(deployment.folder)
    # A checkpoint itself is among the settings.
    files = [] if deployment.folder == deployment.model else sorted(folder.rglob("*"))
    return {
        "versions": {package: version_of(package) for package in packages},
        "processor": processor(),
        "files": digest([str(file) for file in files if file.is_file()]),
    }


def _sizes(deployment: Deployment) -> dict[str, Any]:
    folder = Path(deployment.folder)
    if deployment.target == "transformers":
        if not folder.is_dir():  # of the Hub
            folder = Path(cached_file(deployment.folder, CONFIG_NAME, revision=deployment.revision)).parent
        files = [folder / name for name in weight_files(folder)]
    else:
        files = [file for file in folder.rglob("*") if file.suffix in WEIGHTS]
    sizes = {"bytes": sum(file.stat().st_size for file in files), "shortlist": deployment.use_shortlist}
    if deployment.use_shortlist:
        sizes["shortlist_bytes"] = (folder / load_engine(deployment.target).SHORTLIST_FILE).stat().st_size
    return sizes


def _score(
    translations: Mapping[str, Sequence[str]],
    references: Sequence[str] | None,
    target_lang: str | None,
    bootstrap_samples: int,
) -> dict[str, Any]:
    """The quality of an engine's translations.

    Returns:
        `same`, the share of the child's that are the parent's, and `chrf_to_parent` with its signature; with
        references `quality`, by side, the rows of `paired_bootstrap`.
    """
    parent, child = (translations[side] for side in SIDES)
    to_parent = corpus_scores(child, parent, target_lang)
    found = {
        "same": sum(map(str.__eq__, parent, child)) / len(child),
        "chrf_to_parent": to_parent["chrf"],
        "chrf_to_parent_signature": to_parent["chrf_signature"],
    }
    if references is not None:
        rows = paired_bootstrap(translations, references, target_lang, bootstrap_samples)
        found["quality"] = {row.pop("system"): row for row in rows}
    return found


def _examples(
    sources: Sequence[str],
    references: Sequence[str] | None,
    translations: Mapping[str, Sequence[str]],
    number: int,
) -> list[dict[str, Any]]:
    """The translations in which the child's differ most from the parent's, by sentence chrF, the first before others.

    Equal ones are none.
    """
    parent, child = (translations[side] for side in SIDES)
    scores = sentence_chrf(child, parent)
    different = [index for index in range(len(sources)) if parent[index] != child[index]]
    return [
        {
            "sentence": index + 1,
            "chrf_to_parent": scores[index],
            "source": sources[index],
            **({} if references is None else {"reference": references[index]}),
            "parent": parent[index],
            "child": child[index],
        }
        for index in sorted(different, key=scores.__getitem__)[:number]
    ]
