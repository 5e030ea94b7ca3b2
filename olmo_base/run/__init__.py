"""What every run has, whatever its stage: a recipe, a folder, checkpoints, metrics, a device."""
