"""Break the package in one place at a time and see that a test notices: ``python tools/mutants.py``."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for one run of pytest; a mutant that never ends is killed too

# which tests to try first
MAPS, BACKWARD, OPTIMIZER = (
    ("tests/maps/test_maps.py",),
    ("tests/adapters/test_linear.py",),
    ("tests/engine/test_optimizer.py",),
)
HAND = ("tests/engine/test_optimizer.py::test_a_step_by_hand",)
CLIPPING = ("tests/engine/test_optimizer.py::TestClipping",)
ZERO_GRAD = ("tests/engine/test_optimizer.py::TestZeroGrad", *OPTIMIZER)
UNUSUAL = ("tests/engine/test_optimizer.py::TestUnusualGradients", *OPTIMIZER)
STRUCTURE = ("tests/engine/test_optimizer.py::TestStructure",)
CHECKPOINT, RESUMES = ("tests/engine/test_checkpoint.py",), ("tests/engine/test_checkpoint.py::test_resuming_is_exact",)
REFERENCE, GALORE, PARALLEL = (
    ("tests/contract/test_reference.py",),
    ("tests/contract/test_galore.py",),
    ("tests/contract/test_parallel.py",),
)
BASES, TRANSFORMS = ("tests/optimizers/test_base.py",), ("tests/transforms/test_transforms.py",)
DETAILS, LAYERWISE = ("tests/contract/test_details.py",), ("tests/engine/test_layerwise.py",)
REFRESH, SHARING, STEPPING = (
    ("tests/engine/test_refresh.py",),
    ("tests/config/test_sharing.py",),
    ("tests/engine/test_step.py",),
)
SKETCHES, ENERGY = ("tests/engine/test_refresh.py::TestSketches",), ("tests/engine/test_refresh.py::TestEnergy",)
PRODUCTS = ("tests/engine/test_refresh.py::TestSketches::test_the_products_are_those_of_the_whole_gradient",)
STACKED = ("tests/config/test_sharing.py::test_the_basis_is_that_of_the_stacked_gradient",)
STAGGER, MERGING = ("tests/engine/test_refresh.py::TestStagger",), ("tests/engine/test_step.py::TestMergeEvery",)
CHANGES = ("tests/subspaces/test_ledger.py",)
FLOPS, FORWARD = ("tests/engine/test_step.py::TestFlops",), ("tests/engine/test_step.py::TestForwardOfAdapterMode",)

# what a mutant meets that these let pass: everything fast that is about numbers, state and structure
WIDE = (
    *(DETAILS + MAPS + BACKWARD + OPTIMIZER + REFERENCE + CHECKPOINT + BASES + TRANSFORMS + GALORE),
    *(REFRESH + SHARING + STEPPING),
    "tests/contract/test_faults.py",
    "tests/contract/test_resume.py",
    "tests/contract/test_duality.py",
)


class Mutant(NamedTuple):
    """One change that must not go unnoticed.

    Args:
        file: The file, relative to the package.
        old: Text that is in it exactly once.
        new: What replaces it.
        breaks: What is wrong then.
        tests: The fewest tests that should notice, tried before `WIDE`.
    """

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


MUTANTS = (
    # maps
    Mutant("maps/kronecker.py", "return KroneckerMap(self.right, self.left)", "return self", "T of a map is the map", MAPS),
    Mutant(
        "maps/two_sided.py",
        "return TwoSidedMap(self.right.T, self.left.T)",
        "return self",
        "T of a joined map is the map",
        MAPS,
    ),
    Mutant(
        "maps/kronecker.py",
        "part.lift(coords[block] if self.left is None else coords)",
        "part.lift((coords[block] if self.left is None else coords).to(weight.dtype))",
        "merge lifts in the weight's dtype",
        MAPS,
    ),
    Mutant(
        "maps/selection.py", "weight.index_add_(", "weight.index_copy_(", "merge of a selection overwrites the weight", MAPS
    ),
    Mutant(
        "maps/kronecker.py", "b.to(coords.dtype)) ** power", "b.to(coords.dtype)) ** 1", "squares are carried as means", MAPS
    ),
    Mutant(
        "maps/kronecker.py",
        "coords = coords @ overlap(new.right, old.right).t()",
        "coords = coords @ overlap(new.right, old.right)",
        "a transpose is dropped in transport",
        MAPS,
    ),
    Mutant("maps/kronecker.py", "rows.addmm_(y, first)", "rows.addmm_(y, first, beta=0)", "S z acts in place of W", FORWARD),
    Mutant("maps/kronecker.py", "> 2 * m * n", "> m * n", "W + S z is formed where it costs more", FLOPS),
    Mutant(
        "maps/kronecker.py",
        "_both_sides(self, self, coords, power=1).mul(coords).sum().clamp_min(0).sqrt()",
        "torch.linalg.vector_norm(coords)",
        "|S z| is |z|, whatever the basis",
        ("tests/testing/test_oracles.py",),
    ),
    # gradient
    Mutant("gradient.py", "torch.promote_types(dtype, torch.float32)", "dtype", "norms and coordinates in bfloat16", MAPS),
    Mutant("gradient.py", ".sum().clamp_min(0).sqrt()", ".sum().sqrt()", "a vanishing norm is NaN", MAPS),
    Mutant("gradient.py", "if joined.smaller_than_dense:", "if True:", "factors pile up past the matrix's size", MAPS),
    Mutant(
        "gradient.py",
        "isinstance(part, FactoredGradient) and not part.smaller_than_dense:",
        "False:",
        "the first micro-batch stays factored whatever its size",
        MAPS,
    ),
    Mutant(
        "gradient.py",
        "matrix.addmm_(part.out_grad.t(), part.input)",
        "matrix.addmm_(part.out_grad.t(), part.input, beta=0)",
        "a micro-batch replaces those before it",
        MAPS,
    ),
    # captured
    Mutant(
        "captured.py",
        "self._staged if running == self._backward else None",
        "self._staged",
        "a backward that failed is counted",
        BACKWARD,
    ),
    Mutant(
        "captured.py",
        "coords.grad is None or (self._written(coords.grad) and self._zeroed(coords.grad))",
        "coords.grad is None",
        "zeros by hand do not forget the refresh gradient",
        ZERO_GRAD,
    ),
    Mutant("captured.py", "None if self._anew else self.total", "self.total", "a forgotten gradient lives", ZERO_GRAD),
    Mutant("captured.py", "grad.clone() if compare", "grad if compare", "a factor from outside is not seen", CLIPPING),
    Mutant("captured.py", "return math.nan", "return 1.0", "a clip that made NaN is overlooked", CLIPPING),
    Mutant(
        "captured.py",
        "if not torch.allclose(now, factor * left, rtol=rounding, atol=floor):",
        "if False:",
        "a change by more than a factor is taken for one",
        CLIPPING,
    ),
    Mutant("captured.py", "elif left is None and not now.any():", "elif False:", "zeros set by others are refused", CHECKPOINT),
    Mutant(
        "captured.py",
        "if not left.any() or not left.isfinite().all():",
        "if not left.any():",
        "a factor is read from NaN",
        UNUSUAL,
    ),
    Mutant(
        "captured.py",
        "tuple(a.add_(b) for a, b in",
        "tuple(b for a, b in",
        "a sketch is of the last micro-batch only",
        PRODUCTS,
    ),
    # subspace
    Mutant(
        "subspace.py",
        "zeros = torch.zeros((p - stacked, q), device=weight.device, dtype=wide(weight.dtype))",
        "zeros = torch.zeros((p - stacked, q), device=weight.device, dtype=weight.dtype)",
        "coordinates of bfloat16 weights in bfloat16",
        DETAILS,
    ),
    Mutant(
        "subspace.py",
        "own, (m, n) = derive_seed(seed, name)",
        "own, (m, n) = derive_seed(seed)",
        "all weights draw alike",
        STRUCTURE,
    ),
    Mutant(
        "subspace.py", "self._map = chosen if", "self._map = chosen or self._map if", "the old map outlives its state", RESUMES
    ),
    Mutant(
        "subspace.py",
        "(self.refreshes == 0 and self.transform.due(0))",
        "False",
        "a weight without a gradient at step 0 is never refreshed",
        UNUSUAL,
    ),
    Mutant(
        "subspace.py", "self.transform.due(clock) or", "self.transform.due(clock + 1) or", "refreshes a step early", REFERENCE
    ),
    Mutant("subspace.py", "clock = step - self.offset", "clock = step", "weights do not take turns", STAGGER),
    Mutant(
        "subspace.py", "        self.forget()\n        clock =", "        clock =", "a gradient survives its step", ZERO_GRAD
    ),
    Mutant("subspace.py", "When(clock, self.refreshes", "When(0, self.refreshes", "every draw is the first", BACKWARD),
    Mutant(
        "subspace.py",
        'self.refreshes != self.when.refreshes if self.transform.reads == "sketch" else now',
        "now",
        "a gradient from before a sketch's basis is accepted",
        SKETCHES,
    ),
    Mutant(
        "subspace.py",
        "if self.proposal is not None and self.coords.grad is not None:",
        "if False:",
        "a backward after the clip is accepted",
        CLIPPING,
    ),
    Mutant(
        "subspace.py", "chosen if self.transform.stores_map and", "chosen if", "a map that is made again is kept too", DETAILS
    ),
    Mutant(
        "subspace.py",
        "    torch._foreach_zero_(released)",
        "    [coords.fill_(1e-3) for coords in released]",
        "coordinates do not begin at zero",
        HAND,
    ),
    Mutant(
        "subspace.py",
        "return [weight] if sub.released else [weight, sub.coords]",
        "return [weight]",
        "coordinates do not decay",
        REFERENCE,
    ),
    Mutant(
        "subspace.py",
        "return [weight] if sub.released else [weight, sub.coords]",
        "return [weight.clone()] if sub.released else [sub.coords]",
        "the weight does not decay",
        HAND,
    ),
    Mutant(
        "subspace.py",
        "    sub.coords.zero_()\n\n\ndef lifted",
        "    pass\n\n\ndef lifted",
        "coordinates are merged twice",
        REFERENCE,
    ),
    Mutant(
        "subspace.py",
        "if matrix.untyped_storage()._cdata == weight.untyped_storage()._cdata:",
        "if True:",
        "a merge into a copy of the weight is lost",
        BACKWARD,
    ),
    Mutant(
        "subspace.py",
        "    if sub.released:\n        return\n    sub.merged",
        "    sub.merged",
        "coordinates that hold no memory are merged",
        LAYERWISE,
    ),
    # refresh
    Mutant("refresh.py", "norm = float(size) * factor", "norm = float(size)", "a factor that is NaN refreshes", CLIPPING),
    Mutant("refresh.py", "if norm == 0.0 or not", "if not", "a zero gradient decides a basis", UNUSUAL),
    Mutant(
        "refresh.py", "projected = chosen.project", "projected = sub.map().project", "a refresh projects with the old map", HAND
    ),
    Mutant(
        "refresh.py",
        "projected if factor == 1.0 else projected * factor",
        "projected",
        "a refresh forgets the factor from outside",
        CLIPPING,
    ),
    Mutant(
        "refresh.py",
        "    remainder = weight.merge()\n",
        "    remainder = None\n    if not sub.released:\n        sub.coords.zero_()\n",
        "no merge at a refresh",
        REFERENCE,
    ),
    Mutant("refresh.py", "sub.refreshes + 1,", "max(sub.refreshes, 1),", "refreshes are not counted", BACKWARD),
    Mutant("refresh.py", "        moments.state.clear()\n", "", "reset keeps old moments", REFERENCE),
    Mutant(
        "refresh.py", "        moments.state.update(moments.initial())\n", "", "reset leaves adagrad without a state", OPTIMIZER
    ),
    Mutant(
        "refresh.py",
        "            exchange(members, proposal, commit)\n",
        "",
        "a basis learned from a sketch is not committed",
        SKETCHES,
    ),
    Mutant(
        "refresh.py",
        "learn(lead.state, found[:count], lead.when)",
        "learn(lead.state, found[:count], lead.when._replace(step=0))",
        "a sketch is read as that of the first step",
        PRODUCTS,
    ),
    Mutant("refresh.py", "elif bool(any_at_all):", "else:", "a sketch of zeros decides a basis", SKETCHES),
    Mutant(
        "refresh.py",
        "whole[0] if len(whole) == 1 else StackedGradient(whole)",
        "whole[0]",
        "a shared basis is that of the leader's gradient",
        STACKED,
    ),
    Mutant(
        "refresh.py",
        "for sub in reversed(members):",
        "for sub in members:",
        "who shares a basis is merged through the next sketch's",
        SHARING,
    ),
    Mutant("moments.py", "if self.degrees[key] == 1 else", "if True else", "squares rotate as means", REFERENCE),
    # gather
    Mutant("gather.py", ", copy=known)", ")", "a sketch is summed in the gradient's memory", SKETCHES),
    Mutant(
        "gather.py",
        "left=probe.left[start : start + rows]",
        "left=probe.left[:rows]",
        "who shares a basis is asked the leader's questions",
        STACKED,
    ),
    Mutant(
        "gather.py",
        "_sum([total[i] for total in found if total is not None])",
        "known[i]",
        "a shared sketch is the leader's",
        STACKED,
    ),
    Mutant("gather.py", "squares[0] + squares[1] - 1", "squares[0] + squares[1]", "the energies of two sides add up", ENERGY),
    # sharing
    Mutant(
        "sharing.py",
        "target.layout.shape[1], target.transform",
        "target.layout.shape[1]",
        "weights of different transforms share a basis",
        ("tests/config/test_sharing.py::TestGroups",),
    ),
    Mutant(
        "stacked.py",
        "[part.product(None, right) for part in self.parts]",
        "[part.product(None, right) for part in self.parts[::-1]]",
        "stacked gradients in the wrong order",
        ("tests/config/test_sharing.py::TestStackedGradient",),
    ),
    Mutant(
        "adapters/linear.py", "self.given() is given and", "True and", "an input is served the reduced one of another", STACKED
    ),
    Mutant(
        "adapters/linear.py",
        "self.version == given._version and",
        "True and",
        "an input written into is not reduced again",
        ("tests/config/test_sharing.py::test_an_input_changed_in_place_or_used_again_is_reduced_again",),
    ),
    # transforms
    Mutant(
        "transforms/sketch.py",
        '"sketch", when.step, side)',
        '"sketch", side)',
        "every sketch is by the same test matrix",
        ("tests/engine/test_refresh.py::TestSketches::test_each_step_and_side_has_test_columns_of_its_own",),
    ),
    Mutant(
        "transforms/sketch.py",
        '"sketch", when.step, side)',
        '"sketch", when.step)',
        "both sides are sketched by one test matrix",
        ("tests/engine/test_refresh.py::TestSketches::test_each_step_and_side_has_test_columns_of_its_own",),
    ),
    Mutant(
        "transforms/pca.py",
        "return align_signs(found, basis), memory",
        "return found, memory",
        "pca's first basis has signs of its own",
        ("tests/engine/test_refresh.py::TestSketches::test_columns_point_as_those_before_did",),
    ),
    Mutant(
        "transforms/power.py",
        "align_signs(orthonormalize(columns, seed=seed), old)",
        "orthonormalize(columns, seed=seed)",
        "power's bases have signs of their own",
        ("tests/engine/test_refresh.py::TestSketches::test_columns_point_as_those_before_did",),
    ),
    Mutant(
        "transforms/power.py",
        "return Iterated(left, None, right)",
        "return Iterated(left, None, state.companion)",
        "power's companion stands still",
        TRANSFORMS,
    ),
    # stepping
    Mutant(
        "stepping.py", "self._arithmetic, self._step + 1)", "self._arithmetic, self._step + 2)", "eps of the next step", GALORE
    ),
    Mutant(
        "stepping.py",
        "                pull(own, group)\n",
        "                pass\n",
        "what a base keeps in its group is lost",
        ("tests/engine/test_optimizer.py::TestBaseState",),
    ),
    Mutant(
        "stepping.py",
        "if sub.proposal is None and sub.coords.grad is not None]",
        "if sub.proposal is None]",
        "a gradient that model.zero_grad() dropped is used",
        DETAILS,
    ),
    Mutant(
        "stepping.py",
        "next((factor for factor in factors if factor is not None), 1.0)",
        "1.0",
        "no factor for a weight that got zeros",
        CLIPPING,
    ),
    Mutant("stepping.py", "or param.grad is None:", "or False:", "a weight without a gradient decays", UNUSUAL),
    Mutant(
        "stepping.py",
        'group["lr"] * group["weight_decay"]\n',
        'group["lr"] * group.get("scale", 1.0) * group["weight_decay"]\n',
        "scale in the decay",
        HAND,
    ),
    Mutant(
        "stepping.py",
        "sub.coords.grad is not None or self._layerwise is not None",
        "True",
        "a dropped gradient's sketch decides a basis",
        ("tests/engine/test_refresh.py::TestSketches::test_a_gradient_that_was_dropped_refreshes_nothing",),
    ),
    Mutant("stepping.py", "probe = self._is_probe()", "probe = False", "the step that allocates state refreshes", DETAILS),
    Mutant(
        "stepping.py",
        "        self._advance(self._stocks(), self",
        "        self._renew()\n        self._advance(self._stocks(), self",
        "a sketch's basis serves the step it was gathered in",
        SKETCHES,
    ),
    Mutant(
        "stepping.py",
        "for sub in reversed(due):",
        "for sub in due:",
        "who shares a basis is merged through the next gradient's",
        SHARING,
    ),
    Mutant(
        "stepping.py", "(self._step + 1) % self._merge_every", "self._step % self._merge_every", "merges a step late", MERGING
    ),
    Mutant(
        "stepping.py",
        "if missing and self._layerwise is None and",
        "if False and",
        "nobody is told of a forward that lost ours",
        FORWARD,
    ),
    Mutant(
        "stepping.py",
        "        if plain:\n",
        "        if False:\n",
        "a compiled step takes a learning rate that is a number",
        ("tests/engine/test_step.py::test_a_compiled_step_refuses_a_plain_learning_rate",),
    ),
    Mutant("stepping.py", "        param.grad = None\n", "", "a stepped gradient stays", LAYERWISE),
    # layerwise
    Mutant("layerwise.py", "        self._stepped.add(id(param))\n", "", "a second backward steps again", LAYERWISE),
    Mutant(
        "layerwise.py",
        "        if not wait:\n",
        "        if True:\n",
        "a weight is merged before its layer has used it",
        LAYERWISE,
    ),
    # optimizer
    Mutant(
        "optimizer.py",
        "with torch.no_grad():\n            self._choose(",
        "_ = (",
        "a clip reads the old basis's gradient",
        CLIPPING,
    ),
    Mutant(
        "optimizer.py",
        "for sub in lead.members:",
        "for sub in lead.members[:1]:",
        "who shares a basis takes another turn",
        SHARING,
    ),
    Mutant(
        "optimizer.py",
        "            self._attach(before)\n            raise",
        "            raise",
        "a switch that fails leaves the model detached",
        BACKWARD,
    ),
    Mutant(
        "optimizer.py",
        "            attachment.merge()\n            attachment.detach()",
        "            attachment.detach()",
        "detach forgets coordinates",
        REFERENCE,
    ),
    Mutant(
        "optimizer.py",
        "            attachment.sub.forget()\n",
        "            pass\n",
        "zero_grad keeps a chosen basis",
        ZERO_GRAD,
    ),
    # adapters
    Mutant(
        "adapters/linear.py", "        if weight.requires_grad:", "        if False:", "an unfrozen weight stays so", BACKWARD
    ),
    Mutant(
        "adapters/linear.py",
        "if not self.buried or there is None:",
        "if True:",
        "a forward is replaced again though another calls it",
        FORWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "self.buried = self.replaced",
        "self.buried = False",
        "detach takes away a forward that is not ours",
        FORWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "current.T.inner.add_apply_(x_grad, reduced_grad, coords.t())",
        "pass",
        "no gradient through S z to the input",
        BACKWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "if ctx.active and ctx.needs_input_grad[1]:",
        "if False:",
        "no gradient through S z past a replaced forward",
        FORWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "return current.add_lift(matrix, coords)",
        "return matrix",
        "W + S z is formed without S z",
        FORWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "ctx.lifted = coords.dtype == weight.dtype and",
        "ctx.lifted =",
        "S z is rounded into a bfloat16 weight",
        FLOPS,
    ),
    Mutant(
        "adapters/linear.py", "self.borrowed = x.is_leaf", "self.borrowed = False", "a borrowed input is not copied", BACKWARD
    ),
    Mutant(
        "adapters/linear.py",
        "cast(x, out.dtype)  # under autocast the layer computed",
        "x  # under autocast the layer computed",
        "autocast: the tied input keeps its dtype",
        BACKWARD,
    ),
    Mutant(
        "adapters/linear.py",
        "cast(x, out.dtype)  # under autocast the layer computes",
        "x  # under autocast the layer computes",
        "autocast: the adapted input keeps its dtype",
        BACKWARD,
    ),
    Mutant("adapters/linear.py", "else out.detach()", "else out", "in-place layers meet a view", BACKWARD),
    Mutant(
        "adapters/linear.py",
        "if self.sub.refreshes != self.refreshes:",
        "if False:",
        "an old forward projects by the new basis",
        BACKWARD,
    ),
    Mutant("adapters/weight.py", "        weight.grad = None\n", "", "a hook leaves the full gradient", BACKWARD),
    Mutant("adapters/weight.py", "matrix.dense().clone()", "matrix.dense()", "autograd's buffer is written into", BACKWARD),
    Mutant(
        "adapters/weight.py",
        "        self.weight.requires_grad_(self.sub.coords.requires_grad)\n",
        "",
        "detach leaves a weight frozen",
        STRUCTURE,
    ),
    Mutant(
        "adapters/base.py",
        "dtype=wide(asked.dtype)",
        "dtype=asked.dtype",
        "model.bfloat16() rounds coordinates",
        OPTIMIZER + CHECKPOINT,
    ),
    Mutant("adapters/base.py", "        self.sub.move(asked.device)\n", "", "a basis stays behind on its device", OPTIMIZER),
    # checkpoint
    Mutant(
        "checkpoint.py",
        "        trees.checked(like, moments, key, name)\n",
        "        pass\n",
        "moments of another shape are loaded",
        CHECKPOINT,
    ),
    Mutant(
        "checkpoint.py", "trees.copied(value, places.get(key, device))", "value", "a run writes into what it loaded", CHECKPOINT
    ),
    Mutant("ledger.py", "        self.kept *= factor\n", "", "the ledger forgets decay", CHANGES),
    Mutant(
        "stepping.py",
        "                entry[1].extend(attachment.sub.ledger.tensors())\n",
        "",
        "what is open does not decay",
        CHANGES,
    ),
    Mutant("ledger.py", "(self.kept / part.kept)", "1.0", "what is closed does not decay", CHANGES),
    Mutant(
        "ledger.py",
        "        self._open += coords\n",
        "        self._open = coords.clone()\n",
        "only the last merge counts",
        CHANGES,
    ),
    Mutant(
        "ledger.py",
        'if self.transform.reads == "nothing":\n            self',
        "if False:\n            self",
        "seeds are not kept",
        CHANGES,
    ),
    Mutant(
        "refresh.py",
        "        sub.ledger.close((sub.leader or sub).state, sub.map().factors)\n",
        "        pass\n",
        "bases run together",
        CHANGES,
    ),
    Mutant("stepping.py", "                ledger.decay(number)\n", "                pass\n", "decay is not noted", CHANGES),
    Mutant(
        "subspace.py",
        "sub.merged = sub.merged or release or bool(sub.coords.any())",
        "pass",
        "a merge leaves no trace",
        CHANGES,
    ),
    Mutant(
        "adapters/base.py",
        "                known = self.lifted().detach()\n",
        "                known = weight\n",
        "a saved model lacks z",
        CHANGES,
    ),
    Mutant(
        "adapters/base.py",
        "            self.sub.coords.data.zero_()\n",
        "            pass\n",
        "a loaded model keeps z",
        CHANGES,
    ),
    Mutant(
        "persistence.py",
        "                        stored[key].copy_(tensor)\n",
        "                        pass\n",
        "base weights are lost",
        CHANGES,
    ),
    Mutant("checkpoint.py", '("param_names", "specs")', '("param_names",)', "another spec is loaded", CHECKPOINT),
    Mutant("checkpoint.py", 'refreshes": sub.refreshes', 'refreshes": 0', "refreshes are not saved", RESUMES),
    Mutant("persistence.py", "                self._step = found.step\n", "", "a resumed run counts from 0", RESUMES),
    Mutant(
        "persistence.py",
        "            sub.schedule(self._step)  # a redraw",
        "            sub.forget()  # a redraw",
        "a resumed run forgets what is due",
        RESUMES,
    ),
    Mutant(
        "persistence.py", '            "stagger": self._stagger,\n', "", "a run without turns loads one with turns", STAGGER
    ),
    Mutant(
        "persistence.py",
        '            "share": self._share,\n',
        "",
        "a run that shares no basis loads one that does",
        ("tests/config/test_sharing.py::test_it_resumes_to_the_bit_with_one_basis_in_the_file",),
    ),
    # parallel
    Mutant("parallel.py", "(tensor / count)", "(tensor)", "a sum over ranks instead of a mean", PARALLEL),
    Mutant(
        "parallel.py",
        "average(self.local.product(left, right))",
        "self.local.product(left, right)",
        "each rank its own products",
        PARALLEL,
    ),
    Mutant(
        "captured.py",
        "average(torch.zeros_like(now) if left is None else left)",
        "torch.zeros_like(now) if left is None else left",
        "each rank its own factor",
        PARALLEL,
    ),
    Mutant(
        "adapters/weight.py",
        "None, average(projected.to(sub.coords.dtype)), None",
        "None, projected.to(sub.coords.dtype), None",
        "a parametrized weight is not averaged",
        PARALLEL,
    ),
)


def copy_tracked(folder: Path) -> None:
    """Copy what git tracks, as it is in the working tree, and this program's own tests."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S607
    for name in [*filter(None, listed.split("\0")), *REFERENCE, "tests/support/reference.py"]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run Python in the copy; the exit status, or -1 when it took too long, and what it said."""
    # no bytecode: two mutants of one size, written within a second, would pass for each other
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def killer(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first of the tests that fails; None when all pass."""
    present = [test for test in tests if (folder / test.partition("::")[0]).is_file()]
    if not present:
        return None
    options = ("-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider")
    # it starts three processes to show what other tests show in one
    skipped = "--deselect=tests/engine/test_checkpoint.py::test_a_saved_model_goes_on_in_another_process"
    status, said = run(folder, "-m", "pytest", *options, skipped, *present)
    if status == 0:
        return None
    if status > 2:  # not 1, a failure, nor 2, a package that cannot be imported
        sys.exit(f"pytest did not run {' '.join(present)}: {said.strip()[-300:]}")
    if status == -1:
        return f"the time limit of {SECONDS} s"
    found = re.search(r"^(?:FAILED|ERROR) (\S+?::.*?|\S+)(?: - .*)?$", said, flags=re.MULTILINE)
    return found[1].removeprefix("tests/") if found else "a package that cannot be imported"


