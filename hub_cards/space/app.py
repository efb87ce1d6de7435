"""Translate with a recurrently stacked model, with as many decoder steps as you like, and see where each step looks.

    python hub_cards/space/app.py                        # with the model beside this folder
    MODEL=org/rs-marian-ja-en python hub_cards/space/app.py

A Gradio app, laid out as a Hub Space. It keeps of a visitor what was typed and its translation, and nothing else.
"""

import gc
import html
import os
import re
import sys
import time
from functools import cache
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import Pipeline, PreTrainedTokenizerBase, pipeline

from rs_transformer import RSMarianForConditionalGeneration, with_depth
from rs_transformer.attention.collection import collect_attention
from rs_transformer.attention.figures import draw_step
from rs_transformer.checkpoints import load_translator
from rs_transformer.export.examples import EXAMPLES
from rs_transformer.layer_transfer import OWN_TO_STEPS
from rs_transformer.pipeline_rs_marian import split_code, split_into_sentences
from rs_transformer.utils.plotting import Lettering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Recurrently stacked translation"
MODEL = os.environ.get("MODEL", str(Path(__file__).resolve().parents[1] / "rs-marian-ja-en"))
MAX_CHARACTERS = 2000
MAX_SENTENCES = 20
DEEPEST = 6
MAX_BODY = 2**20  # bytes of a request
MAX_IGNORED = 2**26  # bytes that are waited for before a larger request is refused
LARGEST_SIDE = 4000  # pixels of a picture

Rows = list[list[str | float]]


class Translated(NamedTuple):
    """What a visitor's page shows, and the server keeps as long as the page is open: no attention, which is large."""

    depth: int
    pairs: list[tuple[str, str]]


class RefuseLargeRequests:
    """Takes the requests of the page, and none that is larger than any of these or uploads a file."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self.reason(scope) if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") else None
        if reason is None:
            await self.app(scope, receive, send)
            return
        # Nothing is kept, but a browser reads no answer before it has sent all.
        left = MAX_IGNORED
        while left > 0 and (message := await receive()).get("more_body"):
            left -= len(message["body"])
        await JSONResponse({"detail": reason, "error": reason}, 413)(scope, receive, send)

    @staticmethod
    def reason(scope: Scope) -> str | None:
        if not re.search("/(queue|call|run|api|reset|cancel)(/|$)", scope["path"].replace("/gradio_api/", "/", 1)):
            return "This demo takes no files."
        # The server reads as much as is announced, and no more.
        length = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return f"This demo takes {MAX_CHARACTERS:,} characters at most."
        return None


def load_model() -> tuple[RSMarianForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Raises:
        ValueError, OSError: there is none, or it is another one than an RSMarian.
    """
    model, tokenizer = load_translator(MODEL)
    if not isinstance(model, RSMarianForConditionalGeneration):
        raise ValueError(f"it is a {model.config.model_type} model, whose depth is fixed, and must be an RSMarian")
    return model, tokenizer


@cache
def translator(depth: int) -> Pipeline:
    """A translation pipeline at a decoder depth; all share their weights."""
    deeper = with_depth(model, decoder_layers=depth)
    own = deeper.state_dict()
    fitting = {
        name: weights
        for name, weights in model.state_dict().items()
        if name in own and own[name].shape == weights.shape
    }
    deeper.load_state_dict(fitting, strict=False, assign=True)
    pipe = pipeline("translation", model=deeper, tokenizer=tokenizer)
    pipe("1", max_new_tokens=1)  # what is done once, is done
    return pipe


def refuse(why: str) -> gr.Error:
    return gr.Error(html.escape(why), print_exception=False)


def translate(text: str | None, depth: int | None) -> tuple[Rows, Translated]:
    """Translate sentence by sentence: a table with the time of each, and what may be looked into."""
    text = text or ""
    if len(text) > MAX_CHARACTERS:
        raise refuse(f"{len(text):,} characters are too many at once: {MAX_CHARACTERS:,} at most.")
    if not (isinstance(depth, int) and shallowest <= depth <= deepest):
        raise refuse(f"The decoder depth must be {shallowest} to {deepest}.")
    sentences = [sentence for line in text.splitlines() for sentence in split_into_sentences(line)]
    if not sentences:
        raise refuse("Type a sentence to translate.")
    if len(sentences) > MAX_SENTENCES:
        raise refuse(f"{len(sentences)} sentences are too many at once: {MAX_SENTENCES} at most.")
    longest = model.config.max_position_embeddings
    lengths = [len(ids) for ids in tokenizer(sentences, verbose=False)["input_ids"]]
    for sentence, length in zip(sentences, lengths, strict=True):
        if length > longest:
            raise refuse(f"This sentence is longer than the {longest} tokens that the model takes: {sentence[:40]}…")
    translate_one = translator(depth)
    rows: Rows = []
    for sentence, length in zip(sentences, lengths, strict=True):
        start = time.perf_counter()
        # A decoder that is too shallow does not find the end.
        (result,) = translate_one(sentence, max_new_tokens=2 * length + 32)
        rows.append([sentence, result["translation_text"], round(1000 * (time.perf_counter() - start), 1)])
    # Too shallow a decoder may give an empty translation, which has nothing to look into, or one that it cannot read.
    pairs = [(source, target) for source, target, _ in rows if target.strip()]
    read = [len(tokenizer(text_target=target, verbose=False)["input_ids"]) <= longest for _, target in pairs]
    return rows, Translated(depth, list(compress(pairs, read)))


