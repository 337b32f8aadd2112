"""Starting worlds: the contract, the local supervisor, the worker's end of it."""
