"""State that rests outside the device's memory: tiers, and what streams through them."""
