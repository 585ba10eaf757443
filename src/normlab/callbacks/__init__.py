"""Callbacks for other people's training loops; each is imported by its own name only.

from normlab.callbacks.lightning import Checkup, History, Watch
from normlab.callbacks.keras import Checkup, History, Watch
"""
