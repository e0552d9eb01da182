"""The training data is true, balanced, repeatable, and what is held out stays held out."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont
from training.data import easy_vqa, garments, scene_painting, talk, texts
from training.data.easy_vqa import EasyVqaSource
from training.data.garments import GarmentSource
from training.data.layout import (
    NUM_OBJECT_KINDS,
    character_kind,
    ground_kind,
    object_kind,
)
from training.data.mixture import LANGUAGES, Mixture, corpus, held_out_questions, training_mixtures
from training.data.photos import NUM_HELD_OUT, PhotoSource, photographs
from training.data.sample import DataMissing, Exchange, Sample, Source
from training.data.scene import BACKGROUNDS, COLOURS, SHAPES, Object, Scene
from training.data.scene_questions import KINDS, TESTED
from training.data.scenes import SceneSource
from training.data.show import contact_sheet
from training.data.talk import TalkSource
from training.data.texts import TextSource

DRAWN_TASKS = ("garments", "scenes", "yes_no", "texts", "second_turns")


@pytest.fixture(scope="module")
def sources(
    fashion: Path, font: Path, easy_vqa_data: Path, photo_folder: Path
) -> tuple[Source, ...]:
    photos = PhotoSource(photographs(photo_folder))
    return (
        GarmentSource(fashion),
        SceneSource(),
        TextSource(font),
        EasyVqaSource(easy_vqa_data),
        photos,
        TalkSource(),
    )


def drawn(source: Source, count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [source.draw(rng, LANGUAGES[number % 2]) for number in range(count)]


def all_exchanges(samples: list[Sample]) -> list[Exchange]:
    firsts = [exchange for sample in samples for exchange in sample.exchanges]
    return firsts + [exchange.follow_up for exchange in firsts if exchange.follow_up]


def pixels(sample: Sample) -> bytes:
    return b"" if sample.image is None else sample.image.tobytes()


# --- every source ----------------------------------------------------------------------------


def test_equal_seeds_draw_equal_samples(sources):
    """Would catch a source that uses the clock, a set's order or the global generator."""
    for source in sources:
        first, second = drawn(source, 20), drawn(source, 20)
        assert [(s.exchanges, s.label, pixels(s)) for s in first] == [
            (s.exchanges, s.label, pixels(s)) for s in second
        ]


def test_samples_bear_their_task_and_language_and_are_rgb(sources):
    """Would catch a grey picture, and an English question filed as Chinese."""
    for source in sources:
        for number, sample in enumerate(drawn(source, 40)):
            assert sample.task == source.task
            assert sample.language == LANGUAGES[number % 2]
            assert sample.image is None or sample.image.mode == "RGB"
            for exchange in all_exchanges([sample]):
                said = exchange.question + exchange.answer.replace("glimt", "").split("“")[0]
                is_chinese = re.search(r"[\u4e00-\u9fff]", exchange.question) is not None
                assert is_chinese == (sample.language == "zh"), said


def test_every_answer_is_a_sentence(sources):
    """Would catch an empty answer, one without its full stop, and an unfilled blank."""
    for source in sources:
        for exchange in all_exchanges(drawn(source, 300)):
            assert len(exchange.answer) > 1
            assert exchange.answer[-1] in "。.", exchange
            assert exchange.question
            assert "{" not in exchange.question + exchange.answer


def test_no_question_comes_twice_about_one_picture(sources):
    """Would catch a conversation that asks the same again, and answers that disagree."""
    for source in sources:
        for sample in drawn(source, 200):
            questions = [exchange.question for exchange in sample.exchanges]
            assert len(set(questions)) == len(questions)


# --- scenes: an oracle that reads the question and looks at the objects ----------------------

