"""Paired experiments: arms × seeds, run, stopped, resumed, extended, and judged by one rule.

study.json    the plan, written before the first run: recipe, arms, contrasts, seeds, outcomes
runs/         one small file a finished run: ARM-seed-N.json
tuning/       the same for trials before the study
result.json, report.html, runs.csv, *.png, *.svg     once all runs are done
"""

from normlab.study.arms import Arm
from normlab.study.design import Design
from normlab.study.result import Study, open_study

__all__ = ["Arm", "Design", "Study", "open_study"]
