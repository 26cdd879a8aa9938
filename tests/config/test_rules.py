"""Which parameters are transformed, and the words for rules that cannot be meant."""

import pytest
import torch
from torch import nn

import lingrad
from lingrad.config.rules import FROZEN, format_rule, parse_rules
from lingrad.config.targets import resolve_model, resolve_parameters
from lingrad.errors import ModeError, ShapeError, SpecError
from lingrad.transforms import SVD, Random
from lingrad.weights.layout import layout_of
from tests.support.models import gpt2, llama, text_batches, train, zoo


def targets(model, rules):
    return {target.name: target.transform for target in resolve_model(model, rules).targets}


LLAMA_LINEARS = {
    f"model.layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in (
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    )
}


def test_a_bare_spec_means_every_linear_but_the_head():
    plan = resolve_model(llama(), "svd(rank=4)")
    assert {t.name for t in plan.targets} == LLAMA_LINEARS
    assert all(t.route == "projected" and t.transform == SVD(rank=4) for t in plan.targets)
    full = {name for name, _ in plan.full}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= full
    assert len(full) + len(plan.targets) == len(list(llama().parameters()))


def test_conv1d_of_gpt2_counts_as_linear():
    plan = resolve_model(gpt2(), "svd(rank=4)")
    assert {t.name.split(".")[-2] for t in plan.targets} == {"c_attn", "c_proj", "c_fc"}
    assert all(t.route == "projected" for t in plan.targets)
    shapes = {t.name.split(".h.0.")[1]: t.layout.shape for t in plan.targets if ".h.0." in t.name}
    assert shapes["attn.c_attn.weight"] == (96, 32)  # [out, in], though it is stored [in, out]


def test_plain_modules_and_the_names_of_heads():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(5, 6))
    model.add_module("classifier", nn.Linear(6, 7))
    assert set(targets(model, "svd(rank=2)")) == {"first.weight"}


def test_a_head_tied_to_the_embedding_is_left_alone():
    assert set(targets(llama(tie_word_embeddings=True), "svd(rank=4)")) == LLAMA_LINEARS


def test_roads():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "sub": Doubled(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    routes = {t.name: t.route for t in resolve_model(model, "svd(rank=2)").targets}
    assert routes == {"plain.weight": "projected", "sub.weight": "weight", "attention.out_proj.weight": "weight"}
    model["twin"] = nn.Linear(4, 4)
    model["twin"].weight = model["plain"].weight
    tied = {t.name: t for t in resolve_model(model, "svd(rank=2)").targets}["plain.weight"]
    assert tied.route == "weight"
    assert [module for module, _ in tied.owners] == [model["plain"], model["twin"]]


def test_first_match_wins_and_none_trains_in_full():
    rules = {"*.layers.0.*": "none", "*.self_attn.*": "svd(rank=4)", "*.mlp.*": Random(rank=3), "*": None}
    found = targets(llama(), rules)
    assert set(found) == {name for name in LLAMA_LINEARS if ".1." in name}
    assert {found[n].name for n in found if "attn" in n} == {"svd"}
    assert {found[n].name for n in found if "mlp" in n} == {"random"}


def test_rules_match_parameter_names_too():
    assert set(targets(zoo(), {"experts.gate_up_proj": "svd(rank=2)"})) == {"experts.gate_up_proj"}
    assert set(targets(zoo(), {"experts": "svd(rank=2)"})) == {"experts.gate_up_proj"}


def test_a_rule_reaches_a_tied_weight_by_either_name():
    model = llama(tie_word_embeddings=True)
    for glob in ("lm_head", "*embed_tokens"):
        assert set(targets(model, {glob: "svd(rank=4)"})) == {"model.embed_tokens.weight"}


def test_a_layer_with_the_name_of_a_head_inside_a_block():
    """GPT-J's blocks have an mlp.fc_out, the largest of their matrices; get_output_embeddings() tells the head."""
    block = nn.ModuleDict({"fc_out": nn.Linear(8, 4), "output": nn.Linear(4, 8)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "fc_out": nn.Linear(8, 3)})
    assert set(targets(model, "svd(rank=2)")) == {"blocks.0.fc_out.weight", "blocks.0.output.weight"}


def test_models_that_cannot_be_transformed():
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(SpecError, match="nothing to train: every parameter of Sequential is frozen"):
        lingrad.wrap(frozen, "svd(rank=2)")
    with pytest.raises(SpecError, match="0.weight is complex, and transforms are real; leave it out by a rule: 'none'"):
        lingrad.wrap(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), "svd(rank=2)")


