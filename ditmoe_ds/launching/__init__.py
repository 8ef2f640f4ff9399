"""Starting a recipe on many nodes, and finding out beforehand what would go wrong."""
