"""Measure how lingrad is built: files, imports, options and names, now or in a revision.

    python tools/structure.py                     the working tree
    python tools/structure.py REVISION ...        revisions, side by side
    python tools/structure.py --against REVISION  a revision and the working tree; --list adds what each figure counts

Files are read as text; nothing is imported. What is counted:

- A *unit* is a file or a folder directly under lingrad/, or benchmarks/, or tools/. An *edge* is a pair of units of which one
  imports the other: at the top of a file, inside a function, or for type checkers only. ``from lingrad import models`` imports
  models.py. A module that is imported by a string is not counted. *Levels* are the units on the longest chain of edges.
- An *import cycle* is a group of files that import each other, by any of these imports.
- A *list of the run's options* names six or more of `OPTIONS` in one place: as the parameters of a function, the annotated
  fields of a class, the keys or strings of a literal, or the attributes that a function sets on ``self``.
- A *public name* is a class, a function or a type alias at the top of a module, without a leading underscore. It has two
  meanings where two modules define it.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("lingrad", "benchmarks", "tools", "tests")
OPTIONS = {"weight_decay", "scale", "carry", "seed", "compat", "layerwise", "stagger", "share", "ledger"}
OPTIONS |= {"self_contained", "merge", "merge_every", "keep_remainder"}
LIMITS = {"lingrad": 300, "tests": 500}  # lines of a file
AUTHORED = ("SideTransform", "GradientBasis", "SketchBasis")  # what a new transform derives from

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Pairs = set[tuple[str, str]]
Row = tuple[str, str, list[str]]  # a measure, its figure, what the figure counts


class Structure:
    """The Python files of a tree, measured; ``sources`` gives the text of each by its path from the root."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources
        paths = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources}
        self.modules = {name: ast.parse(sources[path]) for path, name in paths.items() if not path.startswith("tests/")}
        self.package = {name: tree for name, tree in self.modules.items() if name.split(".")[0] == "lingrad"}
        tops = [node for tree in self.package.values() for node in tree.body]
        self.classes = {node.name: node for node in tops if isinstance(node, ast.ClassDef)}

    @property
    def top(self) -> tuple[list[str], list[str]]:
        """The files and the folders directly under lingrad/."""
        parts = [path.split("/") for path in self.sources if path.startswith("lingrad/")]
        return sorted(p[1] for p in parts if len(p) == 2), sorted({p[1] for p in parts if len(p) > 2})

    @cached_property
    def imports(self) -> Pairs:
        """Pairs of modules of which the first imports the second."""
        found = {(name, each) for name, tree in self.modules.items() for node in ast.walk(tree) for each in _imported(node)}
        found = {(name, each if each in self.modules else each.rpartition(".")[0]) for name, each in found}
        return {(name, each) for name, each in found if each in self.modules and each != name}

    @property
    def edges(self) -> Pairs:
        """Pairs of units of which the first imports the second."""
        return {(_unit(one), _unit(other)) for one, other in self.imports if _unit(one) != _unit(other)}

    @property
    def cycles(self) -> list[list[str]]:
        """The groups of modules that import each other."""
        reach = _reachable(self.modules, self.imports)
        groups = {frozenset(each for each in reach[name] if name in reach[each]) for name in reach if name in reach[name]}
        return sorted(map(sorted, groups))

    @property
    def levels(self) -> list[list[str]]:
        """The units by level, the lowest first; units that import each other share one."""
        level: dict[str, int] = {}
        reach = _reachable(set(map(_unit, self.modules)), self.edges)
        for name in sorted(reach, key=lambda name: len(reach[name])):  # a unit reaches more than those below it
            level[name] = 1 + max((level[each] for each in reach[name] if name not in reach[each]), default=-1)
        return [sorted(name for name in level if level[name] == i) for i in sorted(set(level.values()))]

    def chain(self, name: str) -> list[ast.ClassDef]:
        """A class and its ancestors in lingrad, itself first; empty where lingrad has no such class."""
        found = [self.classes[name]] if name in self.classes else []
        bases = [base.id for cls in found for base in cls.bases if isinstance(base, ast.Name)]
        return found + [each for base in bases for each in self.chain(base)]

    def fields(self, name: str) -> list[str]:
        """The fields of a class, private and inherited ones too: those annotated, and those that methods set on ``self``."""
        return list(dict.fromkeys(field for cls in self.chain(name) for field in (*_annotated(cls), *_assigned(cls))))

    def abstract(self, name: str) -> list[str]:
        """The methods that a class leaves to those that derive from it."""
        left: dict[str, bool] = {}
        for cls in reversed(self.chain(name)):
            for node in cls.body:
                if isinstance(node, Function):
                    left[node.name] = any(ast.unparse(mark).endswith("abstractmethod") for mark in node.decorator_list)
        return [name for name in left if left[name]]

    @property
    def option_lists(self) -> list[str]:
        """The lists of the run's options in lingrad, each as ``module:line what``."""
        nodes = [(module, node) for module, tree in self.package.items() for node in ast.walk(tree)]
        found = [(f"{module}:{node.lineno} {what}", names) for module, node in nodes for what, names in _named(node)]
        return sorted(where for where, names in found if len(OPTIONS & {name.lstrip("_") for name in names}) >= 6)

    def repeated(self, *, classes: bool = False, private: bool = False) -> dict[str, list[str]]:
        """The names that several modules of lingrad define, and those modules; of classes only, or private ones too."""
        found: dict[str, list[str]] = defaultdict(list)
        for module, tree in sorted(self.package.items()):
            nodes = [node for node in tree.body if isinstance(node, ast.ClassDef) or not classes]
            for name in {name for node in nodes for name in _defined(node)}:
                found[name].append(module)
        skipped = "__" if private else "_"
        return {name: found[name] for name in sorted(found) if len(found[name]) > 1 and not name.startswith(skipped)}

    def lines(self, folder: str) -> dict[str, int]:
        """The files of a folder and their lines, the longest first."""
        count = {path: len(text.splitlines()) for path, text in self.sources.items() if path.startswith(f"{folder}/")}
        return dict(sorted(count.items(), key=lambda item: (-item[1], item[0])))

    def too_long(self, folder: str) -> list[str]:
        """The files of a folder that have more lines than its limit."""
        return [path for path, lines in self.lines(folder).items() if lines > LIMITS[folder]]

    def table(self) -> list[Row]:
        """Every measure."""
        files, folders = self.top
        longest = {folder: next(iter(self.lines(folder).items()), ("", 0)) for folder in LIMITS}
        work = {name: self.abstract(name) for name in AUTHORED if self.chain(name)}
        return [
            ("files / folders at the top of lingrad/", f"{len(files)} / {len(folders)}", files + folders),
            _counted("levels of imports", [", ".join(level) for level in self.levels]),
            _counted("edges between units", [f"{one} -> {other}" for one, other in sorted(self.edges)]),
            _counted("import cycles", [", ".join(cycle) for cycle in self.cycles]),
            _counted("classes that make up the optimizer", [cls.name for cls in self.chain("SubspaceOptimizer")]),
            _counted("fields of Subspace", self.fields("Subspace")),
            _counted("lists of the run's options", self.option_lists),
            _counted("public class names with two meanings", self.repeated(classes=True)),
            _counted("public names with two meanings", self.repeated()),
            _counted("names with two meanings, private ones too", self.repeated(private=True)),
            ("methods that a transform must write", ", ".join(f"{len(work[n])} of {n}" for n in work), _listed(work)),
            *(_counted(f"files over {LIMITS[each]} lines in {each}/", self.too_long(each)) for each in LIMITS),
            *((f"longest file in {each}/", f"{lines} lines, {path}", []) for each, (path, lines) in longest.items()),
        ]