def test_rules_as_one_string():
    assert parse_rules("svd(rank=4,\n every=3)") == SVD(rank=4, every=3)
    assert parse_rules("*.mlp.*: pca(rank=4,\n  optimizer=adam(eps=1e-6))\n*: None")["*"] is None
    text = "*.self_attn.*: svd(rank=4); *.mlp.*: random(rank=3)\n*: none"
    assert parse_rules(text) == {"*.self_attn.*": SVD(rank=4), "*.mlp.*": Random(rank=3), "*": None}


class TestFrozen:
    def test_it_is_neither_transformed_nor_trained_in_full(self):
        rules = {"*norm*": "frozen", "*.layers.0.*": "frozen", "*.self_attn.*": "svd(rank=4)"}
        plan = resolve_model(llama(), rules)
        names = {name for name, _ in llama().named_parameters()}
        frozen = {name for name, _ in plan.frozen}
        assert frozen == {name for name in names if "norm" in name or ".layers.0." in name}
        assert {t.name for t in plan.targets} == {name for name in LLAMA_LINEARS if ".1.self_attn." in name}
        assert {name for name, _ in plan.full} == names - frozen - {t.name for t in plan.targets}
        assert all(param.requires_grad for _, param in plan.frozen)  # a plan changes nothing

    def test_the_first_match_wins(self):
        first = resolve_model(llama(), {"*.q_proj": "svd(rank=2)", "*.self_attn.*": "frozen", "*": "none"})
        assert {t.name for t in first.targets} == {name for name in LLAMA_LINEARS if "q_proj" in name}
        assert {name for name, _ in first.frozen} == {name for name in LLAMA_LINEARS if "attn" in name and "q_proj" not in name}

    def test_the_word(self):
        text = "*norm*:  Frozen ; *.mlp.*: svd(rank=4); *: none"
        parsed = parse_rules(text)
        assert parsed == {"*norm*": FROZEN, "*.mlp.*": SVD(rank=4), "*": None}
        assert parse_rules(parsed) == parsed
        written = "; ".join(f"{glob}: {format_rule(rule)}" for glob, rule in parsed.items())
        assert written == "*norm*: frozen; *.mlp.*: svd(rank=4); *: none"
        assert parse_rules(written) == parsed
        with pytest.raises(SpecError, match="'frozen'"):
            lingrad.register("frozen")

    def test_what_is_frozen_already_may_be_named(self):
        """What the rule asks for holds; one set of rules then serves a model with frozen parts and one without."""
        for rules in (
            {"*embed*": "frozen", "*.mlp.*": "svd(rank=4)"},
            {"*.mlp.*": "svd(rank=4)", "lm_head": "none", "*norm*": "none", "*attn*": "none", "*": "frozen"},
        ):
            model = llama()
            model.model.embed_tokens.requires_grad_(False)
            plan = resolve_model(model, rules)
            assert plan.frozen == []
            assert len(plan.targets) == 6

    @pytest.mark.parametrize("rules", [{"*": "frozen"}, {"model.*": "frozen", "lm_head": "frozen"}])
    def test_nothing_is_left_to_train(self, rules):
        for call in (lingrad.wrap, lingrad.adapt, lingrad.explain):
            with pytest.raises(SpecError, match="nothing to train: every parameter of LlamaForCausalLM is frozen, by"):
                call(llama(), rules)

    def test_explain_shows_it(self):
        explanation = lingrad.explain(llama(), {"*norm*": "frozen", "*": "svd(rank=4)"})
        frozen = [line for line in explanation.lines if line.transform == "frozen"]
        assert [(line.name, line.count, line.coords, line.gradient, line.trained) for line in frozen] == [
            ("model.layers.*.input_layernorm.weight", 2, "-", "-", 0),
            ("model.layers.*.post_attention_layernorm.weight", 2, "-", "-", 0),
            ("model.norm.weight", 1, "-", "-", 0),
        ]
        by_hand = llama()
        for name, param in by_hand.named_parameters():
            param.requires_grad_("norm" not in name)
        other = lingrad.explain(by_hand, {"*": "svd(rank=4)"})
        assert (explanation.parameters, explanation.trained) == (other.parameters, other.trained)
        assert [line for line in explanation.lines if line not in frozen] == list(other.lines)


