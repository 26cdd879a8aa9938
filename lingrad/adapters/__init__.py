"""How a subspace is attached to a model: one file for each way a coordinate gradient is born."""

from lingrad.adapters.base import Attachment as Attachment
from lingrad.adapters.base import Mode as Mode
from lingrad.adapters.base import refuse_attached as refuse_attached
from lingrad.adapters.linear import LinearAttachment as LinearAttachment
from lingrad.adapters.weight import WeightAttachment as WeightAttachment
