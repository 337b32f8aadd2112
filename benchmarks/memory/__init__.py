"""What ranks hold, against their bills."""
