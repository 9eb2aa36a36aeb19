"""Texts of users and of models are text wherever they are shown: in HTML, SVG and notebooks."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch

from vitprobe import cka
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.report.page import Section, page
from vitprobe.results.drawing import render

# Closes a script, an attribute and a comment, opens an element, and has an entity; no semicolon,
# at which findings are cut into parts.
EVIL = """</script><img src=x onerror='a()'>"q" & -->&lt x"""


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def shape(self):
        """The elements and the names of their attributes."""
        return [(tag, sorted(attributes)) for tag, attributes in self.elements]


def swapped(value, old, new):
    """The same with ``old`` replaced in every text."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {swapped(key, old, new): swapped(one, old, new) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(swapped(one, old, new) for one in value)
    return value


@pytest.fixture(scope="module")
def plain():
    """A result all of whose texts from outside hold the word ``word``."""
    torch.manual_seed(0)
    nets = [timm.create_model(name, num_classes=4).eval() for name in ("test_resnet", "test_vit")]
    images = torch.randn(12, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    names = ["word a", "word b"]
    models = [wrap(net, name) for net, name in zip(nets, names)]
    result = cka.measure(models, replace(open_images(images), source="word"), batch_size=6,
                         device="cpu")  # fmt: skip
    result.meta["models"] = [{**one, "weights": "word"} for one in result.meta["models"]]
    result.meta["command"] = "word"
    result.meta["images"]["sha256"] = result.meta["versions"]["torch"] = "word"
    result.meta["precision"] = result.meta["device"] = "word"
    return replace(result, layers=np.array([f"word.{name}" for name in result.layers]))


def with_texts(result, text):
    layers = np.array(swapped(result.layers.tolist(), "word", text))
    return replace(result, meta=swapped(result.meta, "word", text), layers=layers)


def the_page(result, text):
    figure = result.plot()
    section = Section(result, figure, render(figure, "png"), f"{text}.npz", (f"{text} without",))
    missing = [(f"{text} what", f"{text} why")]
    return page([section], missing, result.meta["models"], f"{text} command", f"{text} title")


def test_no_text_of_a_report_is_an_element(plain):
    before = Elements(the_page(plain, "word"))
    after = Elements(the_page(with_texts(plain, EVIL), EVIL))
    assert after.shape() == before.shape()
    told = "".join(after.text)
    for what in ("title", "command", "what", "why", "without"):
        assert f"{EVIL} {what}" in told
    assert all("onerror" not in attributes for _, attributes in after.elements)


def test_the_numbers_within_a_report_survive(plain):
    text = the_page(with_texts(plain, EVIL), EVIL)
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)[1]
    assert f"{EVIL} a" in json.dumps(json.loads(data)).encode().decode("unicode_escape")


def test_no_text_in_a_notebook_is_an_element(plain):
    before = Elements(plain._repr_html_())
    evil = with_texts(plain, EVIL)
    after = Elements(evil._repr_html_())
    assert plain.findings()
    assert after.shape() == before.shape()
    assert f"{EVIL} a" in after.elements[0][1]["alt"]
    assert f"{EVIL} a" in "".join(after.text)


def test_no_text_in_an_svg_is_an_element(plain, tmp_path):
    evil = with_texts(plain, EVIL)
    evil.meta["title"] = EVIL
    evil.save(tmp_path / "f", ["svg"])
    told = ElementTree.fromstring((tmp_path / "f.svg").read_text(encoding="utf-8"))
    assert not [one for one in told.iter() if one.tag.rpartition("}")[2] in ("img", "script")]
    assert "onerror" in "".join(told.itertext())