NUMBERS = {
    "zh": ("没有。", "有一个。", "有两个。", "有三个。", "有四个。"),
    "en": (
        "There are none.",
        "There is one.",
        "There are two.",
        "There are three.",
        "There are four.",
    ),
}
ROWS_AND_COLUMNS = {
    "zh": ("左上角 上面 右上角", "左边 中间 右边", "左下角 下面 右下角"),
    "en": (
        "at_the_top_left at_the_top at_the_top_right",
        "on_the_left in_the_middle on_the_right",
        "at_the_bottom_left at_the_bottom at_the_bottom_right",
    ),
}
SIDES = {
    "left": ("最左边", r"leftmost|far left", lambda thing: -thing.x),
    "right": ("最右边", r"rightmost|far right", lambda thing: thing.x),
    "up": ("最上面", r"topmost|very top", lambda thing: -thing.y),
    "down": ("最下面", r"bottommost|very bottom", lambda thing: thing.y),
}
NOUN = r"(?:the )?((?:large |small )?(?:\w+ )?(?:object|circle|square|triangle|star))"
CLEAR = 0.15  # of the picture: nobody would call objects so far apart level


def names(value: str, kind: dict[str, tuple[str, ...]], phrase: str, language: str) -> bool:
    if language == "zh":
        return kind[value][0] in phrase
    return re.search(rf"\b{value}s?\b", phrase) is not None


def meant(phrase: str, scene: Scene, language: str, *, has_size: bool = True) -> list[Object]:
    """The objects that the words fit, the outermost one where they speak of that."""
    things = list(scene.objects)
    for chinese, english, along in SIDES.values():
        if re.search(chinese if language == "zh" else english, phrase):
            *others, last = sorted(things, key=along)
            assert all(along(last) - along(other) > CLEAR for other in others)
            return [last]
    if colours := [name for name in COLOURS if names(name, COLOURS, phrase, language)]:
        things = [thing for thing in things if thing.colour in colours]
    if shapes := [name for name in SHAPES if names(name, SHAPES, phrase, language)]:
        things = [thing for thing in things if thing.shape in shapes]
    if has_size and (size := re.search(r"大的|小的|\blarge\b|\bsmall\b", phrase)):
        things = [thing for thing in things if thing.is_large == (size[0] in ("大的", "large"))]
    assert len(colours) <= 1
    assert len(shapes) <= 1
    return things


def the_one(phrase: str, scene: Scene, language: str, *, has_size: bool = True) -> Object:
    things = meant(phrase, scene, language, has_size=has_size)
    assert len(things) == 1, f"{phrase} is ambiguous in {scene}"
    return things[0]


def attribute_of(thing: Object, question: str, language: str) -> str:
    """The answer to a question about colour, shape, size or place of an object."""
    zh, en = COLOURS[thing.colour].zh, thing.colour
    if re.search(r"哪里|位置|[Ww]here|part of", question):
        return place_of(thing, language)
    if re.search(r"颜色|colou?r", question):
        return f"它是{zh}的。" if language == "zh" else f"It is {en}."
    if re.search(r"形状|什么图形|shape", question):
        return f"它是{SHAPES[thing.shape].zh}。" if language == "zh" else f"It is a {thing.shape}."
    assert re.search(r"多大|还是小|large|big", question)
    chinese, english = ("大的", "large") if thing.is_large else ("小的", "small")
    return f"它是{chinese}。" if language == "zh" else f"It is {english}."


def place_of(thing: Object, language: str) -> str:
    place = ROWS_AND_COLUMNS[language][int(thing.y * 3)].split()[int(thing.x * 3)]
    assert min(abs(thing.x * 3 - 1), abs(thing.x * 3 - 2)) > 0.1, "near a border"
    assert min(abs(thing.y * 3 - 1), abs(thing.y * 3 - 2)) > 0.1, "near a border"
    return f"它在{place}。" if language == "zh" else f"It is {place.replace('_', ' ')}."


def two_meant(question: str, scene: Scene, language: str) -> list[Object]:
    if language == "zh":
        phrases = re.fullmatch(r"(.+?)是?在(.+)的[左右上下][边面].*", question).groups()
    else:
        phrases = re.findall(NOUN, question)
    assert len(phrases) == 2
    return [the_one(phrase, scene, language) for phrase in phrases]


