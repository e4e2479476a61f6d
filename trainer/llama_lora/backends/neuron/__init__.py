"""The Neuron backend: training on AWS Trainium with optimum-neuron and NeuronX Distributed."""
