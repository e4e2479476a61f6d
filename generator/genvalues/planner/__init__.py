"""What a run would be, before a node is asked for: layout, batch, memory, time and dollars, each with its reason."""
