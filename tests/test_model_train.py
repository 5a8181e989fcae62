"""Training: batches, resuming after a kill, broken checkpoints, divergence, several processes."""

import json
import math
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import smartave, train
from model.encoder import EncoderLayer
from model.examples import Evidence, Product, Question

COLORS = ("red", "green", "blue")
TINY = {
    "image": False,
    "pretrained": None,
    "tokenizer": "characters",
    "hidden_size": 16,
    "encoder_heads": 2,
    "decoder_heads": 2,
    "intermediate_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.1,
    "max_length": 32,
}
STEPS = {"batch_size": 8, "epochs": 4, "learning_rate": 0.003, "warmup_steps": 2, "evaluations": 3}
FEW_TOKENS = 80  # four rows of the shorter texts, three of the longer ones


def asked(number):
    """Colors in titles of two lengths."""
    found = []
    for i in range(number):
        color, item = COLORS[i % 3], f"B{i:09}"
        product = Product(item, item, "Mugs", ((f"Nice {color} mug" + " for tea" * (i % 2), "title"),))
        found.append(
            Question(product, "Color", (color,), ("text",), (Evidence(color, 0, 5, 5 + len(color)),))
        )
    return found


def cell(settings=(), **steps):
    return train.Cell(
        architecture="model.smartave", code="", settings=TINY | dict(settings), train=STEPS | steps
    )


def fit(folder, the_cell=None):
    model, _, history, _ = train.fit(the_cell or cell(), asked(24), asked(6), 0, Path(folder))
    return model.state_dict(), history


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("uninterrupted"))


class Killed(BaseException):
    """Not an error that anybody handles."""


def killed_at(step, folder, monkeypatch):
    def watch(self, loss, at):
        if at == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train.Divergence, "watch", watch)
        with pytest.raises(Killed):
            fit(folder)


def same_weights(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_killed_and_run_again_gives_equal_weights_bit_by_bit(uninterrupted, tmp_path, monkeypatch):
    killed_at(6, tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    weights, history = fit(tmp_path)
    assert same_weights(weights, uninterrupted[0])
    assert history == uninterrupted[1]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "unsealed"])
def test_a_damaged_last_checkpoint_is_left_for_the_one_before(uninterrupted, tmp_path, monkeypatch, damage):
    killed_at(10, tmp_path, monkeypatch)
    last = tmp_path / "checkpoint-8"
    weights = last / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (last / "optimizer.pt").unlink()
    else:
        (last / train.WHOLE).unlink()
    assert train.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not last.exists()
    if damage == "truncated":
        assert same_weights(fit(tmp_path)[0], uninterrupted[0])


def test_a_loss_that_is_not_a_number_stops_the_training_with_a_message(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: training stops"):
        fit(tmp_path, cell(learning_rate=1e30, warmup_steps=0))


def test_a_loss_that_grows_stops_the_training_with_a_message():
    divergence = train.Divergence(window=3)
    for step, loss in enumerate((2.0, 2.0, 2.0, 9.0, 2.0, 10.0)):
        divergence.watch(loss, step)
    with pytest.raises(ValueError, match=r"the loss is 7.33 at step 6, 2 before: training diverges"):
        divergence.watch(10.0, 6)


@pytest.fixture
def numbers_of_parts(monkeypatch):
    """Of every batch that is computed, filled while the test goes on."""
    numbers, parts = [], train.parts

    def noted(rows, tokens):
        found = parts(rows, tokens)
        numbers.append(len(found))
        return found

    monkeypatch.setattr(train, "parts", noted)
    return numbers


@pytest.mark.parametrize("joint", [False, True])
def test_a_batch_computed_in_parts_is_the_same_batch(tmp_path, joint, numbers_of_parts):
    settings, steps = {"dropout": 0.0, "joint": joint}, {"batch_size": 10}
    _, whole = fit(tmp_path / "whole", cell(settings, **steps))
    assert set(numbers_of_parts) == {1}
    _, parts = fit(tmp_path / "parts", cell(settings, **steps, max_tokens=FEW_TOKENS))
    assert max(numbers_of_parts) == 4
    assert [row["step"] for row in parts] == [row["step"] for row in whole] == [4, 8, 12]
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["validation_f1"] == b["validation_f1"]


def test_a_part_of_a_baseline_s_batch_counts_by_its_rows(tmp_path, numbers_of_parts):
    cut = {name: value for name, value in TINY.items() if not name.startswith(("decoder", "image"))}
    cut |= {"max_length": 12, "dropout": 0.0}  # all rows have as many tokens

    def of(**steps):
        return train.Cell(
            architecture="model.baselines.bert_tagger", code="", settings=cut, train=STEPS | steps
        )

    _, whole = fit(tmp_path / "whole", of(batch_size=10))
    assert set(numbers_of_parts) == {1}
    _, parts = fit(tmp_path / "parts", of(batch_size=10, max_tokens=40))  # rows: 3, 3, 3, 1
    assert max(numbers_of_parts) == 4
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], abs=1e-5)


