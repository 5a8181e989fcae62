"""Train one model on one corpus with one seed.

    python -m model.train CORPUS MODEL SEED

    torchrun --nproc-per-node 2 -m model.train CORPUS MODEL SEED

Writes runs/CORPUS/MODEL/SEED/model (weights, configuration, tokenizer, provenance, validation scores)
and history.json beside it. Checkpoints live outside DVC's outputs, under a digest of everything
that the result depends on: killed anywhere, the next run goes on from the last whole one. Several processes
share each batch, and give what one does when it divides the data.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from features.devices import tell_if_slow
from features.memory import keep_freed
from model.checkpoint import COSTS
from model.examples import Question, questions
from pipeline import params
from pipeline.disk import sha256_of, write_json
from pipeline.shards import ShardFolder, code_digest
from pipeline.workers import stopping_with_parent

CHECKPOINTS = Path(".cache/training")
WHOLE = "whole.json"  # the seal of a checkpoint that was written to its end
POOL = 8
PREPARING = ("products", "images", "ocr", "regions")  # stages whose settings a model's input is made by


class Settings(params.Settings):
    """Section `train`; the defaults are the paper's Table 6 for MAVE."""

    batch_size: int = Field(32, ge=1)  # questions; products where a product's questions are asked together
    epochs: float = Field(20, gt=0)  # 0.1: a tenth of the training questions, once
    learning_rate: float = Field(2e-5, gt=0)
    warmup_steps: int = Field(2000, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    max_tokens: int = Field(32768, ge=1)  # computed at once; a batch that has more is computed in parts
    evaluations: int = Field(5, ge=1)  # how often, evenly, the validation split is looked at


class Cell(params.Settings):
    """config/CORPUS/models/MODEL.json: which architecture, with which settings, trained how."""

    architecture: str
    code: str  # digest of the architecture's code
    settings: dict[str, Any]
    train: Settings


def digest(corpus: str, cell: Cell, seed: int) -> str:
    """Of everything that the trained weights depend on."""
    products = Path("data", corpus, "products.parquet").read_bytes()
    shards = [
        [shard["sha256"] for shard in ShardFolder(Path("data", corpus, stage)).manifest["shards"]]
        for stage in ("ocr", "regions")
    ]
    parts = [
        cell.model_dump(mode="json"),
        seed,
        hashlib.sha256(products).hexdigest(),
        shards,
        code_digest("model.train"),
        code_digest(cell.architecture),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint with all of its bytes; newer ones without are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(checkpoints):
        if is_whole(checkpoint):
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


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in order, batches of similar length, as a function of lengths, seed and epoch.

    Rows are shuffled, sorted by length within runs of `POOL` batches, and their batches shuffled; a smaller
    last batch stays the last.
    """
    chance = random.Random(f"{seed} {epoch}")
    rows = list(range(len(lengths)))
    chance.shuffle(rows)
    batches: list[list[int]] = []
    for begin in range(0, len(rows), POOL * batch_size):
        pool = sorted(rows[begin : begin + POOL * batch_size], key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rest = [batches.pop()] if len(batches[-1]) < batch_size else []
    chance.shuffle(batches)
    return [row for batch in batches + rest for row in batch]


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
    from model import checkpoint
    from model.metrics import normalise

    rows = []
    found = checkpoint.extract(model, processor, asked, batch_size=batch_size)
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
    from model.metrics import normalise

    gold = sum(len({normalise(value) for value in question.values}) for question in asked)
    right = sum(row["correct"] for row in rows)
    return 2 * right / (len(rows) + gold) if rows or gold else 0.0


def rows(asked: Sequence[Question], *, joint: bool) -> list[list[Question]]:
    """What is one row of a training batch: a question, or with `joint` all those of a product."""
    if not joint:
        return [[question] for question in asked]
    return [list(of_one) for _, of_one in groupby(asked, key=lambda question: id(question.product))]


def num_tokens(row: Sequence[Any]) -> int:
    """Local-tokens of an encoded row: of one text and of all that is asked about it."""
    return row[0].num_tokens + sum(example.num_asking for example in row[1:])


def parts(rows: Sequence[Sequence[Any]], tokens: float) -> list[list[Any]]:
    """The encoded rows of a batch in their order, in runs of at most `tokens` tokens, each run as if padded.

    A longer row is a part of its own.
    """
    found: list[list[Any]] = []
    longest = 0
    for row in rows:
        size = num_tokens(row)
        longest = max(longest, size)
        if found and (len(found[-1]) + 1) * longest <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
            longest = size
    return found


def judged_at_once(cell: Cell, processor: Any) -> int:
    """Rows of the validation split: twice as many as `max_tokens` has room for, since no gradient is held."""
    return 2 * min(cell.train.batch_size, max(1, cell.train.max_tokens // processor.max_length))


def characters(question: Question) -> int:
    """How long its product's texts are."""
    product = question.product
    return sum(len(text) for text, _ in product.paragraphs) + sum(len(line.text) for line in product.ocr)


def fit(
    cell: Cell, training: Sequence[Question], validation: Sequence[Question], seed: int, checkpoints: Path
) -> tuple[Any, Any, list[dict[str, float]], bool]:
    """The model with the best validation F1 among the looks, its processor, the learning curves, and whether
    an earlier run was gone on with."""
    import torch
    import transformers

    architecture = importlib.import_module(cell.architecture)
    settings = architecture.Settings.model_validate(cell.settings)
    transformers.set_seed(seed)
    width = next((q.product.regions.shape[1] for q in training if q.product.regions is not None), 1)
    model, processor = architecture.Model.start(settings, training, width)

    class Rows(torch.utils.data.Dataset):
        """Read batch by batch, a batch as its parts: of how many rows, and these collated."""

        def __init__(self, asked: Sequence[Question], tokens: float) -> None:
            self.rows = rows(asked, joint=getattr(processor, "joint", False))
            self.tokens = tokens

        def __len__(self) -> int:
            return len(self.rows)

        def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, dict[str, Any]]]:
            encoded = [[processor.encode(question) for question in self.rows[index]] for index in indices]
            return [
                (len(part), processor.collate([example for row in part for example in row]))
                for part in parts(encoded, self.tokens)
            ]

    def collated(batch: Any) -> Any:
        return batch

    class Order(torch.utils.data.Sampler):
        """`batch_order` of the epoch that the trainer has set."""

        def __init__(self, rows: Sequence[Sequence[Question]]) -> None:
            self.lengths, self.epoch = [characters(row[0]) for row in rows], 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            return iter(batch_order(self.lengths, cell.train.batch_size, seed, self.epoch))

    dataset = Rows(training, cell.train.max_tokens)
    steps = math.ceil(math.ceil(len(dataset) / cell.train.batch_size) * cell.train.epochs)
    look = math.ceil(steps / cell.train.evaluations)
    if cell.train.warmup_steps >= steps:
        sys.stderr.write(
            f"train.warmup_steps is {cell.train.warmup_steps} and the training has {steps} steps: it ends "
            "before the learning rate is reached\n"
        )

    divergence = Divergence()

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return Order(dataset.rows)

        def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step < steps:  # else a finished training, resumed, would do one step more
                super()._run_epoch(*args, **kwargs)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = torch.zeros((), device=self.args.device)
            for number, part in enumerate(self.shared(inputs), 1):
                with nullcontext() if number == len(inputs) else self.accelerator.no_sync(model):
                    loss += super().training_step(model, part, *args, **kwargs)
            divergence.watch(loss.item(), self.state.global_step + 1)
            return loss

        def shared(self, batch: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
            """The parts, knowing what they are parts of: their losses add up to that of the batch."""
            if hasattr(model, "counts") and (processes > 1 or len(batch) > 1):
                counts = sum(model.counts(part).float() for _, part in batch)
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

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            [(_, whole)] = inputs
            return super().prediction_step(model, whole, *args, **kwargs)

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # nobody asks for them

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **kwargs)
            model.eval()
            rows = judge(model, processor, validation, self.args.eval_batch_size)
            metrics["eval_f1"] = f1(rows, validation)
            self.log({"eval_f1": metrics["eval_f1"]})
            return metrics

    class Whole(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(cell.train.batch_size, processes)
    if rest:
        raise ValueError(
            f"train.batch_size is {cell.train.batch_size}, which {processes} processes do not divide"
        )
    trainer = Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(checkpoints),
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=share,
            per_device_eval_batch_size=judged_at_once(cell, processor),
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
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="f1",
            greater_is_better=True,
            prediction_loss_only=True,
            remove_unused_columns=False,
            label_names=["targets"],
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
        ),
        data_collator=collated,
        train_dataset=dataset,
        eval_dataset=Rows(validation, math.inf),
        callbacks=[Whole()],
    )
    with trainer.args.main_process_first(desc="looking for checkpoints"):
        last = last_whole_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=last)
    return model.eval(), processor, curves(trainer.state.log_history), last is not None


