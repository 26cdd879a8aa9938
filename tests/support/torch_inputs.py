"""The inputs that torch's own tests give to its optimizers and modules (torch.testing._internal, which is not public)."""

import torch

_flag = "__allow_nonbracketed_mutation_flag"
_before = getattr(torch.backends, _flag)
from torch.testing._internal import common_modules, common_optimizers  # noqa: E402

setattr(torch.backends, _flag, _before)  # the import forbids every other test of the process to set torch.backends.*

OPTIMIZERS = common_optimizers.optim_db
MODULES = common_modules.module_db
