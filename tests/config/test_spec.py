"""Config strings: what is read, what is refused with which words, and that reading and writing are inverse."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lingrad
from lingrad.config import spec
from lingrad.errors import SpecError
from lingrad.optimizers.base import Choice
from lingrad.transforms import PCA, SVD, Full, Kron, Power, Random, SideTransform, Transform, registry
from tests.support.cases import SPECS

ACCEPTED = {
    "svd(rank=128)": SVD(rank=128),
    "svd(rank=128, every=200)": SVD(rank=128),
    " svd ( rank = 1_000 , side = left ) ": SVD(rank=1000, side="left"),
    "svd(rank=8, solver=randomized, oversample=0)": SVD(rank=8, solver="randomized", oversample=0),
    "svd(rank=8, clip=true)": SVD(rank=8, clip=True),
    "svd(rank=8, clip=True, oversample=none)": SVD(rank=8, clip=True),
    "svd(rank=8,\n    side='both')": SVD(rank=8, side="both"),
    "power(rank=4, side=both)": Power(rank=4, side="both"),
    "random(rank=4, kind=rows, store=false)": Random(rank=4, kind="rows", store=False),
    "pca(rank=4)": PCA(rank=4),
    "pca(rank=4, lam=1, lr=1e-2)": PCA(rank=4, lam=1.0, lr=1e-2),
    "pca(rank=4, optimizer=sgd)": PCA(rank=4, optimizer=Choice("sgd")),
    "pca(rank=4, optimizer=adamw(betas=(0.9, 0.95), weight_decay=0.01))": PCA(
        rank=4, optimizer=Choice("adamw", (("betas", (0.9, 0.95)), ("weight_decay", 0.01)))
    ),
    "kron(left=svd(rank=64), right=random(rank=32))": Kron(left=SVD(rank=64), right=Random(rank=32)),
    "kron(left=svd(rank=4, side=left), right=power(rank=4))": Kron(left=SVD(rank=4), right=Power(rank=4)),
    "full()": Full(),
    "full": Full(),
}


OWN = "one of your own once its module is imported, or by an entry point (CONTRIBUTING.md)"


@pytest.mark.parametrize(("text", "expected"), ACCEPTED.items())
def test_accepted(text, expected):
    assert spec.parse(text) == expected
    assert spec.parse(spec.format(expected)) == expected


REFUSED = {
    "svd(rnak=128, every=200)": """\
unknown option 'rnak' of svd; did you mean 'rank'?
  svd(rnak=128, every=200)
      ^^^^
svd takes: rank, every, side, clip, schedule, solver, oversample, precision, align, choice, energy.""",
    "sdv(rank=128)": """\
unknown transform 'sdv'; did you mean 'svd'? Known: KNOWN; OWN.
  sdv(rank=128)
  ^^^""",
    "svd(every=200)": """\
svd needs rank
  svd(every=200)
  ^^^^^^^^^^^^^^
svd takes: rank, every, side, clip, schedule, solver, oversample, precision, align, choice, energy.""",
    "svd(rank=4.5)": """\
rank must be a whole number, not 4.5
  svd(rank=4.5)
           ^^^""",
    "svd(rank=true)": """\
rank must be a whole number, not true
  svd(rank=true)
           ^^^^""",
    "svd(rank=0)": """\
rank must be at least 1, not 0
  svd(rank=0)
           ^""",
    "svd(rank=4, every=-1)": """\
every must be 0 (refresh once) or more, not -1
  svd(rank=4, every=-1)
                    ^^""",
    "svd(rank=4, side=short, clip=1)": """\
clip must be true or false, not 1
  svd(rank=4, side=short, clip=1)
                               ^""",
    "svd(rank=4, side=lefft)": """\
side must be one of short, long, left, right, both, not 'lefft'; did you mean 'left'?
  svd(rank=4, side=lefft)
                   ^^^^^""",
    "svd(rank=4, solver=5)": """\