def sighted(cell: Cell, training: Sequence[Question]) -> Cell:
    """The cell, or one that does not look at pictures, where training has none to learn from."""
    settings = importlib.import_module(cell.architecture).Settings.model_validate(cell.settings)
    if not getattr(settings, "image", False) or any(
        question.product.regions is not None for question in training
    ):
        return cell
    sys.stderr.write("no training product has a picture: the model will not look at any\n")
    return cell.model_copy(update={"settings": {**cell.settings, "image": False}})


def provenance(corpus: str, cell: Cell, seed: int, training: Sequence[Question]) -> dict[str, Any]:
    """What a user of the model has to know, and `model.predict` to prepare its input the same way."""
    by_category: dict[str, set[str]] = {}
    for question in training:
        by_category.setdefault(question.product.category, set()).add(question.attribute)
    return {
        "architecture": cell.architecture,
        "corpus": corpus,
        "seed": seed,
        "settings": cell.settings,
        "train": cell.train.model_dump(mode="json"),
        "weights": cell.settings.get("pretrained") or "random",
        **{stage: json.loads(Path("config", corpus, f"{stage}.json").read_text()) for stage in PREPARING},
        "attributes": sorted({question.attribute for question in training}),
        "attributes_by_category": {name: sorted(by_category[name]) for name in sorted(by_category)},
    }


