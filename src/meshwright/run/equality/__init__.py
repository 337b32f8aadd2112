"""A plan's numbers against one device's."""
