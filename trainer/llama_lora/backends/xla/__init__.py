"""Backend xla: training on Trainium with optimum-neuron and NeuronX Distributed, on PyTorch/XLA."""
