import numpy as np
import pytest

from model.examples import Product, Question
from model.probe import Probe, pool, visible_value

COLORS = np.eye(3, 8) * 4  # one direction of feature space per color


def question(color, noise, *, image=True, origin="visible"):
    values = ("red", "green", "blue")
    regions = None
    if image:
        regions = np.stack([noise[:8], COLORS[color] + noise[8:]]).astype(np.float16)
    product = Product("B000000001", "B000000001", "Mugs", (), regions=regions)
    return Question(product, "Color", (values[color],), (origin,))


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(size=(120, 16)) * 0.3


def test_pooled_features_are_the_whole_image_and_the_mean():
    regions = np.array([[1, 2], [3, 6]], np.float16)
    product = Product("B000000001", "B000000001", "Mugs", (), regions=regions)
    assert pool(product).tolist() == [3, 6, 2, 4]
    assert pool(Product("B000000001", "B000000001", "Mugs", ())) is None


def test_values_that_can_be_told_linearly_are_told(noise):
    probe = Probe()
    for number in range(90):
        probe.observe(question(number % 3, noise[number]))
    probe.fit()
    asked = [question(number % 3, noise[number]) for number in range(90, 120)]
    assert [probe.predict(one) for one in asked] == [one.values for one in asked]


def test_only_visible_values_with_an_image_teach(noise):
    probe = Probe()
    probe.observe(question(0, noise[0], origin="text"))
    probe.observe(question(1, noise[1], image=False))
    probe.fit()
    assert probe.predict(question(0, noise[2])) == ()


def test_a_single_known_value_is_always_said_and_no_image_gives_nothing(noise):
    probe = Probe()
    probe.observe(question(1, noise[0]))
    probe.fit()
    assert probe.predict(question(0, noise[1])) == ("green",)
    assert probe.predict(question(0, noise[1], image=False)) == ()


def test_the_first_visible_value_is_the_label():
    product = Product("B000000001", "B000000001", "Mugs", ())
    one = Question(product, "Color", ("Red", "The Blue"), ("text", "visible"))
    assert visible_value(one) == "blue"
