"""People's own pictures: found, read, decoded and turned into images."""

from normlab.data.pictures.reading import read_picture as read_picture
