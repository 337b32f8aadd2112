"""The computation as plain data, its layouts, and the passes over it. No torch here."""
