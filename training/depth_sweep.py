"""Quality against speed of one recurrently stacked checkpoint at many depths, before and after fine-tuning.

    python training/depth_sweep.py --model_name_or_path runs/tanaka_rs6 --decoder_depths 6 5 4 3 2 1 \\
        --finetuned runs/decoder2 runs/decoder1 --source_lang ja --target_lang en \\
        --test_file data/tanaka/test.jsonl --num_beams 1 --output_file sweep.json --plot_file sweep.png

More in `--help`; the work is done in `rs_transformer.commands.depth_sweep`.
"""

from rs_transformer.commands.depth_sweep import main
from rs_transformer.utils.processes import run

if __name__ == "__main__":
    run(main)
