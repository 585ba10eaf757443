"""Everything that draws or writes a page."""
