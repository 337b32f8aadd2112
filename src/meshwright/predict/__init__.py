"""Prediction: what a plan costs, from its programs alone."""
