"""How a cell is trained: by transformers' Trainer, in parts of batches, from sealed checkpoints."""

import importlib
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from model import batches
from model.cell import Cell
from model.checkpoint import extract
from model.examples import Question
from model.metrics import normalise
from model.pretrained import taken
from pipeline.disk import check_room, sha256_of, write_json

WHOLE = "whole.json"  # the seal of a checkpoint that was written to its end
KEPT = 2  # checkpoints: should the last one be damaged, the one before it is gone on with


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, and of which bytes."""
    files = {path.name: sha256_of(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
    write_json(files, checkpoint / WHOLE)


def is_whole(checkpoint: Path) -> bool:
    """Whether it was sealed and every file still has the bytes that it had then."""
    seal = checkpoint / WHOLE
    if not seal.is_file():
        return False
    files = json.loads(seal.read_text())
    return all(
        (checkpoint / name).is_file() and sha256_of(checkpoint / name) == files[name] for name in files
    )


def can_go_on(checkpoint: Path) -> bool:
    """Whether it is whole, and so is the best one until then, whose weights may be those that come out."""
    if not is_whole(checkpoint):
        return False
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
    return best is None or is_whole(checkpoint.with_name(Path(best).name))


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint with all of its bytes and those of the best; newer ones without are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        if can_go_on(checkpoint):
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None


class Divergence:
    """Raises `ValueError` when the loss is not a number or grows instead of falling.

    What counts is the mean over `window` steps: three times the smallest one so far is divergence.
    """

    def __init__(self, window: int = 50) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.least = math.inf

    def watch(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: training stops; lower train.learning_rate")
        self.recent.append(loss)
        if len(self.recent) == self.recent.maxlen:
            mean = sum(self.recent) / len(self.recent)
            self.least = min(self.least, mean)
            if mean > 3 * self.least + 1:
                raise ValueError(
                    f"the loss is {mean:.3g} at step {step}, {self.least:.3g} before: training diverges "
                    "and stops; lower train.learning_rate or raise train.warmup_steps"
                )


def curves(log: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The trainer's log as one row per look at the validation split, without its clock readings."""
    names = {
        "loss": "loss",
        "eval_loss": "validation_loss",
        "eval_f1": "validation_f1",
        "learning_rate": "learning_rate",
        "epoch": "epoch",
    }
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        row = {names[name]: round(float(value), 6) for name, value in entry.items() if name in names}
        rows.setdefault(entry["step"], {"step": entry["step"]}).update(row)
    return [row for row in rows.values() if "validation_loss" in row]


def judge(model: Any, processor: Any, asked: Sequence[Question], batch_size: int) -> list[dict[str, Any]]:
    """What the model says on `asked`: one row per value, for choosing a threshold on its score."""
    rows = []
    found = extract(model, processor, asked, batch_size=batch_size)
    for question, extractions in zip(asked, found, strict=True):
        gold = {normalise(value) for value in question.values}
        rows += [
            {
                "attribute": question.attribute,
                "score": round(extraction.score, 6),
                "correct": normalise(extraction.value) in gold,
            }
            for extraction in extractions
        ]
    return rows


def f1(rows: Sequence[dict[str, Any]], asked: Sequence[Question]) -> float:
    """Set-based micro F1 of judged extractions."""
    gold = sum(len({normalise(value) for value in question.values}) for question in asked)
    right = sum(row["correct"] for row in rows)
    return 2 * right / (len(rows) + gold) if rows or gold else 0.0


