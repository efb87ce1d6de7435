"""Other engines, a file for each, imported when it is needed, since it needs the engine's package.

Each has `QUANTIZATIONS` (the first changes nothing), `convert(model, output_dir, quantization, revision)`, which
writes a folder, and `load(folder, tokenizer, decoding)`, which gives a `decoding.Engine` of it. `commands/export.py`
chooses among them and verifies what they write.
"""