def answered_relation(question: str, scene: Scene, language: str) -> tuple[str, Object]:
    one, other = two_meant(question, scene, language)
    if re.search(r"左边|left", question):
        assert abs(one.x - other.x) > CLEAR
        chinese, english = ("左边", "on the left") if one.x < other.x else ("右边", "on the right")
    else:
        assert abs(one.y - other.y) > CLEAR
        chinese, english = ("上面", "above") if one.y < other.y else ("下面", "below")
    return (f"它在{chinese}。" if language == "zh" else f"It is {english}."), one


def answered_yes_no(question: str, scene: Scene, language: str) -> tuple[bool, Object | None]:
    if claim := re.search(r"的([左右上下])[边面]吗|(left|right) of|(above|below)", question):
        one, other = two_meant(question, scene, language)
        word = next(filter(None, claim.groups()))
        difference = one.x - other.x if word in "左右leftright" else one.y - other.y
        assert abs(difference) > CLEAR
        return (difference < 0) == (word in ("左", "上", "left", "above")), one
    parts = re.fullmatch(r"(?!.*是不是)(.+)是(.+)吗？|Is (the .+) ((?:an? )?\w+)\?", question)
    if parts:
        who, what = filter(None, parts.groups())
        thing = the_one(who, scene, language)
        return thing in meant(what, scene, language), thing
    things = meant(question, scene, language)
    return bool(things), things[0] if len(things) == 1 else None


def answered(exchange: Exchange, scene: Scene, language: str) -> tuple[str, Object | None]:
    """The oracle's answer, and the one object that is spoken of."""
    question = exchange.question
    if exchange.kind == "count":
        things = meant(question, scene, language)
        return NUMBERS[language][len(things)], things[0] if len(things) == 1 else None
    if exchange.kind == "yes_no":
        is_so, thing = answered_yes_no(question, scene, language)
        return {"zh": ("不是。", "是的。"), "en": ("No.", "Yes.")}[language][is_so], thing
    if exchange.kind == "relation":
        return answered_relation(question, scene, language)
    if exchange.kind == "background":
        zh = BACKGROUNDS[scene.background].zh
        en = f"The background is {scene.background}."
        return (f"背景是{zh}的。" if language == "zh" else en), None
    if exchange.kind == "describe":
        return described(scene, language), scene.objects[0] if len(scene.objects) == 1 else None
    thing = the_one(question, scene, language, has_size=exchange.kind != "size")
    return attribute_of(thing, question, language), thing


def described(scene: Scene, language: str) -> str:
    things = sorted(scene.objects, key=lambda thing: thing.x)
    if language == "zh":
        said = [f"一个{COLOURS[t.colour].zh}的{SHAPES[t.shape].zh}" for t in things]
        return "有" + "、".join(said)[::-1].replace("、", "和", 1)[::-1] + "。"
    said = [f"a{'n' * (t.colour == 'orange')} {t.colour} {t.shape}" for t in things]
    return "There is " + ", ".join(said)[::-1].replace(" ,", " dna ", 1)[::-1] + "."


@pytest.mark.parametrize("language", LANGUAGES)
def test_scene_answers_follow_from_the_objects(language):
    """Would catch a wrong answer, an ambiguous referent and a place that is not clear."""
    rng, source, num_follow_ups = random.Random(1), SceneSource(follow_ups=0.6), 0
    for _ in range(700):
        sample, scene = source.draw_with_scene(rng, language)
        for exchange in sample.exchanges:
            answer, thing = answered(exchange, scene, language)
            assert exchange.answer == answer, (exchange, scene)
            if follow_up := exchange.follow_up:
                num_follow_ups += 1
                assert thing is not None
                assert follow_up.answer == attribute_of(thing, follow_up.question, language)
                assert follow_up.answer != exchange.answer
    assert num_follow_ups > 700


