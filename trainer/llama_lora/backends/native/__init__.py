"""Backend native: one engine in standard PyTorch for the CPU, CUDA and Trainium 2 and later (TorchNeuron)."""
