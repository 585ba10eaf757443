"""A training that is interrupted after a number of steps, as Ctrl-C would."""

import os
import signal

from normlab.training.state import Plan, State


class StopAfter:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def before_training(self, plan: Plan) -> None:
        pass

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if state.step == self.steps:
            os.kill(os.getpid(), signal.SIGINT)
