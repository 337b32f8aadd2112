"""The user's optimizer over a rank's shards, and what goes with it."""
