"""Random damage to files and values of others, and the time and memory that reading them may take."""

import contextlib
import copy
import json
import random
import time
from pathlib import Path

import torch

from lingrad.errors import LingradError

SECONDS, NBYTES = 2.0, 200e6
NAN, INF = float("nan"), float("inf")
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.5,
    -0.0,
    1e308,
    NAN,
    INF,
    "",
    "a",
    "\ud800",
    "a" * 5000,
]
ODD += [
    "(a+)+$",
    "((((",
    "(?i)a",
    ".*",
    "q_proj",
    [],
    [0],
    {},
    {"": 0},
    {"a": [1]},
    ["a", 1],
    [[[]]],
    "[" * 2000,
    "../../etc/passwd",
]


def rng_of(seed):
    return random.Random(seed)  # noqa: S311 - damage, not secrets


def places(value, path=()):
    """The paths of everything in a tree of dicts and lists."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def damaged(value, rng, odd=ODD):
    """A copy of a tree with one to three entries replaced, removed, doubled or swapped."""
    value = copy.deepcopy(value)

    def any_odd():
        return copy.deepcopy(rng.choice(odd))  # what is put in may be damaged next

    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(places(value)[1:] or [()])
        if not path:
            return any_odd()
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = rng.randrange(5)
        if what == 0:
            del parent[path[-1]]
        elif what == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "new", "weight", "0", "a" * 300])] = any_odd()
        elif what == 2:
            other = rng.choice(places(value)[1:])
            found = value
            for key in other:
                found = found[key]
            parent[path[-1]] = copy.deepcopy(found)
        else:
            parent[path[-1]] = any_odd()
    return value


def damaged_bytes(data, rng):
    """Bytes with some of them changed, cut, left out, doubled or filled in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not data:
            break
        i, n = rng.randrange(len(data)), rng.choice([1, 2, 8, 100])
        what = rng.randrange(6)
        if what < 2:
            data[i] = rng.choice([0, 255, rng.randrange(256), data[i] ^ (1 << rng.randrange(8))])
        elif what == 2:
            del data[i : i + n]
        elif what == 3:
            data[i:i] = data[i : i + n]
        elif what == 4:
            data[i : i + n] = bytes(rng.randrange(256) for _ in range(n))
        else:
            del data[rng.choice([i, len(data) - 1]) :]
    return bytes(data)


def damaged_text(text, rng, words):
    """A text with characters and words changed, left out, doubled or filled in."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        i, n = rng.randrange(len(text) + 1), rng.choice([1, 1, 3, 8])
        new = rng.choice([*words, *"()=,;:'\"-+*\\\n\0 .0123abc_é", "\ud800", "(" * 500, "-" * 1500, "9" * 5000, " " * 5000])
        text = rng.choice([text[:i] + text[i + n :], text[:i] + new + text[i:], text[:i] + new + text[i + n :]])
    return text


def read(reader, *arguments, **options):
    """What a reader gives; None where it refuses. Any other error, or one that takes long, fails the test.

    The time is the process's own: other programs of the machine do not count.
    """
    start = time.process_time()
    try:
        return reader(*arguments, **options)
    except LingradError:
        return None
    finally:
        assert time.process_time() - start < SECONDS


@contextlib.contextmanager
def little_memory():
    """Fail where the block needs more memory than the bound; measured where the system tells it."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    except OSError:
        yield
        return
    before = _kilobytes(status, "VmHWM")
    yield
    assert (_kilobytes(status, "VmHWM") - before) * 1024 < NBYTES


def _kilobytes(status, key):
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def write_json(path, value):
    path.write_bytes(json.dumps(value, ensure_ascii=True).encode())


def equal(a, b):
    """Whether two trees hold the same, tensors to the bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        if not both or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, (dict,)) or hasattr(a, "items"):
        return hasattr(b, "items") and [*a] == [*b] and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)
