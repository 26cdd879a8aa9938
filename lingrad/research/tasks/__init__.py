"""The tasks that plans may name."""

from lingrad.research.task import Task
from lingrad.research.tasks.classify import Classify
from lingrad.research.tasks.text import Text

TASKS: dict[str, type[Task]] = {"text": Text, "classify": Classify}
