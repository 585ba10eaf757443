"""Search what lies in a file of PyTorch for state dicts and modules, whatever the key."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from normlab.core.pickles import MAX_KEY, Pairs, Unbuilt, array_in
from normlab.errors import DataError
from normlab.formats.torch_tensors import LARGEST, Leaf, Odd, Tensor

MAX_DEPTH = 100  # dictionaries in dictionaries, and modules in modules
MAX_PASSED_OVER = 20  # things beside the weights that are named

_OLD_PARAMETERS = {"torch.nn.parameter Parameter", "torch.autograd.variable Variable"}
_PARAMETER_NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(eq=False)
class Part:
    """Weights that belong together, before any array is made."""

    place: str
    entries: dict[str, Leaf]
    settings: dict[str, dict[str, float | None]] = field(default_factory=dict)


def looks_like_weights(part: Part) -> bool:
    """Whether the names are those of layers; a score beside the weights may be a tensor, too."""
    return bool(part.settings) or any(
        name in _PARAMETER_NAMES
        or name.endswith(("running_var", "moving_variance", "moving_var"))
        or ("." in name and getattr(leaf, "size", None) != ())
        for name, leaf in part.entries.items()
    )


_Found = Iterator[tuple[str, Any]]


class Search:
    """Looks for state dicts and modules in whatever lies in a file, each thing once."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.passed_over: dict[str, str] = {}  # by place
        self.modules: dict[int, bool] = {}  # by the id of the state, which many objects may share
        self.more = 0
        self.seen: set[int] = set()

    def told(self) -> tuple[str, ...]:
        """What was passed over, in words."""
        more = [f"{self.more:,} more objects"] if self.more else []
        told = (
            f"{place or 'the file itself'} ({what})" for place, what in self.passed_over.items()
        )
        return (*told, *more)

    def pass_over(self, place: str, what: str) -> None:
        """Note something that stays unbuilt, and not what lies inside it."""
        if any(place == p or place.startswith(f"{p}.") for p in self.passed_over):
            return
        if len(self.passed_over) < MAX_PASSED_OVER:
            self.passed_over[place] = what
        else:
            self.more += 1

    def run(self, value: Any) -> None:
        path: list[_Found] = [iter([("", value)])]  # iterators: only one line of places is kept
        while path:
            place, item = next(path[-1], (None, None))
            if place is None:
                path.pop()
            elif id(item) not in self.seen and isinstance(item, list | tuple | Unbuilt):
                if len(path) > MAX_DEPTH:
                    self.pass_over(place, f"more than {MAX_DEPTH} levels deep")
                    continue
                self.seen.add(id(item))
                path.append(self.look(place, item))

    def look(self, place: str, item: Any) -> _Found:
        """Note what `item` is; what it holds that may hold weights in its turn."""
        if isinstance(item, Unbuilt):
            if self.is_module(item):
                part = self.module(place, item)
                self.parts += [part] if part.entries else []
                return
            if leaf_in(item) is None:
                self.pass_over(place, item.name.replace(" ", "."))
                yield from (
                    (place, x) for x in (item.arguments, item.state, item.items, item.pairs)
                )
        elif isinstance(item, Pairs):
            known = {key: x for key, x in item if isinstance(key, str) and len(key) <= MAX_KEY}
            if {"state", "param_groups"} <= known.keys():
                self.pass_over(place, "an optimiser's state")
                return
            entries = {key: leaf for key, x in known.items() if (leaf := leaf_in(x))}
            if entries:
                self.parts.append(Part(place, entries))
            for i, (key, x) in enumerate(item):
                yield _joined(place, key if isinstance(key, str) and key in known else str(i)), x
        else:
            yield from ((_joined(place, str(i)), x) for i, x in enumerate(item))

    def module(self, place: str, root: Unbuilt) -> Part:
        """The weights in a module and the modules inside it, by their names in a state dict."""
        part = Part(place, {})
        waiting = [("", root, 0)]
        while waiting:
            name, module, depth = waiting.pop()
            if depth > MAX_DEPTH:
                self.pass_over(_joined(place, name), f"more than {MAX_DEPTH} levels deep")
                continue
            self.seen.add(id(module))
            inside = []
            for key, x in self.attributes(module):
                leaf = leaf_in(x)
                if leaf is not None:
                    part.entries[_joined(name, key)] = leaf
                elif isinstance(x, Unbuilt) and self.is_module(x) and id(x) not in self.seen:
                    inside.append((_joined(name, key), x, depth + 1))
                elif x is None or (type(x) in (int, float, bool) and abs(x) < LARGEST):
                    part.settings.setdefault(name, {})[key] = x
            waiting += reversed(inside)
        return part

    def is_module(self, item: Unbuilt) -> bool:
        """Whether it is a `torch.nn.Module` or one of TorchScript."""
        if item.name.startswith("__torch__"):
            return True
        state = item.state
        if not isinstance(state, Pairs):
            return False
        if id(state) not in self.modules:
            names = {key for key, _ in state if isinstance(key, str)}
            self.modules[id(state)] = {"_parameters", "_buffers", "_modules"} <= names
        return self.modules[id(state)]

    def attributes(self, module: Unbuilt) -> _Found:
        """Parameters, buffers, modules and settings; TorchScript keeps them all side by side.

        A dictionary that belongs to several modules is looked through once.
        """
        for key, x in self.once(module.state):
            if key in ("_parameters", "_buffers", "_modules") and isinstance(x, Pairs):
                yield from self.once(x)
            else:
                yield key, x

    def once(self, pairs: Any) -> _Found:
        if isinstance(pairs, Pairs) and id(pairs) not in self.seen:
            self.seen.add(id(pairs))
            yield from ((k, v) for k, v in pairs if isinstance(k, str) and len(k) <= MAX_KEY)


def leaf_in(value: Any) -> Leaf | None:
    """A tensor or an array, if it is one."""
    if isinstance(value, Tensor | Odd):
        return value
    if isinstance(value, Unbuilt):
        if value.name in _OLD_PARAMETERS and isinstance(value.state, tuple) and value.state:
            return value.state[0] if isinstance(value.state[0], Tensor | Odd) else None
        return array_in(value)
    return None


def _joined(place: str, key: str) -> str:
    """
    Raises:
        DataError: such a name is no network's, and many of them would fill the memory.
    """
    if len(place) + len(key) > MAX_KEY:
        raise DataError(f"a name in it has more than {MAX_KEY:,} characters")
    return f"{place}.{key}" if place else key