def main() -> None:
    """Try every mutant, print the table, and exit with 1 when one no longer applies or the tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="", help="mutants whose file or description match this regex")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if re.search(options.only, f"{mutant.file}: {mutant.breaks}")]
    stale = [m for m in chosen if (ROOT / "lingrad" / m.file).read_text().count(m.old) != 1]
    for mutant in stale:
        print(f"{mutant.file}: no longer applies, its text is not there exactly once: {mutant.old!r}")
    if options.list:
        print("\n".join(f"{mutant.file}: {mutant.breaks}" for mutant in chosen))
        sys.exit(bool(stale))
    begin = time.monotonic()
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tracked(folder)
        where = run(folder, "-c", "import lingrad; print(lingrad.__file__)")[1].strip()
        print(f"mutating {where}", flush=True)
        if not Path(where).is_relative_to(folder):
            sys.exit("the installed package would be tested, not its copy")
        failing = killer(folder, WIDE)
        if failing is not None:
            sys.exit(f"without a mutant the tests fail already: {failing}")
        for mutant in chosen:
            if mutant in stale:
                continue
            path = folder / "lingrad" / mutant.file
            whole = path.read_text()
            path.write_text(whole.replace(mutant.old, mutant.new))
            by = killer(folder, mutant.tests) or killer(folder, WIDE)
            path.write_text(whole)
            survivors += by is None
            print(f"{mutant.file:20}  {mutant.breaks:58}  {by or 'SURVIVED'}", flush=True)
    tried = len(chosen) - len(stale)
    print(
        f"{tried} mutants, {tried - survivors} killed, {survivors} survived, {len(stale)} no longer apply; "
        f"{time.monotonic() - begin:.0f} s"
    )
    sys.exit(bool(stale))


if __name__ == "__main__":
    main()