def in_full(thing: Object, language: str) -> str:
    place = ROWS_AND_COLUMNS[language][int(thing.y * 3)].split()[int(thing.x * 3)]
    size = {"zh": ("小的", "大的"), "en": ("small", "large")}[language][thing.is_large]
    if language == "zh":
        return f"一个{size}{COLOURS[thing.colour].zh}{SHAPES[thing.shape].zh}在{place}"
    return f"a {size} {thing.colour} {thing.shape} {place.replace('_', ' ')}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_inventory_tells_everything_of_every_object_in_its_order(language):
    """Would catch an object left out, a wrong attribute, and an order other than the one named."""
    rng = random.Random(3)
    source = SceneSource(num_exchanges=1, kinds=("inventory",), follow_ups=0)
    ways = {
        "zh": ("从左到右：", "从上到下："),
        "en": ("From left to right: ", "From top to bottom: "),
    }
    seen = Counter()
    for _ in range(200):
        sample, scene = source.draw_with_scene(rng, language)
        (exchange,) = sample.exchanges
        is_upright = exchange.answer.startswith(ways[language][1])
        ordered = sorted(scene.objects, key=lambda thing: thing.y if is_upright else thing.x)
        told = [in_full(thing, language) for thing in ordered]
        joint, end = ("；", "。") if language == "zh" else ("; ", ".")
        assert exchange.answer == ways[language][is_upright] + joint.join(told) + end
        seen[is_upright, len(ordered)] += 1
    assert len(seen) >= 7  # one object is told from left to right


def test_inventories_are_taught_and_never_asked_in_a_test(folders):
    """Would catch a kind of question that is in the tests only because training knows it."""
    assert "inventory" in KINDS
    assert "inventory" not in TESTED
    assert set(KINDS) - {"inventory"} == set(TESTED)
    asked = held_out_questions("scenes", 400, 2, **folders)
    assert {sample.exchanges[0].kind for sample in asked} == set(TESTED)


def test_middles_are_those_of_the_objects():
    """Would catch x taken for y, and a middle that lies outside of its object."""
    rng = random.Random(4)
    for _ in range(50):
        sample, scene = SceneSource().draw_with_scene(rng, "en")
        assert len(sample.middles) == len(scene.objects)
        for (x, y), thing in zip(sample.middles, scene.objects, strict=True):
            place = int(x * sample.image.width), int(y * sample.image.height)
            assert sample.layout.getpixel(place) == object_kind(thing)


def test_objects_are_painted_where_and_as_the_scene_says():
    """Would catch swapped axes, an object over another, and a colour nearer to another's name."""
    rng = random.Random(2)
    middles = {
        name: [(a + b) / 2 for a, b in zip(*ends, strict=True)]
        for name, ends in scene_painting._COLOUR_RANGES.items()
    }
    for _ in range(200):
        sample, scene = SceneSource().draw_with_scene(rng, "en")
        assert sample.image.size == (scene.width, scene.height)
        for thing in scene.objects:
            place = int(thing.x * scene.width), int(thing.y * scene.height)
            seen = sample.image.getpixel(place)
            distances = {
                name: sum((a - b) ** 2 for a, b in zip(seen, middle, strict=True))
                for name, middle in middles.items()
            }
            assert min(distances, key=distances.get) == thing.colour


def test_objects_do_not_overlap():
    """Would catch a counting question about objects of which one hides another."""
    rng = random.Random(3)
    for _ in range(300):
        _, scene = SceneSource().draw_with_scene(rng, "zh")
        short = min(scene.width, scene.height)
        for one, other in combinations(scene.objects, 2):
            reach = (one.diameter + other.diameter) / 2 * short
            apart = abs(one.x - other.x) * scene.width, abs(one.y - other.y) * scene.height
            assert max(apart) > reach


def test_layouts_say_which_object_is_where():
    """Would catch a patch taught another object's colour, or the background as an object."""
    rng = random.Random(8)
    for _ in range(100):
        sample, scene = SceneSource().draw_with_scene(rng, "en")
        assert sample.layout.size == sample.image.size
        kinds = {object_kind(thing) for thing in scene.objects}
        ground = ground_kind(scene.background)
        assert {kind for _, kind in sample.layout.getcolors()} == kinds | {ground}
        assert max(kinds) <= NUM_OBJECT_KINDS
        for thing in scene.objects:
            place = int(thing.x * scene.width), int(thing.y * scene.height)
            assert sample.layout.getpixel(place) == object_kind(thing)


