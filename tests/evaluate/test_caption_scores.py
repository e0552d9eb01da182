"""Words, BLEU, ROUGE-L and CIDEr-D: by hand, and against stored values of pycocoevalcap 1.2."""

from __future__ import annotations

import math

import pytest

from glimt.evaluate.caption_words import bleu, rouge_l, words
from glimt.evaluate.captions import caption_scores, rarity_of
from glimt.evaluate.cider import cider_d, rarity


def w(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("A man's T-shirt, (red).", "a man 's t-shirt red"),
        ("一只红猫 on the mat。", "一 只 红 猫 on the mat"),
        ("They\u2019re 2 dogs -- big ones!", "they 're 2 dogs big ones"),
        ("猫cat狗", "猫 cat 狗"),
        ("，。！ ... '", ""),
        ("", ""),
    ],
)
def test_words(text, cut):
    """Catches punctuation that counts, and Chinese that is one word."""
    assert words(text) == w(cut)


# --- BLEU ------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """Catches counts that are not clipped at the reference with the most of an n-gram.

    Papineni's example: 2 of 7 unigrams count, no bigram does.
    """
    answer = w("the the the the the the the")
    references = [w("the cat is on the mat"), w("there is a cat on the mat")]
    scores = bleu([answer], [references])
    assert scores[0] == pytest.approx(2 / 7)
    assert scores[1:] == (0.0, 0.0, 0.0)


def test_a_short_corpus_is_penalised_once():
    """Catches a penalty for each answer, and one against the longest reference.

    5 words for 6: all unigrams match, and 3 of the 3 bigrams that there are.
    """
    answers = [w("a b"), w("c d e")]
    references = [[w("a b x"), w("a b x y z")], [w("c d e"), w("c d e f g h i")]]
    scores = bleu(answers, references)
    assert scores[0] == pytest.approx(math.exp(1 - 6 / 5))
    assert scores[1] == pytest.approx(math.exp(1 - 6 / 5))
    assert bleu([()], [[w("a b")]]) == (0.0,) * 4


def test_of_equally_near_references_the_shorter_counts():
    """Catches a tie that is broken by the order of the references."""
    for references in ([w("a b"), w("a b c d")], [w("a b c d"), w("a b")]):
        assert bleu([w("a b c")], [references])[0] == 1.0


# --- ROUGE-L ---------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    """Catches a substring in the place of a subsequence, and beta on the wrong side.

    `a c d` of the 4 words of the answer and of the 5 of the reference.
    """
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert rouge_l(w("a x c d"), [w("a b c d e")]) == pytest.approx(expected)


def test_rouge_l_takes_precision_and_recall_from_any_reference():
    """Catches the best F, which is another figure than COCO's."""
    answer, refs = w("a b"), [w("a b c d e f"), w("a")]
    assert rouge_l(answer, refs) == pytest.approx(1.0)
    assert rouge_l((), refs) == 0.0
    assert rouge_l(w("z"), refs) == 0.0


# --- CIDEr-D ---------------------------------------------------------------------------------


def test_cider_d_by_hand():
    """Catches a logarithm of the wrong count, unclipped counts, a missing factor of 10.

    Two pictures, one reference each, no n-gram in common: every weight is log 2. The answer `a a`
    has the unigram a twice (clipped at 1) and the bigram `a a`, which the reference has not.
    cos_1 = min(2, 1) * 1 / (2 * sqrt 2); lengths differ by 0 pairs.
    """
    references = [[w("a b")], [w("c d")]]
    rare = rarity(references)
    assert cider_d(w("a a"), references[0], rare) == pytest.approx(10 / 4 / (2 * math.sqrt(2)))


def test_an_equal_answer_has_the_most_that_its_length_allows():
    """Catches a penalty where there is no difference in length."""
    references = [[w("a b c d")], [w("e f g h")]]
    rare = rarity(references)
    assert cider_d(w("a b c d"), references[0], rare) == pytest.approx(10)
    assert cider_d(w("e f g h"), references[0], rare) == 0.0
    assert cider_d((), references[0], rare) == 0.0


def test_longer_answers_pay_for_their_length():
    """Catches the wrong sigma: 6 words more cost a factor of exp(-36 / 72)."""
    references = [[w("a")], [w("b")]]
    rare = rarity(references)
    answer = w("a b b b b b b")
    # weights: a and b are each in one picture's references
    norm = math.sqrt(1 + 36)
    expected = 10 / 4 * (1 / norm) * math.exp(-36 / 72)
    assert cider_d(answer, references[0], rare) == pytest.approx(expected)


# Answers, captions, and the scores of pycocoevalcap 1.2 (CiderScorer with n 4 and sigma 6, Rouge,
# Bleu) for the same words; computed once, outside the tests.
CASES = [
    ("a red cat sits on a mat", ["a cat sits on the mat", "the red cat is on a mat"]),
    ("two dogs run in the park", ["a dog runs through a park", "two dogs play in the green park"]),
    ("a man", ["a man rides a brown horse", "someone on a horse", "a man on a horse outside"]),
    ("一只猫坐在垫子上", ["一只红色的猫坐在垫子上", "垫子上有一只猫"]),
    ("", ["a bus on a street", "a bus"]),
]
CIDER_D = [
    3.4477585271851163,
    1.6370945563908934,
    1.3632168254186041,
    5.054974633058014,
    0.0,
]
ROUGE_L = [0.7800511508951408, 0.7587064676616916, 0.45864661654135336, 0.818791946308725, 0.0]
BLEU = [0.8013907998836107, 0.7451907442408896, 0.6104238957150333, 0.4726578446550416]


def test_scores_are_those_of_the_published_code():
    """Catches a difference that the small cases by hand do not reach."""
    captions = [refs for _, refs in CASES]
    scores = caption_scores([answer for answer, _ in CASES], captions, rarity_of(captions))
    assert scores.cider_d == pytest.approx(CIDER_D, abs=1e-12)
    assert scores.rouge_l == pytest.approx(ROUGE_L, abs=1e-12)
    assert scores.bleu == pytest.approx(BLEU, abs=1e-8)  # that code adds 1e-9 to its counts


def test_exact_match_compares_words():
    """Catches a full stop or a capital that makes an answer wrong."""
    captions = [["A cat.", "one dog"]] * 4
    answers = ["a cat", "One dog!", "a dog", "cat a"]
    scores = caption_scores(answers, captions, rarity_of(captions))
    assert scores.exact_match == (1.0, 1.0, 0.0, 0.0)