solver must be one of exact, gram, randomized, not 5
  svd(rank=4, solver=5)
                     ^""",
    "svd(rank=4, oversample=3)": """\
oversample is used by solver=randomized only, not by solver=exact; leave it out
  svd(rank=4, oversample=3)
                         ^""",
    "random(rank=4, kind=gausian)": """\
kind must be one of gaussian, rademacher, orthonormal, rows, not 'gausian'; did you mean 'gaussian'?
  random(rank=4, kind=gausian)
                      ^^^^^^^""",
    "pca(rank=4, optimizer=adma)": """\
unknown base optimizer 'adma'; did you mean 'adam'? \
Known: adafactor, adagrad, adam, adamw, adamw8bit, lion, muon, rmsprop, sgd; or pass an optimizer class or a factory.
  pca(rank=4, optimizer=adma)
                        ^^^^""",
    "pca(rank=4, optimizer=adam(lr=1.0))": """\
the learning rate of the basis is the option lr of pca itself; leave it out of the optimizer's
  pca(rank=4, optimizer=adam(lr=1.0))
                        ^^^^^^^^^^^^""",
    "pca(rank=4, optimizer=3)": """\
expected a word, or one with options, such as sgd(momentum=0.9)
  pca(rank=4, optimizer=3)
                        ^""",
    "kron(left=svd(rank=4), right=svd(rank=4, side=left))": """\
the right factor cannot have side=left; leave side out
  kron(left=svd(rank=4), right=svd(rank=4, side=left))
                               ^^^^^^^^^^^^^^^^^^^^^^""",
    "kron(left=full(), right=svd(rank=4))": """\
left must be a transform with one basis, such as svd(rank=64), not full
  kron(left=full(), right=svd(rank=4))
            ^^^^^^""",
    "kron(left=svd(rank=4), right=svd(rnak=4))": """\
unknown option 'rnak' of svd; did you mean 'rank'?
  kron(left=svd(rank=4), right=svd(rnak=4))
                                   ^^^^
svd takes: rank, every, side, clip, schedule, solver, oversample, precision, align, choice, energy.""",
    "svd(128)": """\
options are written option=value
  svd(128)
      ^^^""",
    "svd(**x)": """\
options are written option=value
  svd(**x)
        ^""",
    "svd(rank=1, rank=2)": """\
option 'rank' is given twice
  svd(rank=1, rank=2)
              ^^^^""",
    "svd(rank=128": """\
