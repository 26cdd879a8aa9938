"""The combinations that tests run over."""

SIDES = ("short", "long", "left", "right", "both")

# Every transform with each solver and kind, refreshing every 7 steps; {side} is filled in by the test.
SIDED = (
    "svd(rank=4, every=7, side={side})",
    "svd(rank=4, every=7, side={side}, solver=gram)",
    "svd(rank=4, every=7, side={side}, solver=randomized)",
    "power(rank=4, every=7, side={side})",
    "random(rank=4, every=7, side={side}, kind=gaussian)",
    "random(rank=4, every=7, side={side}, kind=rademacher)",
    "random(rank=4, every=7, side={side}, kind=orthonormal)",
    "random(rank=4, every=7, side={side}, kind=rows)",
    "random(rank=4, every=7, side={side}, store=false)",
    "pca(rank=4, side={side})",
    "pca(rank=4, every=7, side={side}, optimizer=sgd(momentum=0.9), lr=0.1, orthonormalize=true)",
)
UNSIDED = (
    "kron(left=svd(rank=4, every=7), right=random(rank=3, every=5))",
    "kron(left=random(rank=4, every=7, kind=rows), right=random(rank=3, every=7, kind=rows))",
    "kron(left=power(rank=4, every=7), right=random(rank=3, every=7, kind=rows))",
    "full()",
)
SPECS = tuple(spec.format(side=side) for spec in SIDED for side in SIDES) + UNSIDED

BASES = {
    "adamw": {"lr": 1e-2},
    "sgd": {"lr": 1e-1, "momentum": 0.9},
    "lion": {"lr": 1e-3},
}
