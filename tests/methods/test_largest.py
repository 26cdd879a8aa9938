"""The search for the largest number that fits."""

import pytest

from lingrad.methods.largest import largest


@pytest.mark.parametrize("most", [1, 2, 5, 64, 100])
@pytest.mark.parametrize("start", [1, 2, 3, 40, 64])
@pytest.mark.parametrize("limit", [1, 2, 3, 31, 63, 64, 65, 200])
def test_it_is_found_in_few_trials_none_of_them_too_large(most, start, limit):
    tried = []

    def fits(number):
        tried.append(number)
        return number <= limit

    assert largest(fits, most, start=start) == min(limit, most)
    assert all(1 < number <= most for number in tried)
    assert len(tried) == len(set(tried)) <= 2 * 7 + 1