def test_layouts_of_texts_have_the_characters_in_their_order(font):
    """Would catch a layout that is not turned with its text, or names the wrong characters."""
    for sample in drawn(TextSource(font), 60):
        written = re.search('[“"](.+)[”"]', sample.exchanges[0].answer)[1]
        kinds = [character_kind(texts.CHARACTERS.index(each)) for each in written]
        seen = np.asarray(sample.layout)
        assert set(np.unique(seen)) == {0, *kinds}
        middles = [np.nonzero(seen == kind)[1].mean() for kind in dict.fromkeys(kinds)]
        if len(set(kinds)) == len(kinds):
            assert middles == sorted(middles)


# --- balance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_yes_and_no_are_equally_likely_of_scenes(language):
    """Would catch a model that can score by always saying no."""
    rng, source = random.Random(4), SceneSource(num_exchanges=1, kinds=("yes_no",))
    answers = Counter(source.draw(rng, language).exchanges[0].answer for _ in range(2000))
    assert set(answers) == ({"是的。", "不是。"} if language == "zh" else {"Yes.", "No."})
    assert all(900 <= count <= 1100 for count in answers.values()), answers


def test_yes_and_no_are_equally_likely_of_easy_vqa(easy_vqa_data):
    """Would catch a wrong reading of its negated questions, or a form of them left out."""
    exchanges = all_exchanges(drawn(EasyVqaSource(easy_vqa_data), 1500))
    answers = [exchange.answer for exchange in exchanges if exchange.kind == "yes_no"]
    is_yes = [answer in ("Yes.", "是的。") for answer in answers]
    assert len(is_yes) > 2000
    assert 0.45 < sum(is_yes) / len(is_yes) < 0.55


def test_colours_shapes_sizes_and_numbers_are_spread():
    """Would catch scenes in which one guess is right far more often than another."""
    rng = random.Random(5)
    scenes = [SceneSource().draw_with_scene(rng, "en")[1] for _ in range(1500)]
    things = [thing for scene in scenes for thing in scene.objects]
    for seen, num_values in (
        (Counter(len(scene.objects) for scene in scenes), 4),
        (Counter(scene.background for scene in scenes), 6),
        (Counter(thing.colour for thing in things), 8),
        (Counter(thing.shape for thing in things), 4),
        (Counter(thing.is_large for thing in things), 2),
    ):
        assert len(seen) == num_values
        assert min(seen.values()) > 0.75 * max(seen.values()), seen


def test_counts_places_and_second_turns_are_spread():
    """Would catch a kind of answer that is hardly ever right, so never learnt."""
    exchanges = all_exchanges(drawn(SceneSource(), 2000))
    for kind, num_answers in (("count", 10), ("relation", 8), ("where", 18), ("size", 4)):
        answers = Counter(exchange.answer for exchange in exchanges if exchange.kind == kind)
        assert len(answers) == num_answers
        assert min(answers.values()) > 0.2 * max(answers.values()), answers
    attributes = Counter(
        next(name for name in ("颜色|colou?r", "形状|shape", "大|large|big", "在|where|Where")
             if re.search(name, exchange.question))
        for exchange in exchanges if exchange.kind == "second_turn"
    )  # fmt: skip
    assert len(attributes) == 4
    assert min(attributes.values()) > 0.5 * max(attributes.values()), attributes


def test_half_of_the_mixture_is_chinese_and_weights_hold():
    """Would catch a mixture that forgets a source or a language."""
    mixture = Mixture({"talk": (TalkSource(), 3), "photos": (PhotoSource(), 1)})
    samples = list(islice(mixture.samples(0), 600))
    assert 240 < sum(sample.language == "zh" for sample in samples) < 360
    assert 400 < sum(sample.task == "talk" for sample in samples) < 500


GARMENTS = (  # in the order of Fashion-MNIST's labels
    ("T恤", "T-shirt"),
    ("裤子", "trousers"),
    ("套头衫", "pullover"),
    ("连衣裙", "dress"),
    ("外套", "coat"),
    ("凉鞋", "sandal"),
    ("衬衫", "shirt"),
    ("运动鞋", "sneaker"),
    ("包", "bag"),
    ("短靴", "ankle boot"),
)


