"""People's own pictures: found, read, decoded and turned into images."""
