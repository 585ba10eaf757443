"""A network whose passes are noted at one step, and made again with little Python at later ones.

A step of a small batch spends some of its time between its passes, in Python and PyTorch, whose
code is out of the processor's caches each time. Where forward and backward are compiled passes and
nothing else, the same calls with the same addresses do the same again, as a CUDA graph does
(`torch.cuda.make_graphed_callables`).
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from normlab.kernels.layouts import like
from normlab.kernels.library import Call, enabled, noted
from normlab.layers.dropout import new_key
from normlab.models import FastNet

MOST_KEYS = 64  # of dropout, that a step may draw
UNSEEN = {"read", "adam"}  # kernels that are given addresses, not the tensors they belong to

Body = Callable[[Tensor, np.random.Generator], Tensor]
KNOWN = ("normlab.", "torch.")  # where the classes are from that `Captured` was tested with


def holds_only_known(model: nn.Module, *others: object) -> bool:
    """Whether `model`, and the hooks and observers beside it, are of this package or PyTorch's.

    Others may freeze a layer, set its rate, put another one in its place, keep gradients that the
    next step writes over, or compute with numbers that change after the second step.
    """
    classes = {type(o) for o in (*model.modules(), *others)}
    replaced = any("forward" in vars(m) for m in model.modules())
    return not replaced and all(c.__module__.startswith(KNOWN) for c in classes)


class Captured:
    """`model` in training, by calls that were noted before where that gives the same bits.

    The first batch of a shape is the model's own, and its calls are noted. With the second they are
    made beside the model's own, after all memory between them was filled with NaN. If they fill it
    again, and answers, gradients and buffers have the same bits, they stand for the model from then
    on. Whenever something else looks on (a hook, a compiler, `kernels.disabled`), the model itself
    is asked.

    Of the fast networks, whose last layer is PyTorch's, calls stand for all before it.

    What a call returns, and each gradient, holds until the next one; there is one backward pass.
    In between, the model changes by its own passes and by optimisers, in place;
    `holds_only_known` says where nothing else can happen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._body: Body = model
        self._head: Callable[[Tensor], Tensor] | None = None
        if isinstance(model, FastNet):
            self._body, self._head = model.features, model.classify
        self._state = [*model.parameters(), *model.buffers()]
        self._hooks: list[Any] = [
            hooks
            for module in model.modules()
            for hooks in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._backward_pre_hooks,
                module._backward_hooks,
            )
        ]
        self._passes: dict[Any, _Passes] = {}

    def __call__(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Logits (N, K) of `x` (N, 3, H, W)."""
        if self._is_watched() or not self.model.training or not x.is_cpu or x.requires_grad:
            return self.model(x, rng)  # type: ignore[no-any-return]
        addresses = [t.data_ptr() for t in self._state]
        key = x.shape, x.stride(), torch.get_num_threads(), *addresses
        if key not in self._passes:
            self._passes[key] = _Passes(self.model, self._body)
        answer = self._passes[key].answer_to(x, rng)
        return answer if self._head is None else self._head(answer)

    def _is_watched(self) -> bool:
        return (
            any(self._hooks)
            or _has_any_global_hook()  # type: ignore[no-untyped-call]
            or any(t._backward_hooks or t._post_accumulate_grad_hooks for t in self._state)
            or not (enabled() and torch.is_grad_enabled())
        )


class _Passes:
    """A forward and a backward of a network's `body` for batches that lie alike."""

    def __init__(self, model: nn.Module, body: Body) -> None:
        self.body = body
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = list(model.buffers())
        # Addresses of what is not theirs: parameters, buffers, and what they were given.
        self.foreign = {t.data_ptr() for t in (*model.parameters(), *self.buffers)}
        self.anchor = torch.zeros((), requires_grad=True)
        self.trusted = self.refused = False
        self.forward, self.backward = _Tape(), _Tape()
        self.keys = 0  # of dropout, that a step draws
        self.own: Tensor | None = None  # the body's answer, of which a backward is to come
        self.answer = self.anchor  # what `forward` writes
        self.grads: Sequence[Tensor] = ()  # what `backward` writes

    def answer_to(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        if self.refused:
            return self.body(x, rng)
        if self.trusted:
            self._replay(x, rng)
        else:
            own = self._try(x, rng) if self.backward.calls else self._note(x, rng)
            if self.refused:
                return own
            self.own = own
        answer: Tensor = _Answer.apply(self.anchor, self, x)  # type: ignore[no-untyped-call]
        return answer

    def _note(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        before = copy.deepcopy(rng)
        with noted() as calls:
            own = self.body(x, rng)
        keys = _keys_drawn(before, rng)
        self.keys, self.answer = len(keys), own.detach()
        self.forward = _Tape(calls, [x.data_ptr(), *keys])
        self.foreign.add(x.data_ptr())
        learns = own.requires_grad  # otherwise the body is frozen, and there is nothing to save
        self._judge(learns and self.forward.has_all(self.keys + 1) and self.forward.wrote([own]))
        return own

    def _replay(self, x: Tensor, rng: np.random.Generator) -> None:
        self.forward.replay([x.data_ptr(), *[new_key(rng) for _ in range(self.keys)]])

    def _try(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        before = [b.clone() for b in self.buffers]
        wiped = self.forward.wipe(self.foreign | {x.data_ptr()})
        self._replay(x, copy.deepcopy(rng))
        filled = _give_back(wiped)
        replayed = [v.clone() for v in (self.answer, *self.buffers)]
        for b, value in zip(self.buffers, before, strict=True):
            b.copy_(value)
        own = self.body(x, rng)
        self._judge(filled and _same(replayed, [own, *self.buffers]))
        return own

    def gradients(self, x: Tensor, g: Tensor) -> Sequence[Tensor]:
        """Those of `parameters`, from that of the answer, `g`."""
        g = like(g, self.answer)
        new = [g.data_ptr(), x.data_ptr()]
        if self.own is None:
            self.backward.replay(new)
            return self.grads
        if not self.backward.calls:
            with noted() as calls:
                found = _gradients(self.own, g, self.parameters)
            self.parameters = [
                p for p, v in zip(self.parameters, found, strict=True) if v is not None
            ]
            grads = [v for v in found if v is not None]
            self.backward, self.grads = _Tape(calls, new), grads
            self.foreign.add(g.data_ptr())
            self._judge(self.backward.has_all(1) and self.backward.wrote(grads))
        else:
            wiped = self.backward.wipe(self.foreign | self.forward.addresses | {*new})
            self.backward.replay(new)
            filled = _give_back(wiped)
            replayed = [v.clone() for v in self.grads]
            grads = [v for v in _gradients(self.own, g, self.parameters) if v is not None]
            self.trusted = filled and _same(replayed, grads)
            self._judge(self.trusted)
        self.own = None
        return grads

    def _judge(self, good: bool) -> None:
        if not good:
            self.refused = True
            self.forward, self.backward, self.answer, self.grads = _Tape(), _Tape(), self.anchor, ()


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, passes: _Passes, x: Tensor) -> Tensor:
        ctx.passes, ctx.x = passes, x
        return (passes.answer if passes.own is None else passes.own).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        passes = ctx.passes
        # What is there may be the memory that is written to next.
        before = {p: p.grad.clone() for p in passes.parameters if p.grad is not None}
        grads = passes.gradients(ctx.x, g)
        for p, grad in zip(passes.parameters, grads, strict=True):
            p.grad = before[p] + grad if p in before else grad
        return None, None, None


class _Seed(torch.autograd.Function):
    """A number whose gradient with respect to `answer` is `g`."""

    @staticmethod
    def forward(ctx: Any, answer: Tensor, g: Tensor) -> Tensor:
        ctx.g = g
        return answer.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.g, None


def _gradients(
    answer: Tensor, g: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad` with `grad_outputs`, for which it would import SymPy."""
    with torch.enable_grad():  # it is off inside of a backward
        number: Tensor = _Seed.apply(answer, g)  # type: ignore[no-untyped-call]
    return torch.autograd.grad(number, parameters, allow_unused=True)


class _Tape:
    """Calls to be made again, each with what is new in a step in its places."""

    def __init__(self, calls: Sequence[Call] = (), new: Sequence[int] = ()) -> None:
        self.calls = calls
        self.places = [
            [(i, new.index(v)) for i, v in enumerate(c.values) if type(v) is int and v in new]
            for c in calls
        ]
        pairs = zip(calls, self.places, strict=True)
        self.again = [(c if places else c.ready(), c.values, places) for c, places in pairs]
        self.addresses = {t.data_ptr() for c in calls for t in c.tensors}

    def has_all(self, count: int) -> bool:
        """Whether the first `count` of what is new have a place, and all memory has an owner."""
        found = {k for places in self.places for _, k in places}
        return found.issuperset(range(count)) and not any(c.name in UNSEEN for c in self.calls)

    def wrote(self, results: Iterable[Tensor]) -> bool:
        """Whether each of the `results` is a tensor of the calls'."""
        return all(v.data_ptr() in self.addresses for v in results)

    def replay(self, new: Sequence[int]) -> None:
        for call, values, places in self.again:
            for i, k in places:
                values[i] = new[k]
            call()

    def wipe(self, but: set[int]) -> list[tuple[Tensor, Tensor]]:
        """Fill all memory but that at some addresses with NaN; returns it, and what was there."""
        ours = [t.detach() for c in self.calls for t in c.tensors if t.data_ptr() not in but]
        wiped = [(t, t.clone()) for t in ours if t.is_floating_point()]
        for t, _ in wiped:
            t.fill_(math.nan)
        return wiped


def _give_back(wiped: list[tuple[Tensor, Tensor]]) -> bool:
    """Give what no call has filled again its values; returns whether there was none."""
    lost = [(t, value) for t, value in wiped if t.isnan().all()]
    for t, value in lost:
        t.copy_(value)
    return not lost


def _keys_drawn(before: np.random.Generator, after: np.random.Generator) -> list[int]:
    """Which keys of dropout were drawn, if it was keys; too many if it was something else."""
    keys: list[int] = []
    end = pickle.dumps(after.bit_generator.state)
    while len(keys) < MOST_KEYS and pickle.dumps(before.bit_generator.state) != end:
        keys.append(new_key(before))
    return keys


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
