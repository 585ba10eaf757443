"""What the layers of a network see during a training."""
