"""Checkpoints: one file that holds weights and loop state of the same step, or nothing.

What is random is not in it: every draw is a function of the seed and the step, so the step's
number is the position in every stream, the permutation of the images included.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from normlab.core.files import sweep, write_atomic
from normlab.core.ranks import Ranks
from normlab.core.tensors import Tensors, is_finite, read_tensors, write_tensors
from normlab.errors import DataError
from normlab.training.optimisers import Optimizer
from normlab.training.state import Plan, State, Totals

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
SECONDS_BETWEEN = 45.0


class Checkpoints:
    """Writes what must survive: history and best weights each epoch, a checkpoint at times.

    It is the last observer: what another observer keeps of a step is on the disk before the step's
    checkpoint. A resumed run repeats only the steps behind its checkpoint.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state, self.saved_at = folder, state, state.seconds

    def before_training(self, plan: Plan) -> None:
        if self.state.history and not self.state.step:  # a fitted head, scored
            self._write(self.state, epoch=0)

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if batch == batches:
            self._write(state, epoch + 1)
        if state.seconds - self.saved_at >= SECONDS_BETWEEN:
            save(self.folder, state)
            self.saved_at = state.seconds

    def _write(self, state: State, epoch: int) -> None:
        lines = [json.dumps(row) + "\n" for row in state.history]
        write_atomic(self.folder / "history.jsonl", "".join(lines).encode())
        if state.best_epoch == epoch:
            write_tensors(self.folder / "best.safetensors", state.best_weights)


def save(folder: Path, state: State) -> None:
    """Write a checkpoint; the last good one is kept beside it.

    After an update that made a weight NaN or infinite, which the next step will end with, the one
    before stays the newest.
    """
    if not is_finite(state.model.state_dict()):
        return
    tensors = _tensors(state)
    target = folder / CHECKPOINT
    if target.exists():
        os.replace(target, folder / PREVIOUS)
    write_tensors(target, tensors, state.loop_state())


def _tensors(state: State) -> Tensors:
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in state.best_weights.items()}
    tensors |= {f"average.{k}": v for k, v in state.average.items()}
    for index, values in enumerate(state.optimizer.state.values()):
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    return tensors


def share(ranks: Ranks, state: State) -> None:
    """Bring the `state` of every rank to where that of rank 0 is."""
    if ranks.size == 1:
        return
    tensors = {k: v.detach().contiguous() for k, v in _tensors(state).items()}
    form = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()}
    form, loop = ranks.exchange("state", [form, state.loop_state()] if ranks.first else None)[0]
    device = next(state.model.parameters()).device
    if not ranks.first:
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, shape) in form.items()
        }
    ranks.broadcast(tensors)
    if not ranks.first:
        _fill(state, tensors, loop)


def restore(folder: Path, state: State) -> str | None:
    """Bring `state`, fresh from its seed, to the last good checkpoint in `folder`.

    Returns:
        Why an older checkpoint, or the start, had to do; None if the newest one is good.
    """
    sweep(folder)
    problem = None
    fresh = {k: v.clone() for k, v in state.model.state_dict().items()}
    for name in (CHECKPOINT, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            _restore(folder / name, state)
        except DataError as e:
            problem = str(e)
            state.model.load_state_dict(fresh)
            continue
        if problem:  # else the next `save` would move the damaged one over this good one
            os.replace(folder / PREVIOUS, folder / CHECKPOINT)
        return problem
    return problem


def _restore(path: Path, state: State) -> None:
    tensors, loop = read_tensors(path)
    try:
        _fill(state, tensors, loop)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as e:
        reason = str(e).splitlines()[-1].strip()
        raise DataError(f"{path} is not a checkpoint of this run ({reason})") from None


def _fill(state: State, tensors: Tensors, loop: dict[str, Any]) -> None:
    parts: dict[str, Tensors] = {"model": {}, "optimizer": {}, "best": {}, "average": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    state.model.load_state_dict(parts["model"])
    totals, history, best_epoch = Totals(**loop["totals"]), loop["history"], loop["best_epoch"]
    best_val_loss = next(
        (row["val_loss"] for row in history if row["epoch"] == best_epoch), state.best_val_loss
    )
    step, seconds = int(loop["step"]), float(loop["seconds"])
    _restore_optimizer(state.optimizer, parts["optimizer"])
    average = _like_parameters(state.model, parts["average"])
    partial, done = Totals(**loop["part"]), loop["parts"]
    state.best_weights, state.totals, state.history = parts["best"], totals, history
    state.best_epoch, state.best_val_loss = best_epoch, best_val_loss
    state.average, state.part, state.parts = average, partial, done
    ending = loop.get("ending")
    state.ending = None if ending is None else (int(ending[0]), int(ending[1]))
    state.step, state.seconds = step, seconds


def _like_parameters(
    model: torch.nn.Module, average: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Lay averaged weights out as the parameters lie in memory, and in their order."""
    return {
        name: torch.empty_like(p).copy_(average[name]).detach()
        for name, p in model.named_parameters()
        if name in average
    }


def _restore_optimizer(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give each parameter its moments back, laid out as the parameter lies in memory.

    Fused updates walk both in memory order; moments in another layout would meet wrong weights.
    """
    parameters = list(optimizer.state)
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        p = parameters[int(index)]
        if tensor.shape == p.shape:
            optimizer.state[p][key] = torch.empty_like(p).copy_(tensor).detach()
        else:
            optimizer.state[p][key] = tensor.to(p.device)


def remove(folder: Path) -> None:
    """Remove the checkpoints of a finished run."""
    for name in (CHECKPOINT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
