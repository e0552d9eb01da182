"""All tasks together: the mixture that is trained on, and the questions that are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from training.data.easy_vqa import EasyVqaSource
from training.data.garments import FASHION_FOLDER, GarmentSource
from training.data.photos import PhotoSource, photographs
from training.data.sample import Exchange, Language, Sample, Source
from training.data.scene_questions import TESTED
from training.data.scenes import SceneSource
from training.data.talk import TalkSource
from training.data.texts import FONT, TextSource

LANGUAGES: tuple[Language, Language] = ("zh", "en")
_HARD_KINDS = ("count", "relation", "yes_no")  # asked twice as often in training as in tests
_LOOSELY_TYPED = 0.12  # share of the training samples whose questions are carelessly typed


class Mixture:
    """Draws from several sources, each as often as its weight says, half in each language."""

    def __init__(self, sources: Mapping[str, tuple[Source, float]]) -> None:
        self._sources = tuple(source for source, _ in sources.values())
        self._weights = tuple(weight for _, weight in sources.values())

    def draw(self, rng: random.Random) -> Sample:
        """One sample; equal states of `rng` give equal samples."""
        (source,) = rng.choices(self._sources, self._weights)
        sample = source.draw(rng, rng.choice(LANGUAGES))
        return _loosely_typed(sample, rng) if rng.random() < _LOOSELY_TYPED else sample

    def samples(self, seed: int) -> Iterator[Sample]:
        """Samples without end, always the same ones for a seed."""
        rng = random.Random(f"training {seed}")
        while True:
            yield self.draw(rng)


class Mixtures(NamedTuple):
    """What the demo models are trained on.

    conversations: all tasks
    pictures:      those of which is known what is where in them, for losses on the tower alone
    """

    conversations: Mixture
    pictures: Mixture


def training_mixtures(
    *,
    fashion: Path = FASHION_FOLDER,
    font: Path = FONT,
    photos: Path | None = None,
    easy_vqa: Path | None = None,
) -> Mixtures:
    """The mixtures that the demo models are trained on.

    photos:   folder of photographs; without it, pictures to decline are only drawn
    easy_vqa: data folder of easy-vqa; None finds it where pip installed it
    """
    paths = photographs(photos) if photos else []
    scenes = SceneSource(num_exchanges=6, kinds=(*TESTED, *_HARD_KINDS))
    inventories = SceneSource(num_exchanges=1, kinds=("inventory",), follow_ups=0)
    texts, garments = TextSource(font), GarmentSource(fashion)
    conversations: dict[str, tuple[Source, float]] = {
        "scenes": (scenes, 0.48),
        "inventories": (inventories, 0.12),
        "texts": (texts, 0.13),
        "garments": (garments, 0.11),
        "easy_vqa": (EasyVqaSource(easy_vqa), 0.06),
        "photos": (PhotoSource(paths), 0.06),
        "talk": (TalkSource(), 0.04),
    }
    plain_scenes = SceneSource(num_exchanges=1, follow_ups=0)
    pictures: dict[str, tuple[Source, float]] = {
        "scenes": (plain_scenes, 0.3),
        "texts": (texts, 0.35),
        "garments": (garments, 0.35),
    }
    return Mixtures(Mixture(conversations), Mixture(pictures))


def quick_mixtures(*, fashion: Path = FASHION_FOLDER) -> Mixtures:
    """Garments and talk alone, which a few minutes are enough for."""
    garments = GarmentSource(fashion)
    conversations: dict[str, tuple[Source, float]] = {
        "garments": (garments, 0.95),
        "talk": (TalkSource(), 0.05),
    }
    return Mixtures(Mixture(conversations), Mixture({"garments": (garments, 1.0)}))


def corpus(
    count: int,
    seed: int,
    *,
    fashion: Path = FASHION_FOLDER,
    font: Path = FONT,
    easy_vqa: Path | None = None,
) -> Iterator[str]:
    """`count` questions and answers as the mixture has them, to train a tokenizer on."""
    mixture = training_mixtures(fashion=fashion, font=font, easy_vqa=easy_vqa).conversations
    num_given = 0
    for sample in mixture.samples(seed):
        for text in _texts_of(sample):
            if num_given == count:
                return
            num_given += 1
            yield text


def _texts_of(sample: Sample) -> Iterator[str]:
    for exchange in sample.exchanges:
        asked: Exchange | None = exchange
        while asked:
            yield asked.question
            yield asked.answer
            asked = asked.follow_up


def _loosely_typed(sample: Sample, rng: random.Random) -> Sample:
    """The questions as people type them: no capital, no mark at the end, or a narrow one."""
    begin = rng.choice((str, _without_capital))
    end = rng.choice(("", "", "?"))
    return replace(
        sample,
        exchanges=tuple(
            _retyped(exchange, lambda text: begin(_marked(text, end)))
            for exchange in sample.exchanges
        ),
    )


def _retyped(exchange: Exchange, retype: Callable[[str], str]) -> Exchange:
    follow_up = exchange.follow_up and _retyped(exchange.follow_up, retype)
    return replace(exchange, question=retype(exchange.question), follow_up=follow_up)


def _without_capital(text: str) -> str:
    return text[:1].lower() + text[1:]


def _marked(text: str, mark: str) -> str:
    """With another question mark, or without the mark that ends a sentence."""
    return text[:-1] + mark if text[-1] in "？?" else text.rstrip("。.！!")


# --- held-out questions ----------------------------------------------------------------------

HeldOut = Callable[[int, random.Random, Language], Sample]


def held_out_questions(
    task: str,
    count: int,
    seed: int,
    *,
    fashion: Path = FASHION_FOLDER,
    font: Path = FONT,
    photos: Path | None = None,
    easy_vqa: Path | None = None,
) -> Iterator[Sample]:
    """`count` samples of one exchange each (of second_turns: with its follow-up) to test with.

    task: one of garments, scenes, yes_no, texts, second_turns, photos
    Languages alternate. Question number n depends on the task, the seed and n only, so a longer
    list begins like a shorter one; none is drawn as training draws.
    """
    draw = _held_out(task, seed, fashion, font, photos, easy_vqa)
    for number in range(count):
        rng = random.Random(f"held out {task} {seed} {number}")
        yield draw(number, rng, LANGUAGES[number % 2])


def _held_out(
    task: str, seed: int, fashion: Path, font: Path, photos: Path | None, easy_vqa: Path | None
) -> HeldOut:
    if task == "garments":
        return _each_garment(GarmentSource(fashion, held_out=True), seed)
    if task == "scenes":
        return _any_of(SceneSource(num_exchanges=1, follow_ups=0))
    if task == "yes_no":
        scenes = _any_of(SceneSource(num_exchanges=1, kinds=("yes_no",), follow_ups=0))
        return _by_turns(scenes, _any_of(EasyVqaSource(easy_vqa, held_out=True)))
    if task == "texts":
        return _any_of(TextSource(font, held_out=True))
    if task == "second_turns":
        return _with_follow_up(SceneSource(num_exchanges=1, follow_ups=1))
    if task == "photos" and photos:
        return _each_photograph(PhotoSource(photographs(photos, held_out=True)))
    raise ValueError(
        "the held-out photographs need the folder that they are in"
        if task == "photos"
        else f"there are no held-out questions of {task!r}"
    )


def _any_of(source: Source) -> HeldOut:
    def draw(number: int, rng: random.Random, language: Language) -> Sample:
        sample = source.draw(rng, language)
        return replace(sample, exchanges=(rng.choice(sample.exchanges),))

    return draw


def _by_turns(first: HeldOut, second: HeldOut) -> HeldOut:
    """Both in either language: the language changes with every number, the source every two."""

    def draw(number: int, rng: random.Random, language: Language) -> Sample:
        return (second if number // 2 % 2 else first)(number, rng, language)

    return draw


def _with_follow_up(source: Source) -> HeldOut:
    def draw(number: int, rng: random.Random, language: Language) -> Sample:
        while True:
            sample = source.draw(rng, language)
            if sample.exchanges[0].follow_up:
                return sample

    return draw


def _each_garment(source: GarmentSource, seed: int) -> HeldOut:
    """Every picture once before any comes again."""
    order = list(range(len(source)))
    random.Random(f"held out garments {seed}").shuffle(order)

    def draw(number: int, rng: random.Random, language: Language) -> Sample:
        return source.sample_of(order[number % len(order)], rng, language)

    return draw


def _each_photograph(source: PhotoSource) -> HeldOut:
    """Every picture in both languages before any comes again."""

    def draw(number: int, rng: random.Random, language: Language) -> Sample:
        return source.sample_of(number // 2 % len(source), rng, language)

    return draw
