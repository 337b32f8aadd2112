"""The data of a job: which samples a step takes, read and collated."""