@dataclass
class Sized:
    num_asking: int
    of_product: int

    @property
    def num_tokens(self):
        return self.num_asking + self.of_product


A_ROW = st.lists(st.builds(Sized, st.integers(1, 9), st.just(7)), min_size=1, max_size=3)


@given(st.lists(A_ROW, min_size=1), st.integers(1, 200))
def test_parts_are_as_long_as_may_be_and_no_row_is_lost_or_moved(rows, tokens):
    found = train.parts(rows, tokens)
    assert [row for part in found for row in part] == rows

    def padded(part):
        return len(part) * max(map(train.num_tokens, part))

    assert all(padded(part) <= tokens or len(part) == 1 for part in found)
    assert all(padded([*part, following[0]]) > tokens for part, following in pairwise(found))


@pytest.mark.parametrize("joint", [False, True])
def test_the_tokens_of_a_row_are_those_that_are_computed(joint):
    settings = smartave.Settings.model_validate(TINY | {"joint": joint})
    _, processor = smartave.Model.start(settings, asked(3), 1)
    names = ("Color", "Size", "Scent") if joint else ("Color",)
    product = asked(1)[0].product
    row = [processor.encode(Question(product, name)) for name in names]
    assert train.num_tokens(row) == (processor.collate(row)["segment"] >= 0).sum()


def test_the_paper_s_batch_is_computed_at_once():
    row = [Sized(num_asking=3, of_product=1021)]
    assert len(train.parts([row] * 32, train.Settings().max_tokens)) == 1


def test_a_small_budget_bounds_what_is_judged_at_once_as_well():
    processor = mock.Mock(max_length=100)
    assert train.judged_at_once(cell(batch_size=8), processor) == 16
    assert train.judged_at_once(cell(batch_size=8, max_tokens=300), processor) == 6
    assert train.judged_at_once(cell(batch_size=8, max_tokens=1), processor) == 2


def test_validation_is_judged_by_that_bound(tmp_path, monkeypatch):
    judge = mock.Mock(return_value=[])
    monkeypatch.setattr(train, "judge", judge)
    fit(tmp_path, cell(epochs=0.5, max_tokens=2 * TINY["max_length"]))
    assert {call.args[3] for call in judge.call_args_list} == {4}


def test_training_may_open_as_many_files_as_the_system_lets_it():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] // 2, before[1]))
        train.open_more_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_batch_that_the_processes_do_not_divide_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"train.batch_size is 8, which 3 processes do not divide"):
        fit(tmp_path)


def test_bfloat16_trains_weights_of_float32_by_one_fused_optimiser(tmp_path, monkeypatch):
    made, init = [], torch.optim.AdamW.__init__

    def noted(self, *args, **options):
        made.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", noted)
    weights, history = fit(tmp_path, cell(precision="bfloat16"))
    assert [options["fused"] for options in made] == [True]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert history[-1]["loss"] < history[0]["loss"]
    exact, _ = fit(tmp_path / "float32", cell())
    assert not torch.equal(weights["encoder.layers.0.output.weight"], exact["encoder.layers.0.output.weight"])


def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    feed_forward = torch.compile(EncoderLayer.feed_forward, dynamic=True, backend="aot_eager")
    called = mock.Mock(side_effect=feed_forward)
    monkeypatch.setattr("model.packed.compiled_feed_forward", called)
    weights, _ = fit(tmp_path / "plain", cell({"dropout": 0.0}))
    assert not called.called
    compiled, _ = fit(tmp_path / "compiled", cell({"dropout": 0.0, "compile": True}))
    assert called.called
    assert list(weights) == list(compiled)
    for name, weight in weights.items():
        torch.testing.assert_close(compiled[name], weight)


def test_half_an_epoch_is_half_the_steps_and_resumed_at_its_end_no_more(tmp_path):
    weights, history = fit(tmp_path, cell(epochs=1.5))
    assert history[-1]["step"] == 5  # of 3 an epoch
    again, same_history = fit(tmp_path, cell(epochs=1.5))
    assert same_history == history
    assert same_weights(again, weights)


