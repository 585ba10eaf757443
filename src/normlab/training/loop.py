"""The training loop: a batch, a rate, a step, then the hooks."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from normlab.core.streams import streams
from normlab.errors import Interrupted, NonFiniteError
from normlab.training.captured import Captured, holds_only_known
from normlab.training.hooks import make_hooks
from normlab.training.optimisers import set_rate
from normlab.training.parallel import ParallelStep
from normlab.training.state import Hook, Observer, Plan, State, StepResult
from normlab.training.step import train_step


def fit(
    plan: Plan,
    state: State,
    device: torch.device,
    observers: Sequence[Observer] = (),
    *,
    hooks: Sequence[Hook] | None = None,
) -> None:
    """Train from where `state` stands to the recipe's end.

    Args:
        observers: told after the hooks; they only read.
        hooks: None for those that the plan asks for, `make_hooks(plan)`.

    Raises:
        NonFiniteError: naming epoch and step, and what to try.
        Interrupted: SIGINT or SIGTERM came; hooks and observers have seen the last step.
    """
    hooks = make_hooks(plan) if hooks is None else hooks
    recipe, steps, of_epoch = plan.recipe, plan.steps, plan.epoch_steps
    batches, weights = plan.batches(device), plan.class_weights(device)
    together: ParallelStep | None = None
    for hook in hooks:
        hook.before_training(plan, state)
    for observer in observers:
        observer.before_training(plan)
    state.model.train()
    with _signals(patience=2.0 if plan.ranks.size > 1 else 0.0) as interrupted:
        if plan.ranks.size > 1:
            together = ParallelStep(state.model, batches, interrupted)
        take: Callable[..., tuple[float, int]] = together or train_step
        captured = not together and holds_only_known(state.model, *hooks, *observers)
        model = Captured(state.model) if captured else state.model
        rngs = streams(plan.seed, "dropout", numbers=range(state.step, steps))
        for step, rng in enumerate(rngs, state.step):
            if state.stopped:
                break
            epoch, batch = divmod(step, of_epoch)
            x, labels = batches(step)
            set_rate(state.optimizer, state.share(recipe.schedule.share(step / steps)))
            try:
                loss, correct = take(
                    model, state.optimizer, x, labels, rng, recipe.label_smoothing, weights
                )
            except NonFiniteError as e:
                raise NonFiniteError(
                    f"{e} at step {batch + 1} of epoch {epoch + 1}: training stopped there; "
                    f"try a lower --learning-rate than {recipe.optimizer.learning_rate:g}"
                ) from None
            state.step = step + 1
            done = StepResult(epoch, batch + 1, of_epoch, loss, correct, len(batches.whole))
            for hook in hooks:
                hook.after_step(state, done)
            for observer in observers:
                observer.after_step(state, epoch, batch + 1, of_epoch)
            stop = together.stop if together else interrupted and interrupted[0]
            if stop:
                raise Interrupted(stop)
        if together:
            together.close()
    for hook in hooks:
        hook.after_training(state)


@contextmanager
def _signals(patience: float = 0.0) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one ends at once.

    With `patience`, one within so many seconds counts as the first: torchrun passes on to its
    processes what they got from the terminal, too.

    At once means within a step, where weights and step number may not belong together: so it is no
    `Interrupted`, after which a checkpoint is written. The one before it stays.

    Outside the main thread, where Python allows no handlers, signals are left as they are.
    """
    received: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, _: object) -> None:
        nonlocal first
        if not received:
            received.append(signum)
            first = time.monotonic()
        elif time.monotonic() - first >= patience:
            raise SystemExit(128 + signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