def _unit(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("lingrad.") else 1])


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def _reachable(nodes: Collection[str], edges: Pairs) -> dict[str, set[str]]:
    """What each node comes to along one edge or more."""
    after = {node: {other for one, other in edges if one == node} for node in nodes}
    reach = {}
    for node in nodes:
        seen, new = set(), after[node]
        while new:
            seen |= new
            new = {other for each in new for other in after[each]} - seen
        reach[node] = seen
    return reach


def _defined(node: ast.stmt) -> list[str]:
    """The class, the function or the type aliases that a statement defines."""
    if isinstance(node, (ast.ClassDef, *Function)):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and "TypeAlias" in ast.unparse(node.annotation):
        return [ast.unparse(node.target)]
    alias = isinstance(node, ast.Assign) and isinstance(node.value, (ast.Subscript, ast.BinOp))
    names = [ast.unparse(target) for target in node.targets] if alias else []
    return [name for name in names if name.lstrip("_")[:1].isupper() and not name.isupper()]


def _annotated(cls: ast.ClassDef) -> list[str]:
    fields = [node for node in cls.body if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)]
    return [ast.unparse(node.target) for node in fields]


def _assigned(node: ast.AST) -> list[str]:
    found = [each for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)]
    return [each.attr for each in found if ast.unparse(each.value) == "self"]


def _named(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """What a node names in one place, by kind."""
    if isinstance(node, Function):
        yield f"parameters of {node.name}", [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
        yield f"attributes set by {node.name}", _assigned(node)
    elif isinstance(node, ast.ClassDef):
        yield f"fields of {node.name}", _annotated(node)
    elif isinstance(node, (ast.Dict, ast.Tuple, ast.List, ast.Set)):
        parts = node.keys if isinstance(node, ast.Dict) else node.elts
        yield "a literal", [str(part.value) for part in parts if isinstance(part, ast.Constant)]


def _listed(items: list[str] | dict[str, list[str]]) -> list[str]:
    return items if isinstance(items, list) else [f"{name}: {', '.join(items[name])}" for name in items]


def _counted(what: str, items: list[str] | dict[str, list[str]]) -> Row:
    return what, str(len(items)), _listed(items)


def working_tree() -> Structure:
    """The files as they are now."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return Structure({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def revision(name: str) -> Structure:
    """The files of a revision; ends the program where git knows none of that name."""
    done = subprocess.run(["git", "archive", "--end-of-options", name], cwd=ROOT, capture_output=True)  # noqa: S603, S607
    if done.returncode:
        raise SystemExit(f"git cannot read the revision {name!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = [member for member in tar if member.isfile() and member.name.endswith(".py")]
        return Structure({m.name: tar.extractfile(m).read().decode() for m in found if m.name.split("/")[0] in FOLDERS})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="what to measure; by default the working tree")
    parser.add_argument("--against", metavar="REVISION", help="a revision for the first column")
    parser.add_argument("--list", action="store_true", help="add what the figures of the last column count")
    asked = parser.parse_args()
    columns = {name: revision(name).table() for name in [*filter(None, [asked.against]), *asked.revisions]}
    columns |= {} if asked.revisions else {"working tree": working_tree().table()}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for rows in zip(*columns.values(), strict=True):
        print(f"| {rows[0][0]} | {' | '.join(figure for _, figure, _ in rows)} |")
    for what, _, items in list(columns.values())[-1] if asked.list else ():
        print(f"\n{what}:\n" + "\n".join(f"- {item}" for item in items))


if __name__ == "__main__":
    main()
