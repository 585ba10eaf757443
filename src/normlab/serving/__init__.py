"""A page and an HTTP interface to try a model on: `normlab serve`."""