def test_garments_are_named_by_their_labels(fashion):
    """Would catch names in another order than the labels."""
    source, rng = GarmentSource(fashion), random.Random(6)
    seen = set()
    for index in range(200):
        label = source.label_of(index)
        seen.add(label)
        assert GARMENTS[label][0] in source.sample_of(index, rng, "zh").exchanges[0].answer
        sample = source.sample_of(index, rng, "en")
        assert GARMENTS[label][1] in sample.exchanges[0].answer
        assert sample.label == label
    assert seen == set(range(10))
    assert source.picture(rng)[1] in seen
    assert garments.answer_of(1, "en") == "The picture shows trousers."
    assert garments.answer_of(9, "en") == "The picture shows an ankle boot."


def test_every_character_has_a_glyph_of_its_own(font):
    """Would catch a character that the font lacks, or one that is listed twice."""
    assert len(texts.HANZI) == 60
    assert len(set(texts.CHARACTERS)) == 96
    face = ImageFont.truetype(str(font), 32)
    glyphs = {bytes(face.getmask(character)) for character in texts.CHARACTERS}
    assert len(glyphs) == 96


def test_texts_are_what_the_answer_says_and_of_the_lengths_promised(font):
    """Would catch an answer with a quote inside, and texts that are too long."""
    for is_held_out in (False, True):
        samples = drawn(TextSource(font, held_out=is_held_out), 400)
        written = [re.search('[“"](.+)[”"]', s.exchanges[0].answer)[1] for s in samples]
        assert {len(text) for text in written} == {1, 2, 3, 4}
        assert set("".join(written)) <= set(texts.CHARACTERS)


def test_a_nought_and_an_o_can_be_told_apart(font):
    """Would catch a lone O: stretched, it is the very picture of a nought."""
    for clear in ("0", "00", "A0", "BOB", "A10", "天0", "IO"):
        assert texts.is_clear(clear) == (clear != "A0")
    assert not texts.is_clear("O")
    assert not texts.is_clear("OO")
    for sample in drawn(TextSource(font), 1000):
        written = re.search('[“"](.+)[”"]', sample.exchanges[0].answer)[1]
        assert "O" not in written or re.fullmatch("[A-Z]{2,}", written)


def test_all_questions_of_easy_vqa_have_a_chinese_form(easy_vqa_data):
    """Would catch a form that is rendered wrongly or not at all."""
    for is_held_out in (False, True):
        source = EasyVqaSource(easy_vqa_data, held_out=is_held_out)
        for asked in source._asked.values():
            for question, answer in asked:
                chinese = easy_vqa.in_chinese(question)
                is_negated = re.search(r" not? ", question) is not None
                assert is_negated == (re.search("没|不", chinese) is not None)
                assert ("吗？" in chinese) == (answer in ("yes", "no"))
    assert easy_vqa.in_chinese("is there not a red shape?") == "没有红色的形状吗？"
    with pytest.raises(ValueError, match="not a question"):
        easy_vqa.in_chinese("how many shapes are there?")


def test_talk_knows_many_wordings_and_misses_the_picture():
    """Would catch a model that describes a picture nobody sent."""
    for language in LANGUAGES:
        wordings = {w for topic in talk._TOPICS for w in getattr(topic.questions, language)}
        assert len(wordings) >= 25
    samples = drawn(TalkSource(), 200)
    assert all(sample.image is None for sample in samples)
    kinds = Counter(exchange.kind for exchange in all_exchanges(samples))
    assert kinds["no_picture"] > 40


# --- held out --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(fashion: Path, font: Path, easy_vqa_data: Path, photo_folder: Path) -> dict[str, Path]:
    return {"fashion": fashion, "font": font, "easy_vqa": easy_vqa_data, "photos": photo_folder}


