"""From a recipe to trained weights: step, loop, hooks, optimisers."""
