"""Names of the two nodes that every machine has. Imports nothing: a restore starts with it."""

CPU, MEMORY = "cpu0", "memory"
