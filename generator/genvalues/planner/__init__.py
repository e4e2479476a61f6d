"""The plan of a run: layout, batch, memory, time and cost, each choice with its reason."""