class TestTrainOnly:
    def test_what_no_rule_says_none_of_is_frozen(self):
        names = {name for name, _ in llama().named_parameters()}
        for rules, full in (
            ("svd(rank=4)", set()),
            ({"*norm*": "none", "*_proj": "svd(rank=4)"}, {name for name in names if "norm" in name}),
            ({"lm_head": "none", "*norm*": "frozen", "*_proj": "svd(rank=4)"}, {"lm_head.weight"}),
        ):
            plan = resolve_model(llama(), rules, "transformed")
            assert {target.name for target in plan.targets} == LLAMA_LINEARS
            assert {name for name, _ in plan.full} == full
            assert {name for name, _ in plan.frozen} == names - LLAMA_LINEARS - full

    @pytest.mark.parametrize("make", [lingrad.wrap, lingrad.adapt])
    def test_the_run_is_that_of_a_model_frozen_by_hand(self, make):
        weights = []
        for by_hand in (False, True):
            model = llama()
            for name, param in model.named_parameters():
                param.requires_grad_(not by_hand or name in LLAMA_LINEARS)
            opt = make(model, "svd(rank=4, every=2)", lr=1e-2, **({} if by_hand else {"train_only": "transformed"}))
            train(model, opt, text_batches(3, micro=1))
            assert {name for group in opt.param_groups for name in group["param_names"]} == LLAMA_LINEARS
            assert not any(param.requires_grad for name, param in model.named_parameters() if "norm" in name)
            opt.detach()
            weights.append({name: param.detach().clone() for name, param in model.named_parameters()})
        assert all(param.requires_grad for param in model.get_submodule("model.layers.0.mlp").parameters())
        assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())

    def test_parameters_without_a_model(self):
        model = llama()
        opt = lingrad.wrap(model.named_parameters(), {"*_proj*": "svd(rank=4)"}, lr=1e-2, train_only="transformed")
        assert {name for group in opt.param_groups for name in group["param_names"]} == LLAMA_LINEARS

    def test_explain_shows_it(self):
        explanation = lingrad.explain(llama(), "svd(rank=4)", train_only="transformed")
        assert {line.transform for line in explanation.lines if "_proj" not in line.name} == {"frozen"}
        assert explanation.trained == sum(line.trained for line in explanation.lines if "_proj" in line.name)

    def test_a_misspelt_value(self):
        with pytest.raises(SpecError, match="train_only must be 'transformed' or None, not 'transform'; did you mean"):
            lingrad.wrap(llama(), "svd(rank=4)", train_only="transform")


def test_frozen_parameters_are_no_targets():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    assert set(targets(model, "svd(rank=4)")) == {name for name in LLAMA_LINEARS if ".1." in name}


