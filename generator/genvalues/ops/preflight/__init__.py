"""Checks, before anything is paid for, that AWS, the Hugging Face Hub and the cluster have what a run needs."""
