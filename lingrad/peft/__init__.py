"""To and from PEFT: runs exported as adapters that PEFT loads by itself, and runs that start from an adapter."""

from lingrad.peft.export import export as export
from lingrad.peft.load import load as load
from lingrad.peft.read import Adapter as Adapter
from lingrad.peft.read import read_adapter as read_adapter
from lingrad.peft.report import AdapterReport as AdapterReport
from lingrad.peft.write import Written as Written
from lingrad.peft.write import write_adapter as write_adapter
