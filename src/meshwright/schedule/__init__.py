"""The order of a pipeline's work: schedules as values, made by pure functions."""