REFUSED = [
    (
        {"model.layer.0.mlp.up_proj": "svd(rank=4)"},
        "rule 'model.layer.0.mlp.up_proj' matches no trainable parameter; did you mean 'model.layers.0.mlp.up_proj'? "
        "Rules are globs over module names, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    (
        {"*.self_atn.*": "svd(rank=4)"},
        "rule '*.self_atn.*' matches no trainable parameter; did you mean '*.self_attn.*'? "
        "Rules are globs over module names, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    (
        {"MLP": "svd(rank=4)"},
        "rule 'MLP' matches no trainable parameter; did you mean '*.mlp.*'? "
        "Rules are globs over module names, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    (
        {"zzz": "svd(rank=4)"},
        "rule 'zzz' matches no trainable parameter. "
        "Rules are globs over module names, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    (
        "*.mlp.*: svd(rank=4), *.self_attn.*: none",
        "a rule is written 'glob: config string', and rules are separated by ';', "
        "not '*.mlp.*: svd(rank=4), *.self_attn.*: none'",
    ),
    (
        "svd(rank:4)",
        "this is not a config string\n  svd(rank:4)\n          ^\nexpected name(option=value, ...)",
    ),
    (
        " ",
        "expected a config string such as 'svd(rank=128)' or rules such as {'*.attn.*': 'svd(rank=64)'}, not ' '",
    ),
    (
        {"*.self_attn.*": "svd(rank=4)", "*.q_proj": "svd(rank=2)"},
        "rule '*.q_proj' is never reached: the rules before it take every parameter it matches",
    ),
    (
        {"*layernorm": "svd(rank=4)"},
        "rule '*layernorm' matches nothing that can be transformed: 'model.layers.0.input_layernorm.weight' has shape (32,), "
        "and a transform needs two dimensions or more",
    ),
    (
        {"*.mlp.*": "svd(rnak=4)"},
        "rule '*.mlp.*': unknown option 'rnak' of svd; did you mean 'rank'?\n  svd(rnak=4)\n      ^^^^\n"
        "svd takes: rank, every, side, clip, schedule, solver, oversample, precision, align, choice, energy.",
    ),
    (
        {"*.mlp.*": "svd(rank=4)", "*": "random(rank=4)", "*norm*": "none"},
        "rule '*norm*' is never reached: the rules before it take every parameter it matches",
    ),
    (
        {"*.self_atn.*": "frozen", "*": "svd(rank=4)"},
        "rule '*.self_atn.*' matches no trainable parameter; did you mean '*.self_attn.*'? "
        "Rules are globs over module names, such as 'model.layers.0.self_attn.q_proj'.",
    ),
    (
        {"*": "svd(rank=4)", "*norm*": "frozen"},
        "rule '*norm*' is never reached: the rules before it take every parameter it matches",
    ),
    (
        "*.mlp.*: svd(rank=4); *.mlp.*: svd(rank=2)",
        "rule '*.mlp.*' is given twice; the first match wins, so keep one of them",
    ),
    (
        {3: "svd(rank=4)"},
        "rules are globs over module names, such as '*.attn.*', not 3",
    ),
    (
        {},
        "expected a config string such as 'svd(rank=128)' or rules such as {'*.attn.*': 'svd(rank=64)'}, not {}",
    ),
    (
        3,
        "expected a config string such as 'svd(rank=128)' or rules such as {'*.attn.*': 'svd(rank=64)'}, not 3",
    ),
]


@pytest.mark.parametrize(("rules", "message"), REFUSED)
def test_refused(rules, message):
    with pytest.raises(SpecError) as caught:
        resolve_model(llama(), rules)
    assert str(caught.value) == message


def test_a_rank_too_large_names_the_parameter():
    with pytest.raises(ShapeError) as caught:
        lingrad.wrap(llama(), "svd(rank=20)", lr=1e-3)
    assert str(caught.value) == (
        "model.layers.0.self_attn.k_proj.weight: rank 20 is larger than min(m, n) = 16 of a 16 x 32 weight; "
        "lower the rank, or let it be lowered where needed: clip=true"
    )
    plan = resolve_model(llama(), "svd(rank=20, clip=true)")
    assert {t.transform.coords_shape(t.layout.shape) for t in plan.targets if "k_proj" in t.name} == {(16, 32)}


