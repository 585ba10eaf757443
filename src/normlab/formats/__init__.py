"""Files of other libraries: one reader each."""
