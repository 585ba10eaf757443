"""What every other room stands on: processes, files, the environment."""