def test_no_linear_layer():
    with pytest.raises(SpecError) as caught:
        resolve_model(nn.Sequential(nn.Conv2d(1, 2, 3)), "svd(rank=1)")
    assert str(caught.value) == (
        "no trainable Linear layer was found in Sequential apart from its output head; "
        "name the weights to transform by rules, such as {'*.proj': 'svd(rank=1)'}"
    )


def test_a_model_is_wrapped_once():
    model = llama()
    optimizer = lingrad.wrap(model, "svd(rank=4)", lr=1e-3)
    with pytest.raises(ModeError, match="'model.layers.0.self_attn.q_proj.weight' is wrapped already; call detach"):
        lingrad.adapt(model, "svd(rank=4)", lr=1e-3)
    with pytest.raises(ModeError, match="wrapped already"):
        lingrad.wrap(list(model.named_parameters()), {"*.mlp.*": "svd(rank=4)"}, lr=1e-3)
    optimizer.detach()
    lingrad.adapt(model, "svd(rank=4)", lr=1e-3)


class TestNamedParameters:
    def test_a_bare_spec_means_all_matrices(self):
        plan = resolve_parameters(zoo().named_parameters(), "svd(rank=1)")
        assert {t.name for t in plan.targets} == {n for n, p in zoo().named_parameters() if p.dim() >= 2}
        assert all(t.route == "weight" for t in plan.targets)

    def test_groups_bring_their_own_specs_and_hyper_parameters(self):
        model = zoo()
        groups = [
            {"params": [("conv.weight", model.conv.weight)], "rules": "svd(rank=2)", "lr": 0.5, "scale": 2.0},
            {"params": [("biased.weight", model.biased.weight), ("biased.bias", model.biased.bias)], "weight_decay": 0.2},
        ]
        optimizer = lingrad.wrap(groups, "random(rank=3)", lr=0.1)
        summary = {g["name"]: (g["lr"], g["weight_decay"], g.get("scale"), g["param_names"]) for g in optimizer.param_groups}
        assert summary == {
            "0.coords": (0.5, 0.0, 2.0, ["conv.weight"]),
            "1.coords": (0.1, 0.2, 1.0, ["biased.weight"]),
            "1.vectors": (0.1, 0.2, None, ["biased.bias"]),
        }
        assert [sub.basis.transform.name for sub in optimizer.subspaces] == ["svd", "random"]

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            (lambda m: m.parameters(), r"expected a model, model.named_parameters\(\), or groups .* not a Parameter"),
            (
                lambda m: [{"params": list(m.parameters())}],
                r"expected a model, model.named_parameters\(\), or groups .* not a Parameter",
            ),
            (lambda m: [*m.named_parameters(), *m.named_parameters()], "the parameter 'embed.weight' is given twice"),
            (lambda m: [("x", m.head.weight), ("x", m.biased.weight)], "the name 'x' is given twice"),
            (lambda m: None, "expected a model, .* not None"),
            (lambda m: nn.Linear, "expected a model, .* not <class"),
            (lambda m: [{"lr": 1.0}], "expected a model, .* not {'lr': 1.0}"),
            (lambda m: [], "nothing to train: no parameter was given that requires a gradient"),
            (lambda m: [("x", m.head.weight.requires_grad_(False))], "nothing to train"),
            (lambda m: [{"params": list(m.named_parameters()), "fused": False}], "'fused' is one choice for the whole run"),
            (
                lambda m: [{"params": list(m.named_parameters()), "weight_decay": "x"}],
                "weight_decay must be a number, 0 or more",
            ),
            (lambda m: [{"params": list(m.named_parameters()), "lr": -3}], "lr must be a number, 0 or more, not -3"),
            (
                lambda m: [{"params": list(m.named_parameters()), "betass": (0, 0)}],
                "unknown option 'betass' in a param group; did you mean 'betas'?",
            ),
            (
                lambda m: [{"params": list(m.named_parameters()), "rles": "svd(rank=1)"}],
                "unknown option 'rles' in a param group; did you mean 'rules'?",
            ),
        ],
    )
    def test_refused(self, groups, message):
        with pytest.raises(SpecError, match=message):
            lingrad.wrap(groups(zoo()), "svd(rank=1)", lr=0.1)

    def test_a_rule_that_matches_frozen_parameters_only(self):
        model = zoo()
        model.head.requires_grad_(False)
        for given in (model, [{"params": list(model.named_parameters())}]):
            with pytest.raises(SpecError, match="rule 'hea[*]' matches frozen parameters only, such as 'head.weight'"):
                lingrad.wrap(given, {"hea*": "svd(rank=1)"}, lr=0.1)

    def test_adapter_mode_needs_the_model(self):
        model = zoo()
        with pytest.raises(ModeError, match="pass the model itself"):
            lingrad.adapt(model.named_parameters(), "svd(rank=1)", lr=0.1)
        optimizer = lingrad.wrap(model.named_parameters(), "svd(rank=1)", lr=0.1)  # nothing was left behind
        with pytest.raises(ModeError, match="pass the model itself"):
            optimizer.switch("adapter")
        assert optimizer.mode == "optimizer"


