"""From the user's code to a program, and from a program to callables. Torch's graphs stay here."""