def test_a_warm_up_that_outlasts_the_training_is_told(tmp_path, capsys):
    fit(tmp_path, cell(epochs=0.5, warmup_steps=9))
    told = capsys.readouterr().err
    assert "train.warmup_steps is 9 and the training has 2 steps: it ends before" in told


def test_batches_are_a_function_of_seed_and_epoch_and_of_similar_length():
    lengths = [i * 37 % 101 for i in range(70)]
    order = train.batch_order(lengths, 8, 0, 0)
    assert sorted(order) == list(range(70))
    assert order == train.batch_order(lengths, 8, 0, 0)
    assert len({tuple(train.batch_order(lengths, 8, *other)) for other in ((0, 0), (0, 1), (1, 0))}) == 3
    spreads = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
        for k in range(0, 64, 8)
    ]
    assert sum(spreads) / len(spreads) < 20  # of 100


def test_every_epoch_has_its_own_order(tmp_path, monkeypatch):
    seen = []

    def order(lengths, batch_size, seed, epoch):
        seen.append(epoch)
        return list(range(len(lengths)))

    monkeypatch.setattr(train, "batch_order", order)
    fit(tmp_path)
    assert seen == [0, 1, 2, 3]


def test_rows_are_questions_or_with_joint_products():
    first, second = (question.product for question in asked(2))
    questions = [Question(first, "Color"), Question(first, "Size"), Question(second, "Color")]
    assert [len(row) for row in train.rows(questions, joint=False)] == [1, 1, 1]
    assert [len(row) for row in train.rows(questions, joint=True)] == [2, 1]


def test_a_model_trained_without_pictures_does_not_look_at_the_first_one_that_comes(tmp_path, capsys):
    texts = asked(24)
    blind = train.sighted(cell({"image": True}), texts)
    assert blind.settings == TINY | {"image": False}
    assert capsys.readouterr().err == "no training product has a picture: the model will not look at any\n"
    assert train.sighted(cell(), texts) == cell()
    assert not capsys.readouterr().err  # it was not to look anyway
    model, processor, _, _ = train.fit(blind, texts, asked(6), 0, tmp_path)
    found = []
    for regions in (None, np.ones((3, 2048), np.float16)):
        product = replace(texts[0].product, regions=regions)
        found += model.extract([processor.encode(Question(product, "Color"))], processor)
    assert found[0] == found[1] != ()
    seen = replace(texts[0], product=replace(texts[0].product, regions=np.ones((1, 8), np.float16)))
    assert train.sighted(cell({"image": True}), [*texts, seen]).settings["image"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_model_train as here

def die(checkpoint):
    if checkpoint.name.endswith("-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    seal(checkpoint)

seal, here.train.seal = here.train.seal, die
here.fit({folder!r})
"""


def test_a_process_killed_while_it_saves_goes_on_from_the_checkpoint_before(uninterrupted, tmp_path):
    script, here = tmp_path / "run.py", Path(__file__).parent
    script.write_text(KILLED.format(tests=str(here), root=str(here.parent), folder=str(tmp_path / "saved")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert train.last_whole_checkpoint(tmp_path / "saved") == str(tmp_path / "saved" / "checkpoint-4")
    weights, history = fit(tmp_path / "saved")
    assert history == uninterrupted[1]
    assert same_weights(weights, uninterrupted[0])


PROCESS = """
import json, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_model_train as this
_, history = this.fit({folder!r}, this.cell({settings!r}, **{steps!r}))
if os.environ["RANK"] == "0":
    open({output!r}, "w").write(json.dumps(history))
"""


@pytest.mark.parametrize(
    ("more", "steps"),
    [({}, {"max_tokens": FEW_TOKENS}), ({"without_patterns": ["h2h"]}, {})],
    ids=["in parts", "a pattern left out"],
)
def test_two_processes_have_the_loss_curve_of_one(tmp_path, more, steps):
    settings = {"dropout": 0.0, **more}
    here, output = Path(__file__).parent, tmp_path / "history.json"
    script = tmp_path / "run.py"
    where = {"folder": str(tmp_path / "two"), "output": str(output), "settings": settings, "steps": steps}
    script.write_text(PROCESS.format(tests=str(here), root=str(here.parent), **where))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(output.read_text())
    _, one = fit(tmp_path / "one", cell(settings))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert math.isfinite(a["validation_loss"])
        assert a["validation_f1"] == b["validation_f1"]
