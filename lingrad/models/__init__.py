"""Models to train or to inspect, by name or from a folder, and inputs for a model of any kind."""

from lingrad.models.build import LLAMAS as LLAMAS
from lingrad.models.build import LlamaShape as LlamaShape
from lingrad.models.build import build_llama as build_llama
from lingrad.models.build import load_model as load_model
from lingrad.models.build import next_token_loss as next_token_loss
from lingrad.models.build import norm_in_own_dtype as norm_in_own_dtype
from lingrad.models.build import open_model as open_model
from lingrad.models.build import read_config as read_config
from lingrad.models.inputs import TOKENS as TOKENS
from lingrad.models.inputs import loss_of as loss_of
from lingrad.models.inputs import make_inputs as make_inputs
from lingrad.models.inputs import reads_tokens as reads_tokens
from lingrad.models.low_bit import DTYPES as DTYPES
from lingrad.models.low_bit import in_int8 as in_int8
from lingrad.models.low_bit import open_in as open_in
