"""The zoo: networks of torchvision, restored, merged and pruned in all their spaces."""

import pytest
import torch

from experiments import zoo
from tests.helpers import surveyed


def as_it_should_be(row):
    """What a row of the zoo has to say."""
    for kind in zoo.KINDS:
        found = row[kind]
        if kind == "merge" and "why_not" in found:
            assert "use prune or restore" in found["why_not"], row["network"]
            continue
        assert found["ok"] and found["error_at_0"] < 1e-4, (row["network"], kind)
        assert kind == "prune" or found["error_of_twins"] < 2e-3, (row["network"], kind)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_b_16", "convnext_tiny"])
def test_the_zoos_networks_would_show_a_mistake(name):
    """Their own first weights hide what happens before a head of zeros, or in branches that are scaled by 1e-6."""
    model, shape = zoo.made(name)
    x = torch.randn(1, *shape)
    wanted, space = model(x), surveyed(model, shape).spaces[-1]
    model.get_parameter(space.writers[0].name).mul_(2)
    assert (model(x) - wanted).abs().max() > 0.01 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf", "efficientnet_b0", "squeezenet1_1"])
def test_torchvisions_networks(name):
    """One of each kind: `make zoo` tries them all."""
    row = zoo.tried(name)
    as_it_should_be(row)
    whole = set(row["left_out"].values()) - {"it is an output of the network"}
    whole = [
        why for why in whole if why != "the forward pass never calls it in evaluation"
    ]  # of the heads for training
    nested = "it is inside of, or around, what is dropped instead"  # the groups of a convolution, or what is in a group
    assert all(why == nested for why in whole) and (not whole or name == "regnet_y_400mf")


def test_the_zoo_has_only_torchvisions_networks(capsys):
    assert zoo.main(["resnet18", "resnet19"]) == 2
    assert capsys.readouterr().err == "torchvision has no classification network resnet19\n"


def test_every_row_of_the_zoo_is_as_it_should_be():
    measured = [row for row in zoo.rows.load(zoo.FOLDER / "rows.jsonl") if "prune" in row]
    assert len(measured) > 40
    for row in measured:
        as_it_should_be(row)


def test_the_table_of_the_zoo_matches_its_rows():
    assert zoo.TABLE.read_text() == zoo.table(zoo.rows.load(zoo.FOLDER / "rows.jsonl"))
