"""Paired experiments: arms × seeds, run, stopped, resumed, extended, and judged by one rule.

study.json    the plan, written before the first run: arms, contrasts, seeds, what decides
runs/         one small file a finished run: ARM-seed-N.json
tuning/       the same for trials before the study
result.json, report.html, runs.csv, *.png, *.svg     once all runs are done

The runs are trainings of a recipe, commands or functions; `study.plan` says what they share.
"""
