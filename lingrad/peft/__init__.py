"""To and from PEFT: runs exported as adapters that PEFT loads by itself, and runs that start from an adapter."""

from typing import TYPE_CHECKING

from lingrad.deprecated import renamed_attributes as _renamed_attributes
from lingrad.peft.check import AdapterCheck as AdapterCheck
from lingrad.peft.check import LoaderFinding as LoaderFinding
from lingrad.peft.check import check_adapter as check_adapter
from lingrad.peft.export import export as export
from lingrad.peft.hub import push_to_hub as push_to_hub
from lingrad.peft.load import load as load
from lingrad.peft.read import Adapter as Adapter
from lingrad.peft.read import read_adapter as read_adapter
from lingrad.peft.report import AdapterReport as AdapterReport
from lingrad.peft.report import ChangedTensor as ChangedTensor
from lingrad.peft.write import Written as Written
from lingrad.peft.write import write_adapter as write_adapter

if not TYPE_CHECKING:  # so that a type checker still reports misspelt names
    __getattr__ = _renamed_attributes(__name__, {"Report": "AdapterReport"})
