"""Networks of other libraries: the command that tries them, and its table."""

import pytest

from experiments import families, rows


def test_a_network_is_tried():
    row = families.tried("torchvision:squeezenet1_1")
    assert 0.5 < row["left"] / row["parameters"] < 0.7 and row["own_class"] and row["error_at_0"] < 1e-4
    assert "torchvision:squeezenet1_1" in families.table([row]) and "1 of 1 networks get smaller" in families.table(
        [row]
    )


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_transformers_lose_heads_and_feed_forward_widths(name):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[families]'")
    row = families.tried(f"transformers:{name}")
    assert row["left"] < 0.7 * row["parameters"] and row["own_class"] and row["error_at_0"] < 1e-4


def test_the_table_matches_its_rows():
    measured = rows.load(families.PATH)
    assert families.TABLE.read_text(encoding="utf-8") == families.table(measured)
    tried = [row for row in measured if "left" in row]
    assert len(tried) >= 0.95 * len(measured) and all(row["left"] < row["parameters"] for row in tried)
    assert all(row["error_at_0"] < 1e-4 for row in tried)


def test_an_unknown_library_is_one_line(capsys):
    assert families.main(["keras:Model"]) == 2
    assert (
        capsys.readouterr().err == "keras:Model: give LIBRARY:NAME, with a library of timm, transformers, torchvision\n"
    )
