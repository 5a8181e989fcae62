"""The stage of training: what it looks at, and what it asks of the system."""

import resource
from dataclasses import replace

import numpy as np
from test_model_trainer import TINY, asked, cell

from model import train
from model.examples import Question
from model.trainer import fit


def test_training_may_open_as_many_files_as_the_system_lets_it():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
        train.open_more_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_model_trained_without_pictures_does_not_look_at_the_first_one_that_comes(tmp_path, capsys):
    texts = asked(24)
    blind = train.sighted(cell({"image": True}), texts)
    assert blind.settings == TINY | {"image": False}
    assert capsys.readouterr().err == "no training product has a picture: the model will not look at any\n"
    assert train.sighted(cell(), texts) == cell()
    assert not capsys.readouterr().err  # it was not to look anyway
    model, processor, _, _ = fit(blind, texts, asked(6), 0, tmp_path)
    found = []
    for regions in (None, np.ones((3, 2048), np.float16)):
        product = replace(texts[0].product, regions=regions)
        found += model.extract([processor.encode(Question(product, "Color"))], processor)
    assert found[0] == found[1] != ()
    seen = replace(texts[0], product=replace(texts[0].product, regions=np.ones((1, 8), np.float16)))
    assert train.sighted(cell({"image": True}), [*texts, seen]).settings["image"]
