"""A run is a folder; this is what stands in it and how it is found again.

recipe.json        what was asked for, resolved: recipe, seed, data
environment.json   on what: versions, processor, threads; what is observed
history.jsonl      one line an epoch
checkpoint.safetensors, checkpoint.previous.safetensors   while unfinished: where to go on
start.safetensors  while unfinished: where a run that starts from another began
last.safetensors   weights after the last step
best.safetensors   weights at the lowest validation loss
doubt.safetensors  what held-out pictures taught of when it is not sure
recalibrated.safetensors   the last weights with the statistics of a whole set of images
result.json        the scores; there once the run is finished
curves.png, report.html
"""

from normlab.runs.folders import RUNS, create_folder, latest
from normlab.runs.run import WEIGHTS, Environment, Result, Row, Run, open_run, read_history
from normlab.runs.task import STATISTICS, Origin, Start, Task

__all__ = [
    "RUNS",
    "STATISTICS",
    "WEIGHTS",
    "Environment",
    "Origin",
    "Result",
    "Row",
    "Run",
    "Start",
    "Task",
    "create_folder",
    "latest",
    "open_run",
    "read_history",
]
