"""What people call in Python: one verb or result a module."""