def to_look_at(translated: Translated) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sentences and the steps to choose from, as properties of what one chooses with."""
    sentences = [(source, index) for index, (source, _) in enumerate(translated.pairs)]
    steps = list(range(1, translated.depth + 1))
    return (
        {"choices": sentences, "value": 0 if sentences else None, "visible": bool(sentences)},
        {"choices": steps, "value": translated.depth, "visible": bool(sentences)},
    )


def answer(text: str | None, depth: int | None) -> tuple[Rows, Translated, gr.Dropdown, gr.Radio]:
    """What becomes of the page when somebody has text translated."""
    rows, translated = translate(text, depth)
    sentences, steps = to_look_at(translated)
    return rows, translated, gr.Dropdown(**sentences), gr.Radio(**steps)


def show_step(translated: Translated | None, sentence: int | None, step: int | None) -> "Figure | None":
    """The cross-attention of one step, as a picture; the decoder is forced to the translation."""
    if (
        translated is None
        or sentence not in range(len(translated.pairs))
        or step not in range(1, translated.depth + 1)
    ):
        return None
    gc.collect()  # the picture before: tens of megabytes in a circle of objects
    source, target = translated.pairs[sentence]
    (attention,) = collect_attention(translator(translated.depth).model, tokenizer, [source], [target])
    figure = draw_step(attention, "cross_attentions", step - 1)
    figure.set_dpi(min(figure.dpi, LARGEST_SIDE / max(figure.get_size_inches())))
    return figure


def examples() -> list[str]:
    """Text in the model's source language, if there is some."""
    return EXAMPLES.get(split_code(tokenizer.source_lang)[0], [])


def introduction() -> str:
    """What the model is and, if so, that its characters cannot be drawn."""
    languages = " to ".join(filter(None, (tokenizer.source_lang, tokenizer.target_lang))).replace("`", "")
    text = (
        f"# {TITLE}\n"
        f"`{Path(MODEL).name}`{f', `{languages}`' if languages else ''}: "
        f"{model.num_parameters(only_trainable=True):,} parameters, {model.config.encoder_unique_layers} encoder "
        f"layer(s) in {model.config.encoder_layers} steps, {shallowest} decoder layer(s). It was trained with "
        f"**{model.config.decoder_layers} decoder steps**; with another number it needs no other weights, and "
        "translates worse."
    )
    characters = {character for piece in tokenizer.get_vocab() for character in piece}
    missing = Lettering(characters).missing
    if len(missing) > len(characters) / 10:
        text += (
            f"\n\nNo font of the server has {' '.join(sorted(missing)[-3:])} and the like: the pictures show �"
            " until one is installed there, for example by Debian's package fonts-noto-cjk."
        )
    return text


def build_page() -> gr.Blocks:
    """The page of the model, which begins with the first example translated."""
    own, texts = model.config.decoder_layers, examples()
    rows, first = translate(texts[0], own) if texts else ([], Translated(own, []))
    sentences, steps = to_look_at(first)
    with gr.Blocks(title=TITLE) as page:
        gr.Markdown(introduction())
        with gr.Row():
            with gr.Column():
                hint = f"At most {MAX_SENTENCES} sentences, {MAX_CHARACTERS:,} characters"
                text = gr.Textbox("".join(texts[:1]), label="Text", placeholder=hint, lines=3, elem_id="text")
                depth = gr.Slider(
                    shallowest,
                    max(deepest, shallowest + 1),
                    visible=deepest > shallowest,
                    value=own,
                    step=1,
                    precision=0,
                    label="Decoder depth (steps)",
                    elem_id="depth",
                )
                button = gr.Button("Translate", variant="primary", elem_id="translate")
                if texts:
                    gr.Examples(texts, text)
            with gr.Column():
                headers = ["source", "translation", "ms"]
                table = gr.Dataframe(rows, headers=headers, label="Translation", wrap=True, elem_id="table")
        with gr.Row():
            sentence = gr.Dropdown(**sentences, label="Attention of the sentence", elem_id="sentence")
            step = gr.Radio(**steps, label="Decoder step", elem_id="step")
        plot = gr.Plot(show_step(first, 0, own), label="Cross-attention, mean of the heads", elem_id="attention")
        translated = gr.State(first, time_to_live=3600)

        shown = [translated, sentence, step]
        done = gr.on([button.click, text.submit], answer, [text, depth], [table, *shown], api_name="translate")
        done.success(show_step, shown, plot, api_name="show_step")
        gr.on([sentence.input, step.input], show_step, shown, plot, show_progress="hidden", api_name=False)
    return page


def build_notice(why: str) -> gr.Blocks:
    """A page that says why there is no model."""
    print(why, file=sys.stderr)
    with gr.Blocks(title=TITLE) as page:
        gr.Markdown(f"# {TITLE}")
        gr.Textbox(why, label="There is no model", interactive=False, elem_id="notice")
    return page


try:
    model, tokenizer = load_model()
except (OSError, ValueError) as error:
    demo = build_notice(
        f"MODEL is {MODEL!r}, which cannot be loaded: {str(error).splitlines()[0]}. Set the variable MODEL to a "
        "folder or a Hub id, org/name, of a model that rs-transformer has made."
    )
else:
    shallowest = model.config.decoder_unique_layers
    deepest = max(model.config.decoder_layers, DEEPEST)
    if any(getattr(model.config, name) for name in OWN_TO_STEPS):
        deepest = model.config.decoder_layers  # of which there are no more
    demo = build_page()
    for depth in range(shallowest, deepest + 1):
        translator(depth)  # so that no visitor waits for it
demo.queue(max_size=32)
gc.freeze()  # what is there now stays, and need not be looked through for each picture


if __name__ == "__main__":
    demo.launch(state_session_capacity=1000, app_kwargs={"middleware": [Middleware(RefuseLargeRequests)]})
