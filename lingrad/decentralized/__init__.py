"""Workers that train one model together, each in a slice of its own, and exchange coordinates every few steps.

Each worker holds the model and trains it by ``lingrad.adapt(model, "slice(rank=8, workers=4)", rounds=Rounds(workers=...))``
on data of its own. ``workers`` says how they reach each other: `ProcessWorkers` for the processes of torch.distributed, a fixed
set; `TorchftWorkers` for workers that may die, be late or join; `simulate` for all of them in one process. See
docs/decentralized.md.
"""

from lingrad.config.rounds import Rounds as Rounds
from lingrad.config.rounds import Workers as Workers
from lingrad.decentralized.processes import ProcessWorkers as ProcessWorkers
from lingrad.decentralized.simulation import simulate as simulate
from lingrad.decentralized.torchft import TorchftWorkers as TorchftWorkers
