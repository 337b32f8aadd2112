"""Running a plan: steps, data, optimizer, checkpoints, verification."""
