"""Recurrently stacked Transformer models for neural machine translation.

Importing the package registers configuration, model, tokenizer and translation pipeline with transformers.
"""

from typing import NoReturn

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, MarianTokenizer, pipelines

from .configuration_rs_marian import RSMarianConfig
from .layer_transfer import collapse, expand, with_depth
from .modeling_rs_marian import RSMarianForConditionalGeneration, RSMarianModel
from .pipeline_rs_marian import NAMED_TASK, TranslationPipeline
from .utils.moved import MovedModules
from .vocabulary import trim_vocabulary

__version__ = "0.1.0"


# Where the modules of the first releases are now.
_MOVED = {
    "arguments": ["utils.recipes"],
    "attention_analysis": ["attention.collection"],
    "attention_figures": ["attention.figures"],
    "attention_measures": ["attention.measures"],
    "attention_page": ["attention.page"],
    "attention_report": ["commands.attention"],
    "collapsing": ["commands.collapse", "checkpoints", "utils.files"],
    "depth_schedule": ["training.depth_schedule", "training.arguments"],
    "depth_sweep": ["commands.depth_sweep"],
    "distilled_targets": ["distillation.targets"],
    "distilling": ["commands.distill"],
    "evaluation": ["commands.evaluate", "commands.translate", "corpus.loading"],
    "exporting": ["commands.export"],
    "launching": ["utils.processes"],
    "model_building": ["training.model", "checkpoints"],
    "plotting": ["utils.plotting"],
    "publishing": ["commands.publish"],
    "run_folder": ["training.run_folder", "utils.files"],
    "sharded_model": ["training.fsdp"],
    "sharding": ["utils.map_shards", "utils.files"],
    "teacher_corpus": ["distillation.teacher_corpus"],
    "teachers": ["distillation.teachers"],
    "trainer": ["training.trainer", "training.arguments", "training.batches", "training.losses"],
    "training_run": ["commands.train"],
}


class _TaskAliases(dict):
    """The registry's aliases, with `translation_ja_to_en`, `translation_ja-JP_to_en-US` and such for `translation`."""

    def __contains__(self, task: object) -> bool:
        return super().__contains__(task) or NAMED_TASK.fullmatch(str(task)) is not None

    def __missing__(self, task: str) -> str:
        return "translation"


class _TaskWithoutDefault(dict):
    """A task of the registry, for which no model is at hand where a caller names none."""

    def __missing__(self, name: str) -> NoReturn:
        if name == "default":
            raise ValueError("translation has no default model: give pipeline(…) a model=, such as a folder")
        raise KeyError(name)


def _register() -> None:
    AutoConfig.register("rs_marian", RSMarianConfig, exist_ok=True)
    AutoModel.register(RSMarianConfig, RSMarianModel, exist_ok=True)
    AutoModelForSeq2SeqLM.register(RSMarianConfig, RSMarianForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(RSMarianConfig, MarianTokenizer, exist_ok=True)
    # transformers 5.20 and later refuse the task before they look at the registry.
    getattr(pipelines, "REMOVED_TASKS", {}).pop("translation", None)
    registry = pipelines.PIPELINE_REGISTRY
    registry.register_pipeline("translation", TranslationPipeline, pt_model=AutoModelForSeq2SeqLM, type="text")
    registry.supported_tasks["translation"] = _TaskWithoutDefault(registry.supported_tasks["translation"])
    registry.task_aliases = _TaskAliases(registry.task_aliases)


_register()
MovedModules(__name__, _MOVED).install()

__all__ = [
    "RSMarianConfig",
    "RSMarianForConditionalGeneration",
    "RSMarianModel",
    "TranslationPipeline",
    "__version__",
    "collapse",
    "expand",
    "trim_vocabulary",
    "with_depth",
]
