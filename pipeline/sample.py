"""The built-in corpus: a small catalogue in exactly MAVE's label and Amazon's metadata format, with pictures.

Every value's origin is known: it stands in the text, is printed on the picture, is only visible in it
(colour, shape), or stands in text and picture. Values and origins are dealt from balanced decks, apart from
each other and from the category, so that the text of a product says nothing about what only its picture
shows. The dirt of real data is mixed in. Same settings, same bytes.

One file, as a product's truth, text, label, dirt and picture must agree.
"""

import io
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline import clean, params
from pipeline.split import Split, assign

if TYPE_CHECKING:
    from PIL import Image, ImageFont


class Settings(params.Settings):
    """`products` counts those that survive cleaning; `split` is the corpus's own, to check what is left for
    the test: fewer than `min_test_values` values of any origin there is an error."""

    kind: Literal["sample"] = "sample"
    products: int = Field(default=240, ge=10, le=100_000)
    seed: int = 0
    split: Split = Split(fractions=(0.6, 0.1, 0.3))
    min_test_values: int = Field(default=40, ge=0)


@dataclass(frozen=True)
class Attribute:
    values: tuple[str, ...]
    sentences: tuple[str, ...]
    distractors: tuple[str, ...]  # sentences that name a value which is not the product's
    shares: dict[str, float]  # of products by origin; "none" is a negative, the rest no question
    pairs: float = 0.0  # share of text or printed answers with two values


PACKAGING = {"text": 0.35, "printed": 0.30, "several": 0.15, "none": 0.12}
TEXT_ONLY = {"text": 0.80, "none": 0.12}
ATTRIBUTES = {
    "Color": Attribute(
        ("red", "green", "blue", "yellow", "black", "pink"),
        ("The bottle comes in {}.", "Filled into a {} bottle.", "You get one {} bottle."),
        ("Ships in a {} box.", "The gift ribbon is {}."),
        {"visible": 0.80, "several": 0.14},
    ),
    "Shape": Attribute(
        ("round", "square", "star", "heart", "triangle"),
        ("The bottle is {} shaped.", "It stands on the shelf as a {} bottle.", "Known for its {} outline."),
        (),
        {"visible": 0.80, "several": 0.14},
    ),
    "Brand": Attribute(
        ("Harbor", "Willow", "Summit", "Falcon", "Meadow", "Comet", "Orchid", "Atlas"),
        ("From the makers at {}.", "A product of {}.", "{} has made it since the start."),
        ("Also fits the holder by {}.",),
        PACKAGING,
    ),
    "Size": Attribute(
        ("100 ml", "150 ml", "200 ml", "250 ml", "300 ml", "400 ml", "500 ml", "750 ml"),
        ("Net content {}.", "One bottle holds {}.", "Contains {}."),
        ("A refill of {} is sold apart.",),
        PACKAGING,
    ),
    "Flavor": Attribute(
        ("vanilla", "lemon", "mint", "cherry", "honey", "ginger", "coconut", "peach"),
        ("Tastes of {}.", "With a full {} flavor.", "Made with real {}."),
        ("Goes well with {} cake.",),
        PACKAGING,
        pairs=0.15,
    ),
    "Scent": Attribute(
        ("rose", "cedar", "jasmine", "pine", "ocean", "linen", "lavender", "sage"),
        ("Smells of {}.", "With a gentle {} scent.", "The scent is {}."),
        ("Also try our {} candles.",),
        PACKAGING,
        pairs=0.15,
    ),
    "Material": Attribute(
        ("glass", "plastic", "metal", "ceramic", "steel", "bamboo"),
        ("The container is made of {}.", "A container of {}.", "Container material: {}."),
        ("The tray on the picture is {}.",),
        TEXT_ONLY,
        pairs=0.12,
    ),
    "Occasion": Attribute(
        ("wedding", "birthday", "Christmas", "Easter", "camping", "school"),
        ("A fine gift for {} days.", "Made for {}.", "Think of {} when you buy it."),
        ("Our shop is closed at {} time.",),
        TEXT_ONLY,
        pairs=0.12,
    ),
    "Country": Attribute(
        ("France", "Italy", "Japan", "India", "Brazil", "Spain", "Canada", "Mexico"),
        ("Made in {}.", "Bottled in {}.", "Comes to you from {}."),
        ("Designed in {}.",),
        TEXT_ONLY,
    ),
    "Texture": Attribute(
        ("creamy", "silky", "thick", "smooth", "rich", "velvet"),
        ("Feels {}.", "With a {} texture.", "The texture is {}."),
        (),
        TEXT_ONLY,
    ),
}
VISIBLE = ("Color", "Shape")
ALWAYS = (*VISIBLE, "Brand", "Size")
CATEGORIES = {  # leaf category -> (root as Amazon writes it, noun, further attributes)
    "Body Lotions": ("All Beauty", "Body Lotion", ("Scent", "Texture")),
    "Shampoos": ("All Beauty", "Shampoo", ("Scent", "Material")),
    "Syrups": ("Grocery & Gourmet Food", "Syrup", ("Flavor", "Country")),
    "Juices": ("Grocery & Gourmet Food", "Juice", ("Flavor", "Occasion")),
    "Room Sprays": ("Home & Kitchen", "Room Spray", ("Scent", "Material")),
}
FILLERS = (
    "Keep it in a cool and dry place.",
    "Thank you for looking at our shop.",
    "Questions are answered within one day.",
    "Please read the label before use.",
    "Customers like it for daily use.",
    "Every order is packed by hand.",
)
OPENERS = ("Daily", "Family", "Everyday", "Favorite", "Classic")
DISTRACTED = 0.2  # share of questions whose text also names a value that is not the product's
RGB = {
    "red": (214, 24, 30),
    "green": (20, 176, 60),
    "blue": (28, 62, 206),
    "yellow": (250, 214, 10),
    "black": (24, 24, 26),
    "pink": (255, 120, 196),
}
PRINTED_ORDER = ("Brand", "Flavor", "Scent", "Size")
SIZE_PX = (320, 352)  # width, height of a picture
CARD_PX = 150  # height of the white card at the bottom that carries the print
LINE_PX = 34
FONT_PX = 28