def open_more_files() -> None:
    """As many as may be: each tensor of each part that a process loads ahead is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def keep_cost(corpus: str, name: str, seed: int, seconds: float, examples: int) -> None:
    """Note how long a training took that was not interrupted, for the paper's Table 3 and for estimates."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    path = COSTS / corpus / name / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"training_s": round(seconds, 1), "examples": examples, "device": device}))


def run(corpus: str, name: str, seed: int) -> None:
    """Train the cell and write its folder; raises `ValueError` when there is nothing to train on."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of loading weights; the trainer's own stays
    cell = params.load(Cell, params.CONFIG / corpus / "models" / f"{name}.json")
    checkpoints = CHECKPOINTS / digest(corpus, cell, seed)
    training, validation = list(questions(corpus, "train")), list(questions(corpus, "validation"))
    if not training or not validation:
        raise ValueError(
            f"{corpus} has {len(training)} training and {len(validation)} validation questions; "
            "both must be there"
        )
    cell = sighted(cell, training)
    open_more_files()
    tell_if_slow(cell.train.precision, "cuda" if torch.cuda.is_available() else "cpu", "train")
    started = time.perf_counter()
    model, processor, history, resumed = fit(cell, training, validation, seed, checkpoints)
    if int(os.environ.get("RANK", "0")):
        return  # the first process of several writes for all
    if resumed:
        (COSTS / corpus / name / f"{seed}.json").unlink(missing_ok=True)
    else:
        examples = max(1, round(len(training) * cell.train.epochs))
        keep_cost(corpus, name, seed, time.perf_counter() - started, examples)
    processor.truncated.clear()  # every epoch counted again, and processes that load batches not at all
    for question in training:
        processor.encode(question)
    truncated = dict(sorted(processor.truncated.items()))
    rows = judge(model, processor, validation, judged_at_once(cell, processor))
    folder = Path("runs", corpus, name, str(seed))
    temporary = folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    documents = {
        temporary / "validation.json": rows,
        temporary / "truncated.json": truncated,
        temporary / "provenance.json": provenance(corpus, cell, seed, training),
        folder / "history.json": history,
    }
    for path, content in documents.items():
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "model", ignore_errors=True)
    temporary.rename(folder / "model")
    shutil.rmtree(checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml, its data stages done")
    parser.add_argument("model", metavar="MODEL", help="a model of params.yaml")
    parser.add_argument("seed", metavar="SEED", type=int, help="of weights, order and dropout")
    arguments = parser.parse_args()
    keep_freed()
    try:
        with stopping_with_parent():
            run(arguments.corpus, arguments.model, arguments.seed)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
