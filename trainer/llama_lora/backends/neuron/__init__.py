"""The Neuron backend: optimum-neuron's trainer on Trainium."""
