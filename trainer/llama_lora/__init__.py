"""llama_lora: the pipeline's stages, one module each. Knows the run config and the workspace, nothing of Kubernetes."""
