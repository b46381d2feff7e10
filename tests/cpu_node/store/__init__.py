"""The store of kept translations."""
