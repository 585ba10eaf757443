"""The sizes of pictures that the software chooses from."""

SIZES = (32, 64, 96, 128)  # pixels a side
USUAL = 64  # the largest that is taken unasked; more takes more time, which `--minutes` knows
