"""The sizes of pictures that the software chooses from."""

SIZES = (32, 64)  # pixels a side
