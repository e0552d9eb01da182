"""The report of an evaluation: its first line, its tables, and questions that failed."""

from __future__ import annotations

import pytest

from glimt.evaluate.evaluation_report import Asked, Failure, evaluation_document, status_line
from glimt.evaluate.forced import Divergence
from glimt.evaluate.tasks import Evaluation, Tally
from glimt.reports.document import Plot, Table

WHOLE = (Tally("a", "en", 4, 3, None, 0), Tally("b", "zh", 2, 2, None, 0))
FAILED = (Tally("a", "en", 4, 3, 2, 1), Tally("b", "zh", 2, 2, 2, 0))
FAILURE = Failure("a-3", "a", "en", "messages[0].content[0]: is empty")
ASKED = Asked("held-out", None, None)
AGAINST = Asked("held-out", "float32", None)


@pytest.mark.parametrize(
    ("tallies", "asked", "said"),
    [
        (WHOLE, ASKED, "Whole: 6 questions asked, 83.3% answered right"),
        (
            WHOLE,
            Asked("held-out", None, 2),
            "Part: 6 questions asked, 83.3% answered right (only the first 2 of each task and "
            "language)",
        ),
        (
            FAILED,
            ASKED,
            "With errors: 6 questions asked, 83.3% answered right, 1 could not be asked or "
            "answered",
        ),
    ],
)
def test_the_first_line_says_how_whole_the_run_is(tallies, asked, said):
    """Catches failures that pass for wrong answers, and a part that passes for the whole."""
    assert status_line(Evaluation(tallies, None), asked) == said


def test_a_whole_evaluation_has_accuracies_and_no_failures():
    """Catches a share of the wrong total, and a divergence from nothing."""
    document = evaluation_document(Evaluation(WHOLE, None), ASKED, [], {"model": "m"})
    assert document.is_whole
    assert document.facts == {"questions": "held-out", "decoding": "greedy", "model": "m"}
    tables = [section for section in document.sections if isinstance(section, Table)]
    assert [table.title for table in tables] == ["Accuracy"]
    assert tables[0].rows[0] == ("a", "en", "4", "3", "75.0%", "0")
    assert [s.name for s in document.sections if isinstance(s, Plot)] == ["accuracy"]


def test_failures_and_divergence_have_tables_of_their_own():
    """Catches a question that failed and is not named, and an agreement without its column."""
    found = Evaluation(FAILED, Divergence(100, 1e-3, 2e-2, 0.98))
    document = evaluation_document(found, AGAINST, [FAILURE], {})
    assert not document.is_whole
    tables = {s.title: s for s in document.sections if isinstance(s, Table)}
    assert tables["Accuracy"].headings[-1] == "as float32"
    assert tables["Accuracy"].rows[0][-1] == "50.0%"
    assert tables["Accuracy"].marked == {0}
    assert tables["Questions that failed"].rows == (("a-3", "a", "en", FAILURE.why),)
    assert ("same likeliest token", "98.000%") in tables[
        "Divergence from float32, not quantised"
    ].rows


def test_a_part_is_not_whole():
    """Catches a limited run without its warning in a pull request."""
    document = evaluation_document(Evaluation(WHOLE, None), Asked("x", None, 1), [], {})
    assert not document.is_whole