@dataclass
class Drawn:
    """One product before it is written: what is true of it, its metadata line and its label."""

    asin: str
    category: str
    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # asked key -> [(value, origin)]
    shown: dict[str, str] = field(default_factory=dict)  # Color and Shape of the picture, asked or not
    metadata: dict[str, Any] = field(default_factory=dict)
    picture: str = "jpeg"  # or "broken", "missing", "animated"


def generate(settings: Settings, folder: Path) -> None:
    """Write `labels/`, `metadata/` and `images/` below `folder`, which is there and empty.

    Raises `ValueError` when a split is too small to be judged (see `Settings.min_test_values`).
    """
    products = draw_products(settings)
    rng = random.Random(settings.seed + 1)
    check_test_values(products, settings)
    for name in ("labels", "metadata", "images"):
        (folder / name).mkdir(parents=True)
    for product in products:
        product.metadata = _metadata(product, rng)
        _write_picture(product, folder / "images", rng)
    num_dirty = max(1, settings.products // 80)
    labels = {product.asin: _label(product) for product in products}
    _shift_spans([labels[product.asin] for product in rng.sample(products, num_dirty)])
    _write_files(folder, products, labels, _dirt(num_dirty, rng), rng)


# What is true of the products


def draw_products(settings: Settings) -> list[Drawn]:
    """Products with their answers; texts and pictures come later."""
    number, rng = settings.products, random.Random(settings.seed)
    categories = _deck(list(CATEGORIES), number, rng)
    products = [Drawn(_asin(rng), category) for category in categories]
    pictures = ["broken", "missing", "animated"] * max(1, number // 80)
    for product, picture in zip(rng.sample(products, min(len(pictures), number)), pictures, strict=False):
        product.picture = picture
    for key, attribute in ATTRIBUTES.items():
        askers = [p for p in products if key in ALWAYS or key in CATEGORIES[p.category][2]]
        origins = _shares(attribute.shares, len(askers), rng)
        values = _deck(list(attribute.values), len(askers), rng)
        for product, origin, value in zip(askers, origins, values, strict=True):
            if key in VISIBLE:
                product.shown[key] = value
            if origin is not None:
                product.answers[key] = _answer(product, attribute, origin, value, rng)
    return products


def _answer(
    product: Drawn, attribute: Attribute, origin: str, value: str, rng: random.Random
) -> list[tuple[str, str]]:
    if origin == "none":
        return []
    if product.picture in ("broken", "missing"):
        origin = "text"  # nothing can be read off it
    values = [value]
    if origin in ("text", "printed") and rng.random() < attribute.pairs:
        values.append(rng.choice([other for other in attribute.values if other != value]))
    return [(each, origin) for each in values]


def _deck(cards: list[str], number: int, rng: random.Random) -> list[str]:
    """`number` cards, each as often as every other (give or take one), shuffled."""
    cards = rng.sample(cards, len(cards))
    deck = [cards[i % len(cards)] for i in range(number)]
    rng.shuffle(deck)
    return deck


def _shares(shares: dict[str, float], number: int, rng: random.Random) -> list[str | None]:
    """An origin for each of `number` products, None for those that are not asked."""
    origins: list[str | None] = []
    total = 0.0
    for origin, share in shares.items():
        total += share
        origins += [origin] * (round(total * number) - len(origins))
    origins += [None] * (number - len(origins))
    rng.shuffle(origins)
    return origins


def _asin(rng: random.Random) -> str:
    return "B0" + "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=8))


def check_test_values(products: list[Drawn], settings: Settings) -> None:
    """Raise `ValueError` that says what is short."""
    split = assign([product.asin for product in products], settings.split)
    counts = Counter(
        origin
        for product in products
        if split[product.asin] == "test"
        for answer in product.answers.values()
        for _, origin in answer
    )
    short = [
        f"{origin} has {counts[origin]}"
        for origin in ("text", "printed", "visible", "several")
        if counts[origin] < settings.min_test_values
    ]
    if short:
        raise ValueError(
            f"the test split needs at least {settings.min_test_values} values of every origin, but "
            f"{', '.join(short)}: raise products (now {settings.products}) or the test share of split"
        )


# Text


def _metadata(product: Drawn, rng: random.Random) -> dict[str, Any]:
    root, noun, _ = CATEGORIES[product.category]
    sentences = []
    in_title = {}
    for key, attribute in ATTRIBUTES.items():
        if key not in product.answers:
            continue
        values = [value for value, origin in product.answers[key] if origin in ("text", "several")]
        if values and key in ("Brand", "Size") and rng.random() < 0.5:
            in_title[key] = values[0]
        elif values:
            sentences.append(rng.choice(attribute.sentences).format(" and ".join(values)))
        if attribute.distractors and rng.random() < DISTRACTED:
            own = {value for value, _ in product.answers[key]}
            other = rng.choice([value for value in attribute.values if value not in own])
            sentences.append(rng.choice(attribute.distractors).format(other))
    sentences += rng.sample(FILLERS, rng.randint(1, 2))
    rng.shuffle(sentences)
    title = f"{in_title.get('Brand') or rng.choice(OPENERS)} {noun}"
    if "Size" in in_title:
        title += rng.choice((", {}", " - {}", " ({})")).format(in_title["Size"])
    num_bullets = min(rng.randint(2, 4), len(sentences))
    bullets, rest = sentences[:num_bullets], sentences[num_bullets:]
    half = (len(rest) + 1) // 2
    description = [" ".join(part) for part in (rest[:half], rest[half:]) if part]
    brands = [value for value, _ in product.answers.get("Brand", [])]
    name = f"{product.asin}.{'gif' if product.picture == 'animated' else 'jpg'}"
    record: dict[str, Any] = {
        "category": [root, product.category],
        "tech1": "",
        "description": [_noise(text, rng) for text in description] + [""] * rng.randint(0, 1),
        "fit": "",
        "title": title,
        "also_buy": [],
        "tech2": "",
        "brand": rng.choice((*brands, "")) if brands else "",
        "feature": [_noise(text, rng) for text in bullets],
        "rank": f"{rng.randint(100, 90_000):,} in {root} (",
        "also_view": [],
        "details": {"Shipping Weight:": f"{rng.randint(2, 40)} ounces", "ASIN: ": product.asin},
        "main_cat": root
        if rng.random() < 0.8
        else f'<img src="https://example.invalid/a.png" alt="{root}"/>',
        "similar_item": "",
        "date": "",
        "price": f"${rng.randint(3, 39)}.{rng.randint(0, 99):02d}" if rng.random() < 0.7 else "",
        "asin": product.asin,
        "imageURL": [name],
        "imageURLHighRes": [name],
    }
    if rng.random() < 0.15:  # some releases leave empty keys out, and call the pictures `image`
        record = {key: value for key, value in record.items() if value}
        record["image"] = record.pop("imageURLHighRes")
        del record["imageURL"]
    return record


def _noise(text: str, rng: random.Random) -> str:
    """The text as web pages carry it; cleaning gives back the words."""
    first, _, rest = text.partition(" ")
    forms = (
        f"<p>{text}</p>",
        f"<b>{first}</b> {rest}",
        f"<style>.a1 {{ color: #ffffff; }}</style>{text}",
        f"{text}<script>var shown = 1;</script>",
        text.replace(" ", "&nbsp;", 1),
        text.replace(" ", "  ", 2) + "<br/>",
    )
    return rng.choice(forms) if rng.random() < 0.3 else text


def _label(product: Drawn) -> dict[str, Any]:
    cleaned = clean.paragraphs(product.metadata)
    attributes = []
    for key, answer in product.answers.items():
        attribute: dict[str, Any] = {"key": key, "evidences": []}
        for value, origin in answer:
            for pid, (text, source) in enumerate(cleaned):
                if origin in ("text", "several") or source == "brand":
                    attribute["evidences"] += _occurrences(value, text, pid)
        if answer:
            attribute["values"] = [value for value, _ in answer]
            attribute["origins"] = [origin for _, origin in answer]
        attributes.append(attribute)
    return {"id": product.asin, "category": product.category, "attributes": attributes}


def _occurrences(value: str, text: str, pid: int) -> list[dict[str, Any]]:
    return [
        {"value": value, "pid": pid, "begin": match.start(), "end": match.end()}
        for match in re.finditer(rf"\b{re.escape(value)}\b", text)
    ]


# Dirt


def _shift_spans(labels: list[dict[str, Any]]) -> None:
    """Add to each label one span that is off by a character, as drifted releases have them."""
    for label in labels:
        for attribute in label["attributes"]:
            if attribute["evidences"]:
                span = attribute["evidences"][0]
                shifted = {**span, "begin": span["begin"] + 1, "end": span["end"] + 1}
                attribute["evidences"].append(shifted)
                break


def _dirt(number: int, rng: random.Random) -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """`(metadata or None, label)` of products that must not come through."""
    rows: list[tuple[dict[str, Any] | None, dict[str, Any]]] = []
    for _ in range(number):
        for title in ("var aPageStart = (new Date()).getTime();", "   ", None):
            asin = _asin(rng)
            label = {"id": asin, "category": "Juices", "attributes": [{"key": "Size", "evidences": []}]}
            metadata = {"asin": asin, "title": title, "feature": ["Thank you for looking."], "brand": ""}
            rows.append((metadata if title else None, label))
    rows.append((None, {"id": "not-an-asin", "category": "Juices", "attributes": []}))
    return rows


def _write_files(
    folder: Path,
    products: list[Drawn],
    labels: dict[str, dict[str, Any]],
    dirt: list[tuple[dict[str, Any] | None, dict[str, Any]]],
    rng: random.Random,
) -> None:
    metadata = [product.metadata for product in products] + [row for row, _ in dirt if row]
    rng.shuffle(metadata)
    repeated = rng.sample(products, max(1, len(products) // 80))
    metadata += [{**product.metadata, "title": "Another title of the same product"} for product in repeated]
    every = list(labels.values()) + [label for _, label in dirt]
    rng.shuffle(every)
    positives, negatives = [], []
    for label in every:
        asked = [attribute for attribute in label["attributes"] if attribute.get("values")]
        empty = [attribute for attribute in label["attributes"] if not attribute.get("values")]
        positives += [{**label, "attributes": asked}] if asked else []
        negatives += [{**label, "attributes": empty}] if empty or not label["attributes"] else []
    cut_metadata, cut_label = (json.dumps(row)[:80] for row in (products[0].metadata, positives[0]))
    _write_lines(folder / "metadata" / "00-metadata.jsonl", metadata, cut_metadata)
    _write_lines(folder / "labels" / "00-positives.jsonl", positives, cut_label)
    _write_lines(folder / "labels" / "01-negatives.jsonl", negatives, None)


def _write_lines(path: Path, rows: list[dict[str, Any]], malformed: str | None) -> None:
    lines = [json.dumps(row) for row in rows]
    if malformed:
        lines.insert(len(lines) // 2, malformed)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# Pictures


def _write_picture(product: Drawn, folder: Path, rng: random.Random) -> None:
    picture = _draw(product, rng)
    if product.picture == "missing":
        return
    if product.picture == "animated":
        second = picture.rotate(180)
        picture.save(
            folder / f"{product.asin}.gif", save_all=True, append_images=[second], duration=400, loop=0
        )
        return
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    if product.picture == "broken":
        data = data[: len(data) // 3]
    (folder / f"{product.asin}.jpg").write_bytes(data)


def _draw(product: Drawn, rng: random.Random) -> "Image.Image":
    """The product as a large flat silhouette above a white card with its print."""
    from PIL import Image, ImageDraw

    width, height = SIZE_PX
    shade = rng.randint(226, 240)
    picture = Image.new("RGB", SIZE_PX, (shade, shade, shade))
    draw = ImageDraw.Draw(picture)
    radius = rng.uniform(86, 94)
    middle = (width / 2 + rng.uniform(-12, 12), (height - CARD_PX) / 2 + rng.uniform(-4, 4))
    rgb = tuple(min(255, max(0, part + rng.randint(-8, 8))) for part in RGB[product.shown["Color"]])
    outline = [
        (middle[0] + radius * x, middle[1] + radius * y) for x, y in outlines()[product.shown["Shape"]]
    ]
    draw.polygon(outline, fill=rgb)
    draw.rectangle((10, height - CARD_PX, width - 11, height - 8), fill=(255, 255, 255), outline=(90, 90, 90))
    lines = [
        value if key == "Size" else value.upper()
        for key in PRINTED_ORDER
        for value, origin in product.answers.get(key, [])
        if origin in ("printed", "several")
    ]
    top = height - CARD_PX + (CARD_PX - 8 - LINE_PX * len(lines)) / 2
    for number, line in enumerate(lines):
        place = (width / 2, top + (number + 0.5) * LINE_PX)
        draw.text(place, line, font=font(FONT_PX), fill=(0, 0, 0), anchor="mm")
    return picture


def outlines() -> dict[str, list[tuple[float, float]]]:
    """Corners of each silhouette around (0, 0), reaching to about 1 in every direction."""

    def ring(number: int) -> list[tuple[float, float]]:
        turns = [2 * math.pi * i / number - math.pi / 2 for i in range(number)]
        return [(math.cos(turn), math.sin(turn)) for turn in turns]

    heart = []
    for i in range(90):
        turn = 2 * math.pi * i / 90
        x = 16 * math.sin(turn) ** 3
        y = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
        heart.append((x / 16, -(y + 2.5) / 15))
    star = [(x * (1.05, 0.42)[i % 2], y * (1.05, 0.42)[i % 2]) for i, (x, y) in enumerate(ring(10))]
    return {
        "round": ring(90),
        "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
        "star": star,
        "heart": heart,
        "triangle": [(0, -1), (1.15, 0.98), (-1.15, 0.98)],
    }


@cache
def font(size_px: int) -> "ImageFont.FreeTypeFont":
    """DejaVu Sans Bold as matplotlib ships it; the simple layout engine is the same on every machine."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"
    return ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)
