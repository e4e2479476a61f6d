{{- /*
    Environment variables of a pod for backend neuron, as a map; empty for backend cpu. docs/neuron.md has a table of them.
    Arguments: root, trains (compile and train, on the accelerator), compiles (compiles collected graphs on a CPU).

    Not set here:
    - NEURON_RT_VISIBLE_CORES (the local rank; takes precedence over NEURON_RT_NUM_CORES), NEURON_RT_ROOT_COMM_ID
      (torchrun's MASTER_ADDR:62182), NEURON_PJRT_*, PJRT_DEVICE: the libraries set them in each process (torch_xla 2.8
      _internal/neuron.py, optimum-neuron 0.4.5).
    - NEURON_RT_STOCHASTIC_ROUNDING_EN, off by default: the optimizer has fp32 weights, and a resumed run would differ.
    - XLA_USE_BF16, XLA_DOWNCAST_BF16: last supported by Neuron 2.24, and the weights are loaded in bf16 (Neuron docs:
      Migration from XLA_USE_BF16/XLA_DOWNCAST_BF16).
*/}}
{{- define "stage.neuronEnvironment" -}}
{{- $values := .root.Values }}
{{- $environment := dict }}
{{- if and (eq $values.backend "neuron") (or .trains .compiles) }}
{{- /* One cache for compile and train, on the volume (Neuron docs: Neuron Persistent Cache). */}}
{{- $_ := set $environment "NEURON_COMPILE_CACHE_URL" (printf "%s/compile-cache" $values.workspace.mountPath) }}
{{- /* --model-type and --distribution-strategy are those of optimum-neuron's EKS tutorial for Llama 3
       (docs/source/training_tutorials/amazon_eks), described in Neuron docs: Neuron Compiler CLI Reference Guide. */}}
{{- /* --auto-cast=none: by default the compiler multiplies fp32 matrices in bf16 (Neuron docs: Mixed Precision and
       Performance-accuracy Tuning). The angles of rotary position embeddings are such a product, and bf16 cannot
       represent positions above 256 exactly. The weights are in bf16 anyway. optimum-neuron sets the flag in
       accelerate/utils/dataclasses.py, which this trainer does not use. */}}
{{- $flags := "--model-type=transformer --distribution-strategy=llm-training --auto-cast=none" }}
{{- if eq $values.neuron.target "trn2" }}
{{- /* Runtime and compiler must use the same size, and a node may have another default (Neuron docs: Logical NeuronCore
       configuration). */}}
{{- $_ := set $environment "NEURON_LOGICAL_NC_CONFIG" (int $values.neuron.logicalCoreSize | toString) }}
{{- $flags = printf "%s --logical-nc-config=%d" $flags (int $values.neuron.logicalCoreSize) }}
{{- end }}
{{- $_ := set $environment "NEURON_CC_FLAGS" $flags }}
{{- if .trains }}
{{- /* Changes the lowering of softmax, and so the graph (Neuron docs: PyTorch NeuronX Environment Variables). This and the
       next one are set in optimum-neuron's tutorial Fine-Tune Llama 3. */}}
{{- $_ := set $environment "NEURON_FUSE_SOFTMAX" "1" }}
{{- /* 3 is the maximum (Neuron docs: Neuron Runtime configuration). Ignored since Neuron 2.31. */}}
{{- $_ := set $environment "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS" "3" }}
{{- /* glibc reads it when the process starts, before optimum-neuron could set it (Neuron docs, torch-neuronx release notes
       of 2.26: Memory leaking in glibc; the value is optimum-neuron's). */}}
{{- $_ := set $environment "MALLOC_ARENA_MAX" "64" }}
{{- /* Only between nodes; within a node the devices have direct links. Source: Neuron docs, How to prepare trn1.32xlarge
       for multi-node execution. FI_EFA_FORK_SAFE is required by kernels before 5.15, as in Amazon Linux 2.
       CCOM_SOCKET_IFNAME: aws-neuron-eks-samples, dp_bert_hf_pretrain/lib/trn1_dist_ddp.py; eth0 is the pod's interface. */}}
{{- if gt (int $values.parallelism.nodes) 1 }}
{{- $_ := mergeOverwrite $environment (dict
      "FI_PROVIDER" "efa"
      "FI_EFA_USE_DEVICE_RDMA" "1"
      "FI_EFA_FORK_SAFE" "1"
      "CCOM_SOCKET_IFNAME" "eth0") }}
{{- end }}
{{- else }}
{{- /* The type of the nodes that train, because this node has no device to detect it from (optimum-neuron,
       utils/instance.py; Neuron docs: NKI, Quickstart). Not a compiler flag, because flags are part of the cache key. */}}
{{- $_ := set $environment "NEURON_PLATFORM_TARGET_OVERRIDE" $values.neuron.target }}
{{- end }}
{{- end }}
{{- toYaml $environment }}
{{- end }}
