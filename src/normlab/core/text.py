"""English for figures."""


def counted(n: int, noun: str) -> str:
    """
    >>> counted(1, "pair"), counted(1407, "step")
    ('1 pair', '1,407 steps')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
