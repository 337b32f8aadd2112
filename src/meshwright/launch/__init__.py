"""Starting ranks, the contract between them, and what is said when one fails."""
