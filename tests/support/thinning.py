"""Which cases of a large matrix run in which suite; the same ones every time."""

import itertools
import zlib


def pairs(case):
    """Every two values that stand together in a case, a tuple of the values of its parameters."""
    return set(itertools.combinations(enumerate(case), 2))


def completing(kept, others):
    """Few of some other cases, by their places: with those that are kept they hold every pair of values that any case holds."""
    held = [pairs(case) for case in others]
    missing = set().union(*held).difference(*map(pairs, kept))
    chosen = []
    while missing:
        best = max(range(len(others)), key=lambda place: len(held[place] & missing))
        chosen.append(best)
        missing -= held[best]
    return chosen


def number(name):
    """A number that belongs to a case's name."""
    return zlib.crc32(name.encode())


def values(item):
    """What stands for the values of each ``parametrize`` of a test, in one case of it."""
    found = []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0]
        names = names.split(",") if isinstance(names, str) else names
        found.append(tuple(id(item.callspec.params[name.strip()]) for name in names))
    return tuple(found)
