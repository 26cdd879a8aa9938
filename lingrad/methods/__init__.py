"""Ways to train a model, to be compared: lingrad's own, and baselines of other packages."""

from lingrad.methods.apollo import Apollo as Apollo
from lingrad.methods.base import FullRank as FullRank
from lingrad.methods.base import GaloreTorch as GaloreTorch
from lingrad.methods.base import Lingrad as Lingrad
from lingrad.methods.base import Lora as Lora
from lingrad.methods.base import Method as Method
from lingrad.methods.base import Training as Training
from lingrad.methods.baselines import BASELINES as BASELINES
from lingrad.methods.baselines import Baseline as Baseline
from lingrad.methods.baselines import baseline as baseline
from lingrad.methods.column_normalized import ColumnNormalized as ColumnNormalized
from lingrad.methods.relora import ReLora as ReLora
