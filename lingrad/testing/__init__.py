"""Oracles for maps, transforms and base optimizers, and the small training runs they need."""

from lingrad.testing.oracles import assert_adjoint as assert_adjoint
from lingrad.testing.oracles import assert_dual as assert_dual
from lingrad.testing.oracles import assert_reads_only_gradients as assert_reads_only_gradients
from lingrad.testing.training import EveryKind as EveryKind
from lingrad.testing.training import every_kind as every_kind
from lingrad.testing.training import token_batches as token_batches
from lingrad.testing.training import token_loss as token_loss
from lingrad.testing.training import train as train
from lingrad.testing.training import trajectories as trajectories
from lingrad.testing.training import weight_gap as weight_gap