@pytest.mark.parametrize("task", [*DRAWN_TASKS, "photos"])
def test_held_out_questions_are_repeatable_and_single(task, folders):
    """Would catch a list that changes with its length, and scores that cannot be compared."""
    longer = list(held_out_questions(task, 60, 7, **folders))
    shorter = list(held_out_questions(task, 20, 7, **folders))
    assert [(s.exchanges, pixels(s)) for s in longer[:20]] == [
        (s.exchanges, pixels(s)) for s in shorter
    ]
    assert list(held_out_questions(task, 20, 8, **folders)) != shorter
    assert all(len(sample.exchanges) == 1 for sample in longer)
    assert all(
        (sample.exchanges[0].follow_up is not None) == (task == "second_turns") for sample in longer
    )
    assert [sample.language for sample in longer] == ["zh", "en"] * 30


def test_held_out_pictures_are_never_trained_on(folders):
    """Would catch a test file among the training files, or one seed for both."""
    mixtures = training_mixtures(**folders)
    trained = {pixels(s) for mixture in mixtures for s in islice(mixture.samples(0), 400)}
    for task in (*DRAWN_TASKS, "photos"):
        held_out = {pixels(s) for s in held_out_questions(task, 100, 0, **folders)}
        assert not trained & (held_out - {b""})


def test_held_out_texts_are_never_trained_on(font):
    """Would catch a model that knows words by heart and cannot read others."""
    trained = {s.exchanges[0].answer for s in drawn(TextSource(font), 3000) if s.language == "zh"}
    held_out = drawn(TextSource(font, held_out=True), 600)
    longer = {
        sample.exchanges[0].answer
        for sample in held_out
        if sample.language == "zh" and len(sample.exchanges[0].answer) >= len("写着“春夏秋”。")
    }
    assert len(longer) > 100
    assert not trained & longer


def test_the_last_59_photographs_are_held_out(photo_folder):
    """Would catch photographs that are both declined in training and counted in the test."""
    held_out, trained = photographs(photo_folder, held_out=True), photographs(photo_folder)
    assert len(held_out) == NUM_HELD_OUT
    assert trained + held_out == sorted(photo_folder.glob("*.jpg"))
    samples = list(held_out_questions("photos", 2 * NUM_HELD_OUT, 0, photos=photo_folder))
    assert len({pixels(sample) for sample in samples}) == NUM_HELD_OUT


def test_yes_no_takes_both_sources_in_both_languages(folders):
    """Would catch a list in which one language has easy-vqa only."""
    samples = held_out_questions("yes_no", 80, 0, **folders)
    seen = Counter((sample.task, sample.language) for sample in samples)
    assert set(seen.values()) == {20}
    assert len(seen) == 4


# --- the rest --------------------------------------------------------------------------------


def test_corpus_is_repeatable_and_holds_questions_and_answers(folders):
    """Would catch a tokenizer that differs from run to run."""
    places = {name: folder for name, folder in folders.items() if name != "photos"}
    lines = list(corpus(500, 0, **places))
    assert len(lines) == 500
    assert lines == list(corpus(500, 0, **places))
    assert any("？" in line for line in lines)


def test_missing_data_names_what_to_install(tmp_path):
    """Would catch a bare FileNotFoundError in the middle of a training run."""
    for start, name in (
        (lambda: GarmentSource(tmp_path), "dataset-fashion-mnist"),
        (lambda: TextSource(tmp_path / "no.ttc"), "fonts-wqy-microhei"),
        (lambda: EasyVqaSource(tmp_path), "pip install easy-vqa"),
        (lambda: photographs(tmp_path), "holds 0 photographs"),
    ):
        with pytest.raises(DataMissing, match=name):
            start()


def test_unknown_task_and_photos_without_a_folder_are_refused():
    """Would catch an evaluation of nothing that reports a perfect score."""
    with pytest.raises(ValueError, match="no held-out questions of 'scene'"):
        next(held_out_questions("scene", 1, 0))
    with pytest.raises(ValueError, match="need the folder"):
        next(held_out_questions("photos", 1, 0))


def test_contact_sheet_has_a_cell_for_every_sample(font):
    """Would catch a sheet that leaves the last samples out."""
    samples = drawn(SceneSource(), 3) + drawn(TalkSource(), 2)
    assert contact_sheet(samples).height == 3 * contact_sheet(samples[:2]).height
