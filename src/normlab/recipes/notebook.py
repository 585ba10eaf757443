"""The seed notebook's training, and its twin."""

from normlab.recipes.record import Recipe


def notebook() -> Recipe:
    """The seed notebook as its author wrote it: 25 epochs of Adam in batches of 32.

    Test accuracy 0.7887 ± 0.0017 (standard deviation over seeds), n = 6, on 2 cores of an Intel
    Xeon; the notebook itself, once: 0.7896. docs/benchmarks.md has its time.

        normlab compare notebook --arms batch,none --seeds 6
    """
    return Recipe(name="notebook")


def notebook_plain() -> Recipe:
    """The notebook's twin without batch normalisation; the same as `notebook --norm none`.

    Test accuracy 0.7438 ± 0.0029, n = 6, by the command of `notebook`.
    """
    return notebook().override(norm="none")
