"""Comparative research: plans, their runs and their reports; and the comparisons of the command line."""

from lingrad.research.diagnostics import Diagnostic as Diagnostic
from lingrad.research.task import Task as Task
