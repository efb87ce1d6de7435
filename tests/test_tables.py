"""Markdown tables that stand in columns on a terminal, too."""

import pytest

from rs_transformer.utils.tables import markdown_table


def test_columns_stand_below_each_other_and_numbers_to_the_right():
    rows = [["猫が好き", "1,234 ± 0.5", "v1"], ["a", 7, "2"], ["b|\nc", "–", ""]]
    assert markdown_table(["what", "x|y", "n"], rows).splitlines() == [
        "| what     |        x\\|y | n   |",
        "| -------- | ----------: | --- |",
        "| 猫が好き | 1,234 ± 0.5 | v1  |",
        "| a        |           7 | 2   |",
        "| b\\| c    |           – |     |",
    ]
    assert markdown_table(["a", ""], []) == "| a   |     |\n| --- | --- |"
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["a", "b"], [["c"]])
