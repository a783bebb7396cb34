"""What a run will need, before it begins: memory, operations, time."""
