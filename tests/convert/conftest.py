"""Two model folders, and what their conversion gives."""

import pytest

from lingrad import convert
from tests.support.folders import contents, copy, make


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folders(models, tmp_path):
    """Copies that a test may spoil."""
    return [copy(folder, tmp_path / "in" / folder.name) for folder in models]


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """The files of an uninterrupted conversion. Paths are part of a config, so that all conversions use the same."""
    out = tmp_path_factory.mktemp("expected") / "out"
    convert.convert(*models, out)
    return contents(out)