LAYOUTS = {
    "linear": (nn.Linear(5, 6), "weight", (6, 5)),
    "embedding": (nn.Embedding(9, 4), "weight", (9, 4)),
    "conv1d": (nn.Conv1d(3, 6, 2), "weight", (6, 6)),
    "conv2d": (nn.Conv2d(3, 6, (2, 4)), "weight", (6, 24)),
    "conv3d": (nn.Conv3d(2, 6, 2), "weight", (6, 16)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), "weight", (6, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), "weight", (4, 54)),
}


@pytest.mark.parametrize(("module", "attribute", "shape"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_weights_are_read_as_matrices(module, attribute, shape):
    weight = getattr(module, attribute)
    layout = layout_of(weight, module, attribute)
    matrix = layout.matrix(weight)
    assert tuple(matrix.shape) == layout.shape == shape
    assert matrix.data_ptr() == weight.data_ptr()
    assert torch.equal(matrix, weight.reshape(shape))
    assert torch.equal(layout.restore(matrix), weight)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((6, 5), (6, 5)),
        ((64, 32, 3), (64, 96)),  # a 1-d convolution
        ((64, 32, 3, 3), (64, 288)),
        ((64, 1, 3, 3), (64, 9)),  # depthwise
        ((8, 40, 60), (320, 60)),  # fused experts
    ],
)
def test_a_weight_without_its_module_is_cut_where_it_can_hold_the_largest_rank(shape, matrix):
    assert layout_of(torch.zeros(shape), None, "w").shape == matrix


def test_fused_experts_share_a_right_basis():
    weight = torch.randn(3, 12, 10)
    layout = layout_of(weight, None, "experts")
    assert layout.shape == (36, 10)
    assert torch.equal(layout.matrix(weight), weight.reshape(36, 10))


def test_conv1d_is_transposed():
    module = gpt2().transformer.h[0].attn.c_attn
    layout = layout_of(module.weight, module, "c_attn.weight")
    assert torch.equal(layout.matrix(module.weight), module.weight.t())
    assert torch.equal(layout.restore(module.weight.t()), module.weight)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(())])
def test_what_is_no_matrix(weight):
    with pytest.raises(ShapeError, match="a transform needs a weight with two or more dimensions, none empty"):
        layout_of(weight, None, "w")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("frosen", r"rule '\*' says 'frosen', which is no word; did you mean 'frozen'"),
        ("kron", r"kron needs left and right"),  # a transform, though it is near to frozen
        (3, "a config string was expected"),
    ],
)
def test_words_and_transforms_are_told_apart(value, message):
    with pytest.raises(SpecError, match=message):
        parse_rules({"*": value})
