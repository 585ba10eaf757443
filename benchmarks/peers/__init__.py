"""Everything that is timed: one module a peer, one function a entry."""
