"""CIFAR-10: where it comes from and the layouts in which people have it."""
