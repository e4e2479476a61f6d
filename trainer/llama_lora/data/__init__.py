"""Sources of models and datasets, and the way from dataset rows to batches of packed token rows."""
