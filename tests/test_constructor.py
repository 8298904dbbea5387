"""Random constructor calls, hundreds of them."""

import pytest
from random_constructor_calls import outcomes


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_500_random_constructor_calls_end_in_success_or_one_sentence():
    found = outcomes(seed=0, count=500)
    assert not found["failed"], "\n\n".join(found["failed"])
    assert min(len(found[word]) for word in ("refused", "made", "trained")) > 20
