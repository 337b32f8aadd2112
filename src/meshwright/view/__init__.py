"""What people see: the terminal display, the tables and the report of a run. No torch here."""
