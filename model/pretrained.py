"""Where a model's words come from: a checkpoint by its name, and the tokenizer that goes with it."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.examples import Question


def checkpoint_path(name: str) -> str:
    """`package:NAME/FOLDER` is a folder inside an installed package; anything else is returned as it is."""
    if not name.startswith("package:"):
        return name
    from importlib.resources import files

    package, _, folder = name.removeprefix("package:").partition("/")
    path = Path(str(files(package))) / folder
    if not path.is_dir():
        raise ValueError(f"{name}: {path} is not a folder")
    return str(path)


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the characters of `texts`, lower-cased, most frequent first."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    counts = Counter(character for text in texts for character in text.lower() if not character.isspace())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[VALUE]"]
    words += sorted(counts, key=lambda character: (-counts[character], character))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=["[VALUE]"],
    )


def start_tokenizer(
    pretrained: str | None, tokenizer: str, questions: Sequence[Question]
) -> PreTrainedTokenizerBase:
    """The checkpoint's own (`pretrained`), another one's, or `characters`: those of the training split.

    Raises `ValueError` when it is to be the checkpoint's and there is none.
    """
    if tokenizer == "characters":
        texts = [text for q in questions for text, _ in q.product.paragraphs]
        return character_tokenizer(texts + [text for q in questions for text in (q.attribute, *q.values)])
    if tokenizer != "pretrained":
        return AutoTokenizer.from_pretrained(checkpoint_path(tokenizer))
    if pretrained is None:
        raise ValueError("tokenizer: pretrained needs a checkpoint, and pretrained is null")
    return AutoTokenizer.from_pretrained(checkpoint_path(pretrained))
