import torch

# two pytest workers on two cores: one thread each is faster than two that compete
torch.set_num_threads(1)
