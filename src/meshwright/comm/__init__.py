"""Requests that generators yield, and the drivers that perform them."""
