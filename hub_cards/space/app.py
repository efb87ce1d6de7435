"""Translate with a recurrently stacked model, with as many decoder steps as you like, and see where each step looks.

    python hub_cards/space/app.py                        # with the model beside this folder
    MODEL=org/rs-marian-ja-en python hub_cards/space/app.py

A Gradio app, laid out as a Hub Space.
"""

import os
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Pipeline, pipeline

from rs_transformer import with_depth
from rs_transformer.attention.collection import SentenceAttention, collect_attention
from rs_transformer.attention.figures import draw_step
from rs_transformer.pipeline_rs_marian import split_into_sentences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL = os.environ.get("MODEL", str(Path(__file__).resolve().parents[1] / "rs-marian-ja-en"))
EXAMPLES = ["彼は水泳が得意だ。", "猫が好きです。彼女は毎朝七時に起きる。"]
MAX_SENTENCES = 20
MAX_NEW_TOKENS = 64  # a decoder that is too shallow does not find the end
DEEPEST = 6

Rows = list[list[str | float]]

tokenizer = AutoTokenizer.from_pretrained(MODEL)
# Eager from the start, since looking into attention would switch it for everybody at that moment.
model = AutoModelForSeq2SeqLM.from_pretrained(MODEL, attn_implementation="eager").eval()


@cache
def translator(depth: int) -> Pipeline:
    """A translation pipeline at a decoder depth; each has the weights once more, which are few."""
    pipe = pipeline("translation", model=with_depth(model, decoder_layers=depth), tokenizer=tokenizer)
    pipe("。", max_new_tokens=1)  # what is done once, is done
    return pipe


def translate(text: str, depth: int) -> tuple[Rows, list[SentenceAttention], gr.Dropdown, gr.Radio]:
    """Translate sentence by sentence: a table with the time of each, and their attention."""
    sentences = [sentence for line in text.splitlines() for sentence in split_into_sentences(line)]
    if not sentences:
        raise gr.Error("Type a sentence to translate.")
    if len(sentences) > MAX_SENTENCES:
        raise gr.Error(f"{len(sentences)} sentences are too many at once: {MAX_SENTENCES} at most.")
    longest = model.config.max_position_embeddings
    for sentence in sentences:
        if len(tokenizer(sentence, verbose=False)["input_ids"]) > longest:
            raise gr.Error(f"This sentence is longer than the {longest} tokens that the model takes: {sentence[:40]}…")
    translate_one = translator(depth)
    rows: Rows = []
    for sentence in sentences:
        start = time.perf_counter()
        (result,) = translate_one(sentence, max_new_tokens=MAX_NEW_TOKENS)
        rows.append([sentence, result["translation_text"], round(1000 * (time.perf_counter() - start), 1)])
    # Forced to the translations; an empty one, which too shallow a decoder may give, has nothing to look into.
    pairs = [(source, target) for source, target, _ in rows if target.strip()]
    attention = (
        collect_attention(translate_one.model, tokenizer, *map(list, zip(*pairs, strict=True))) if pairs else []
    )
    choices = [(source, index) for index, (source, _) in enumerate(pairs)]
    return (
        rows,
        attention,
        gr.Dropdown(choices, value=0 if choices else None),
        gr.Radio(list(range(1, depth + 1)), value=depth),
    )


def show_step(attention: list[SentenceAttention], sentence: int | None, step: int | None) -> "Figure | None":
    """The cross-attention of one step, as a picture."""
    if None in (sentence, step) or not attention:
        return None
    return draw_step(attention[sentence], "cross_attentions", step - 1)


with gr.Blocks(title="Recurrently stacked translation") as demo:
    own, shallowest = model.config.decoder_layers, model.config.decoder_unique_layers
    gr.Markdown(
        f"# Recurrently stacked translation\n"
        f"`{Path(MODEL).name}`, {' to '.join(filter(None, (tokenizer.source_lang, tokenizer.target_lang)))}: "
        f"{model.num_parameters(only_trainable=True):,} parameters, {model.config.encoder_unique_layers} encoder "
        f"layer(s) in {model.config.encoder_layers} steps, {shallowest} decoder layer(s). It was trained with "
        f"**{own} decoder steps**; with another number it needs no other weights, and translates worse."
    )
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(EXAMPLES[0], label="Text", lines=3, elem_id="text")
            depth = gr.Slider(
                shallowest,
                max(own, DEEPEST, shallowest + 1),
                value=own,
                step=1,
                precision=0,
                label="Decoder depth (steps)",
                elem_id="depth",
            )
            button = gr.Button("Translate", variant="primary", elem_id="translate")
            gr.Examples(EXAMPLES, text)
        with gr.Column():
            table = gr.Dataframe(
                headers=["source", "translation", "ms"], label="Translation", wrap=True, elem_id="table"
            )
    with gr.Row():
        sentence = gr.Dropdown([], label="Attention of the sentence", elem_id="sentence")
        step = gr.Radio([], label="Decoder step", elem_id="step")
    plot = gr.Plot(label="Cross-attention, mean of the heads", elem_id="attention")
    attention = gr.State([])

    shown = [attention, sentence, step]
    translated = gr.on([button.click, text.submit], translate, [text, depth], [table, *shown])
    translated.then(show_step, shown, plot)
    gr.on([sentence.input, step.input], show_step, shown, plot, show_progress="hidden")


if __name__ == "__main__":
    demo.launch()
