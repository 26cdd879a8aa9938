"""Large matrices are thinned: what stays in the slow suite holds every pair of values, and is the same every time."""

import itertools
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.support.thinning import completing, pairs

SIZES = (5, 3, 4, 2)
ALL = [*itertools.product(*map(range, SIZES))]


def held(cases):
    return set().union(*map(pairs, cases))


@pytest.mark.parametrize("kept", [[], ALL[:3], ALL[::7], ALL])
def test_every_pair_of_values_is_held(kept):
    others = [case for case in ALL if case not in kept]
    chosen = [others[place] for place in completing(kept, others)]
    assert len(set(chosen)) == len(chosen) < 40
    assert held([*kept, *chosen]) == held(ALL)


def test_none_is_chosen_for_nothing():
    for left_out in (chosen := [ALL[place] for place in completing([], ALL)]):
        assert chosen.index(left_out) > 0 or held([left_out]) - held(chosen[1:])
    assert completing(ALL[::2], ALL[::2]) == []


def cases(*marks, sizes=SIZES):
    """Items as pytest collects them: a product of parameters, and markers of the test."""
    found = []
    for case in itertools.product(*map(range, sizes)):
        item = SimpleNamespace(
            nodeid=f"tests/test_any.py::test_any[{'-'.join(map(str, case))}]",
            own=[*marks, *(pytest.mark.parametrize(f"p{i}", []) for i in range(len(sizes)))],
            callspec=SimpleNamespace(params={f"p{i}": value for i, value in enumerate(case)}),
        )
        item.iter_markers = lambda name, item=item: [m for m in item.own if m.name == name]
        item.get_closest_marker = lambda name, item=item: next(iter(item.iter_markers(name)), None)
        item.add_marker = lambda name, item=item: item.own.append(getattr(pytest.mark, name))
        found.append(item)
    return found


def suites(items):
    """The values of the cases of each suite."""
    pytest_collection_modifyitems(items)
    found = {"default": [], "slow": [], "exhaustive": []}
    for item in items:
        names = {marker.name for marker in item.own}
        suite = "exhaustive" if "exhaustive" in names else "slow" if "slow" in names else "default"
        found[suite].append(tuple(item.callspec.params.values()))
    return found


def test_of_three_parameters_or_more_all_pairs_meet():
    found = suites(cases(pytest.mark.thinned(12)))
    assert held(found["default"]) != held(ALL)
    assert held(found["default"] + found["slow"]) == held(ALL)
    assert len(found["exhaustive"]) > 80
    assert found == suites(cases(pytest.mark.thinned(12)))


def test_of_fewer_parameters_about_half_are_exhaustive():
    found = suites(cases(pytest.mark.thinned(4), sizes=(20, 10)))
    assert 30 < len(found["default"]) < 70
    assert 50 < len(found["slow"]) < 100
    assert 50 < len(found["exhaustive"]) < 100


def test_of_a_rare_test_about_each_mth_slow_case_stays():
    found = suites(cases(pytest.mark.thinned(4), pytest.mark.rare(10)))
    assert 1 <= len(found["slow"]) < 20
    found = suites(cases(pytest.mark.slow, pytest.mark.rare(10)))
    assert found["default"] == []
    assert 1 <= len(found["slow"]) < 30


def test_what_has_no_such_marker_stays_where_it_is():
    assert len(suites(cases())["default"]) == len(suites(cases(pytest.mark.slow))["slow"]) == len(ALL)
