"""The list of mistakes stays alive: each can still be made, and the page tells of each."""

from __future__ import annotations

import re

import pytest
from tools.mutate import PAGE, ROOT, MutationError, caught_before, page_text, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_still_applies(mutation):
    """Catches code that was changed where a mutation stands: it would be tried no more."""
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    broken = mutation.applied(text)
    assert broken != text
    if mutation.file.endswith(".py"):
        compile(broken, mutation.file, "exec")
    assert all((ROOT / test.partition("::")[0]).exists() for test in mutation.tests)


def test_a_mutation_that_no_longer_applies_is_named():
    """Catches a mutation that is passed over in silence because its line was rewritten."""
    mutation = MUTATIONS[0]
    with pytest.raises(MutationError, match=f"{mutation.name}: its text occurs 0 times"):
        mutation.applied("another text")
    with pytest.raises(MutationError, match="occurs 2 times"):
        mutation.applied(2 * mutation.old)


def test_the_page_tells_what_caught_each_mutation():
    """Catches a mutation that was added and never tried, or a row of one that is gone."""
    assert PAGE.read_text(encoding="utf-8") == page_text(MUTATIONS, caught_before())
    assert list(caught_before()) == [mutation.name for mutation in MUTATIONS]


def test_the_tests_on_the_page_are_there():
    """Catches a test that was renamed or dropped, and with it the only one that notices."""
    for test in caught_before().values():
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), test
