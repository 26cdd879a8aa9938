"""To and from PEFT: adapters that PEFT alone loads, and runs that go on from one."""

from lingrad.peft.export import export as export
from lingrad.peft.load import load as load
from lingrad.peft.read import Adapter as Adapter
from lingrad.peft.read import read_adapter as read_adapter
from lingrad.peft.report import Report as Report
from lingrad.peft.write import Written as Written
from lingrad.peft.write import write_adapter as write_adapter
