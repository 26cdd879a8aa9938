"""Files of examples/plugins as modules, each with stand-ins for the modules that it imports."""

import importlib.util
import sys
from pathlib import Path

PLUGINS = Path(__file__).parents[2] / "examples/plugins"


def load(name):
    """A file of examples/plugins, imported under its own name."""
    spec = importlib.util.spec_from_file_location(name, PLUGINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