this is not a config string
  svd(rank=128
     ^
expected name(option=value, ...)""",
    "svd(rank=[1])": """\
a value is a number, a word, or a nested name(...)
  svd(rank=[1])
           ^^^""",
    "__import__('os').system('true')": """\
expected a transform, name(option=value, ...)
  __import__('os').system('true')
  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
Known: KNOWN.""",
    "svd(rank=(lambda: 4)())": """\
a value is a number, a word, or a nested name(...)
  svd(rank=(lambda: 4)())
           ^^^^^^^^^^^^^""",
    "": """\
this is not a config string
  \n  ^
expected name(option=value, ...)""",
    "pca(rank=4, optimizer=adam(betas=(0.9,)))": """\
base 'adam' refused its options (lr=0.001, betas=(0.9,)): tuple index out of range
  pca(rank=4, optimizer=adam(betas=(0.9,)))
                        ^^^^^^^^^^^^^^^^^^""",
    "pca(rank=4, every=0, lam=0.5)": """\
lam is used from the second refresh on, and every=0 has one only; leave it out
  pca(rank=4, every=0, lam=0.5)
                           ^^^""",
    "svd(rank=é, side=x)": """\
rank must be a whole number, not é
  svd(rank=é, side=x)
           ^""",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_refused(text, message):
    with pytest.raises(SpecError) as caught:
        spec.parse(text)
    assert str(caught.value) == message.replace("KNOWN", ", ".join(registry.transform_names())).replace("OWN", OWN)


def test_not_a_string():
    with pytest.raises(SpecError, match=r"a config string was expected, such as 'svd\(rank=128\)', not 128"):
        spec.parse(128)


@pytest.mark.parametrize("text", SPECS)
def test_canonical_form_is_stable(text):
    canonical = spec.format(spec.parse(text))
    assert spec.format(spec.parse(canonical)) == canonical


def test_defaults_are_left_out_and_options_come_in_order():
    assert spec.format(spec.parse("svd(side=left, every=200, rank=4)")) == "svd(rank=4, side=left)"
    assert str(spec.format(PCA(rank=4, optimizer="sgd"))) == "pca(rank=4, optimizer=sgd)"


def test_a_spec_is_a_value():
    assert hash(SVD(rank=4)) == hash(spec.parse("svd(rank=4)"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SVD(rank=4).rank = 5


ranks, steps = st.integers(1, 10**6), st.integers(0, 10**6)
sides = st.sampled_from(["short", "long", "left", "right", "both"])
shared = {"rank": ranks, "every": steps, "side": sides, "clip": st.booleans()}
floats = st.floats(1e-9, 1e9)
beta = st.floats(0.0, 0.999)
choices = (
    st.just(Choice("adam"))
    | st.builds(Choice, st.just("sgd"), st.tuples(st.tuples(st.just("momentum"), floats)))
    | st.builds(Choice, st.just("adamw"), st.tuples(st.tuples(st.just("betas"), st.tuples(beta, beta))))
)
one_sided = st.one_of(
    st.builds(SVD, **shared, solver=st.sampled_from(["exact", "gram"]), align=st.booleans()),
    st.builds(SVD, **shared, energy=st.none() | st.floats(1e-9, 1.0)),
    st.builds(SVD, **shared, solver=st.just("randomized"), oversample=st.none() | steps),
    st.builds(Power, **shared),
    st.builds(Random, **shared, kind=st.sampled_from(["gaussian", "rademacher", "orthonormal", "rows"]), store=st.booleans()),
    st.builds(
        PCA,
        **shared | {"every": ranks},
        lam=floats,
        lr=floats,
        optimizer=choices,
        orthonormalize=st.booleans(),
        sketch=st.none() | ranks,
    ),
)


def _for_side(side):
    return one_sided.map(lambda transform: dataclasses.replace(transform, side=side))


transforms = one_sided | st.builds(Kron, left=_for_side("left"), right=_for_side("right")) | st.just(Full())


@given(transforms)
@settings(deadline=None)
def test_every_transform_round_trips(transform):
    text = spec.format(transform)
    assert spec.parse(text) == transform
    assert spec.format(spec.parse(text)) == text


grammar = st.text(alphabet="svdrankpowe=(),.0123456789 '\"[]{}*:\\\n-+é\0#", max_size=40)


@given(grammar | st.text(max_size=30))
@settings(deadline=None, max_examples=300)
def test_nothing_but_spec_error_escapes(text):
    try:
        transform = spec.parse(text)
    except SpecError:
        return
    assert spec.parse(spec.format(transform)) == transform


@pytest.mark.parametrize("depth", [50, 5000])
def test_deep_nesting_is_refused_not_a_crash(depth):
    with pytest.raises(SpecError):
        spec.parse("kron(left=" * depth + "full()" + ")" * depth)


class TestRegistry:
    @pytest.mark.parametrize("name", ["", "none", 3, "my svd"])
    def test_names_that_config_strings_could_not_say(self, name):
        with pytest.raises(SpecError, match="a transform is registered under a word"):
            registry.register(name)

    def test_a_class_of_the_same_name_from_elsewhere_is_refused(self):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Theirs(SideTransform):
            def basis(self, seen, old, when):
                return old

        Theirs.__qualname__ = "SVD"
        with pytest.raises(SpecError, match="the transform name 'svd' is taken by lingrad.transforms.svd.SVD"):
            registry.register("svd")(Theirs)

    def test_what_is_forgotten_is_named(self):
        with pytest.raises(SpecError, match=r"@register\('mine'\) is for subclasses of lingrad.Transform, not <class 'dict'>"):
            registry.register("mine")(dict)

        class Misspelt(SideTransform):
            def bassis(self, seen, old, when):
                return old

        with pytest.raises(SpecError, match="Misspelt does not define basis, which every SideTransform must"):
            registry.register("mine")(Misspelt)

        class Empty(Transform):
            pass

        missing = "due and init and map and period and ranks and refresh"
        with pytest.raises(SpecError, match=f"Empty does not define {missing}, which every Transform must"):
            registry.register("mine")(Empty)
        assert "mine" not in registry.transform_names()

    def test_a_class_that_is_no_dataclass_is_made_one(self, monkeypatch):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))

        @registry.register("mine")
        class Mine(SideTransform):
            mix: float = 0.5
            sizes: tuple[int, int] = (1, 2)

            def basis(self, seen, old, when):
                return old

        assert spec.parse("mine(rank=4, sizes=(3, 4))") == Mine(rank=4, sizes=(3, 4))
        assert spec.format(spec.parse("mine(rank=4, mix=1)")) == "mine(rank=4, mix=1.0)"
        assert spec.parse("mine(rank=4)") == Mine(rank=4, mix=0.5)
        with pytest.raises(dataclasses.FrozenInstanceError):
            Mine(rank=4).mix = 1.0
        with pytest.raises(TypeError, match="positional argument"):
            Mine(0.5, rank=4)
        with pytest.raises(SpecError, match="mix must be a number, not half"):
            Mine(rank=4, mix="half")

    @pytest.mark.parametrize(("hidden", "kind"), [("reads", "property"), ("columns", "method"), ("map", "method")])
    def test_an_option_does_not_hide_what_every_transform_has(self, hidden, kind):
        class Mine(SideTransform):
            __annotations__ = {hidden: str}

            def basis(self, seen, old, when):
                return old

        setattr(Mine, hidden, "sketch")
        message = rf"Mine.{hidden} has an annotation, .*, but it is a {kind} of every \w+; leave out the annotation"
        with pytest.raises(SpecError, match=message):
            registry.register("mine")(Mine)

    def test_a_class_that_is_not_registered_is_named(self, monkeypatch):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))

        class Mine(SideTransform):
            def basis(self, seen, old, when):
                return old

        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        message = r"Mine is not registered, .*; put @lingrad.register\('a_name'\) on the class"
        with pytest.raises(SpecError, match=message):
            lingrad.wrap(model, Mine(rank=2))
        registry.register("mine")(Mine)
        Other = type("Other", (Mine,), {})  # it has the name of its parent
        with pytest.raises(SpecError, match="Other is not registered"):
            lingrad.wrap(model, Other(rank=2))
        lingrad.wrap(model, Mine(rank=2)).detach()

    def test_names(self):
        assert {"svd", "power", "random", "pca", "kron", "full"} <= set(registry.transform_names())

    def test_a_taken_name_is_refused(self):
        with pytest.raises(SpecError, match="the transform name 'svd' is taken by lingrad.transforms.svd.SVD"):
            registry.register("svd")(Power)

    def test_a_name_must_be_an_identifier(self):
        with pytest.raises(SpecError, match=r"a transform is registered under a word, as in @register\('mine'\), not 'my-svd'"):
            registry.register("my-svd")

    def test_an_entry_point_must_be_a_transform(self, monkeypatch):
        from importlib.metadata import EntryPoint

        point = EntryPoint("bogus", "collections:OrderedDict", registry.GROUP)
        monkeypatch.setattr(registry, "_offered", lambda: {"bogus": point})
        with pytest.raises(SpecError, match="must name a Transform class"):
            spec.parse("bogus(rank=4)")