def judged_at_once(cell: Cell, processor: Any) -> int:
    """Rows of the validation split: twice as many as `max_tokens` has room for, since no gradient is held."""
    return 2 * min(cell.train.batch_size, max(1, cell.train.max_tokens // processor.max_length))


class Rows(torch.utils.data.Dataset):
    """Read batch by batch, a batch as its parts: of how many rows, and these collated."""

    def __init__(self, asked: Sequence[Question], processor: Any, tokens: float) -> None:
        self.rows = batches.rows(asked, joint=getattr(processor, "joint", False))
        self.processor, self.tokens = processor, tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
        encoded = [[self.processor.encode(question) for question in self.rows[index]] for index in indices]
        return [
            (len(part), self.processor.collate([example for row in part for example in row]))
            for part in batches.parts(encoded, self.tokens)
        ]


def collated(batch: Any) -> Any:
    return batch


class Order(torch.utils.data.Sampler):
    """`batches.order` of the epoch that the trainer has set."""

    def __init__(self, rows: Sequence[Sequence[Question]], batch_size: int, seed: int) -> None:
        self.lengths = [batches.characters(row[0]) for row in rows]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(batches.order(self.lengths, self.batch_size, self.seed, self.epoch))


def check_room_for_checkpoints(model: torch.nn.Module, folder: Path) -> None:
    """Raise `ValueError` where the disk cannot take two checkpoints and a third that is being written."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    missing = max(0, KEPT + 1 - len(list(folder.glob("checkpoint-*"))))
    check_room(folder, missing * 3 * weights)  # with both moments of AdamW


class Sealing(transformers.TrainerCallback):
    """Earlier checkpoints go when a later one is sealed: killed in between, there is one to go on from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate_checkpoints(args.output_dir, KEPT, state.best_model_checkpoint)


class Trainer(transformers.Trainer):
    """Batches are those of `order`, each the list of its parts; a look also asks what the model says."""

    model: Any
    eval_dataset: Any

    def __init__(
        self,
        *,
        order: Order,
        processor: Any,
        validation: Sequence[Question],
        pretrained_rate: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.pretrained_rate = pretrained_rate
        self.order, self.processor, self.validation = order, processor, validation
        self.divergence = Divergence()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.pretrained_rate == 1:
            return super().create_optimizer(model)
        slow = taken(self.model)
        if not slow:
            raise ValueError(
                f"train.pretrained_rate is {self.pretrained_rate}, and no layer of this model starts from a "
                "checkpoint"
            )
        names = {id(parameter) for parameter in slow}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in names]
        made, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = [{"params": others}, {"params": slow, "lr": self.pretrained_rate * options["lr"]}]
        self.optimizer = made(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.order

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < self.state.max_steps:  # resumed at its end, it would do one step more
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(self.shared(inputs), 1):
            with nullcontext() if number == len(inputs) else self.accelerator.no_sync(model):
                loss += super().training_step(model, part, *args, **kwargs)
        self.divergence.watch(loss.item(), self.state.global_step + 1)
        return loss

    def shared(self, batch: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """The parts, knowing what they are parts of: their losses add up to that of the batch."""
        if hasattr(self.model, "counts") and (self.args.world_size > 1 or len(batch) > 1):
            counts = sum(self.model.counts(part).float() for _, part in batch)
            whole = self.accelerator.reduce(counts, "mean")  # over processes, as their gradients are
            for _, part in batch:
                part["counts"] = whole
        elif len(batch) > 1:
            num_rows = sum(rows for rows, _ in batch)
            for rows, part in batch:
                part["share"] = rows / num_rows
        return [part for _, part in batch]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        share = inputs.pop("share", None)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if share is None else share * loss

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody asks for them

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the validation split and the F1, alike in every process.

        Raises `ValueError` when the loss is not a number.
        """
        self.model.eval()
        loss = self.validation_loss()
        if math.isnan(loss):
            raise ValueError(
                f"the loss on the validation split is {loss} after step {self.state.global_step}: training "
                "stops; lower train.learning_rate"
            )
        found = judge(self.model, self.processor, self.validation, self.args.eval_batch_size)
        metrics = {"eval_loss": loss, "eval_f1": f1(found, self.validation)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Of the whole split as one batch, whatever is computed at once."""
        total = 0.0
        for rows, part in self.validation_parts():
            if self.validation_counts is None:
                part["share"] = rows / len(self.eval_dataset)
            else:
                part["counts"] = self.validation_counts
            total += float(self.compute_loss(self.model, self._prepare_inputs(part)))
        return total

    @cached_property
    def validation_counts(self) -> torch.Tensor | None:
        if not hasattr(self.model, "counts"):
            return None
        return torch.stack([self.model.counts(part).float() for _, part in self.validation_parts()]).sum(0)

    def validation_parts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        everything = range(len(self.eval_dataset))
        for begin in everything[:: self.args.eval_batch_size]:
            yield from self.eval_dataset.__getitems__(everything[begin:][: self.args.eval_batch_size])


def share_of_process(batch_size: int) -> int:
    """Rows of a batch that each process takes. Raises `ValueError` where that is no whole number."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"train.batch_size is {batch_size}, which {processes} processes do not divide")
    return share


def arguments(
    cell: Cell, seed: int, checkpoints: Path, *, judged: int, look: int
) -> transformers.TrainingArguments:
    """The trainer's; `judged` rows of the validation split at once, every `look` steps."""
    made = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=share_of_process(cell.train.batch_size),
        per_device_eval_batch_size=judged,
        num_train_epochs=cell.train.epochs,
        learning_rate=cell.train.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=cell.train.warmup_steps,
        max_grad_norm=cell.train.max_grad_norm,
        optim="adamw_torch_fused",
        weight_decay=0.0,  # which makes it the paper's Adam
        bf16=cell.train.precision == "bfloat16",
        seed=seed,
        ddp_find_unused_parameters=True,  # PAM, AVEQA and a model without a pattern have such
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,  # forked: they share the processor
        dataloader_persistent_workers=torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=look,
        logging_steps=look,
        save_strategy="steps",
        save_steps=look,
        load_best_model_at_end=True,
        metric_for_best_model="f1",
        greater_is_better=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    made._n_gpu = min(made.n_gpu, 1)  # a process has one; of several it would take all and larger batches
    return made


def fit(
    cell: Cell, training: Sequence[Question], validation: Sequence[Question], seed: int, checkpoints: Path
) -> tuple[Any, Any, list[dict[str, float]], bool]:
    """The model with the best validation F1 among the looks, its processor, the learning curves, and whether
    an earlier run was gone on with."""
    architecture = importlib.import_module(cell.architecture)
    settings = architecture.Settings.model_validate(cell.settings)
    transformers.set_seed(seed)
    width = next((q.product.regions.shape[1] for q in training if q.product.regions is not None), 1)
    model, processor = architecture.Model.start(settings, training, width)
    dataset = Rows(training, processor, cell.train.max_tokens)
    steps = math.ceil(math.ceil(len(dataset) / cell.train.batch_size) * cell.train.epochs)
    look = math.ceil(steps / cell.train.evaluations)
    if cell.train.warmup_steps >= steps:
        sys.stderr.write(
            f"train.warmup_steps is {cell.train.warmup_steps} and the training has {steps} steps: it ends "
            "before the learning rate is reached\n"
        )
    trainer = Trainer(
        model=model,
        processor=processor,
        validation=validation,
        order=Order(dataset.rows, cell.train.batch_size, seed),
        pretrained_rate=cell.train.pretrained_rate,
        args=arguments(cell, seed, checkpoints, judged=judged_at_once(cell, processor), look=look),
        data_collator=collated,
        train_dataset=dataset,
        eval_dataset=Rows(validation, processor, math.inf),
        callbacks=[Sealing()],
    )
    with trainer.args.main_process_first(desc="looking for checkpoints"):
        last = last_whole_checkpoint(checkpoints)
        check_room_for_checkpoints(model, checkpoints)
    trainer.train(resume_from_checkpoint=last)
    return model.eval(), processor, curves(trainer.state.log_history), last is not None
