{{- /*
    Environment variables of a pod on Trainium, as a map; empty on CPUs. docs/pods.md has a table of them.
    Arguments: root, trains (compile and train, on the accelerator), compiles (compiles collected graphs on a CPU).
*/}}
{{- define "stage.neuronEnvironment" -}}
{{- if eq .root.Values.backend "xla" }}
{{- include "stage.neuronEnvironment.xla" . }}
{{- else if and .trains (eq (include "llama-lora.device" .root) "neuron") }}
{{- include "stage.neuronEnvironment.native" . }}
{{- end }}
{{- end }}

{{- /*
    Backend native, in compile and train. RTD is https://awsdocs-neuron.readthedocs-hosted.com/en/latest.

    Not set here: NEURON_RT_VISIBLE_CORES. TorchNeuron sets it to the local rank in each worker of torchrun, and would take a
    value of the pod for that of every worker (RTD/torch/guides/torch-distributed.html).
*/}}
{{- define "stage.neuronEnvironment.native" -}}
{{- $values := .root.Values }}
{{- $environment := dict }}
{{- /* Compiled graphs: on the volume, for all nodes and for later runs; lock files stay on the node. The defaults are folders of
       the container (RTD/torch/reference/env-vars.html). */}}
{{- $_ := set $environment "TORCH_NEURONX_NEFF_CACHE_DIR" (printf "%s/neff-cache" $values.workspace.mountPath) }}
{{- $_ := set $environment "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR" "/tmp/neff-cache" }}
{{- /* NKI kernels (RTD/nki). Their NEFFs are in the cache above, so this one need not outlive the pod. */}}
{{- $_ := set $environment "NKI_COMPILE_CACHE_URL" "/tmp/nki-cache" }}
{{- /* An error rather than slow work on the CPU: a graph that cannot be compiled is not run operator by operator, and an
       operator that fails on the device is not repeated on the CPU (RTD/torch/reference/env-vars.html). Operators that the device
       does not have still run on the CPU: compile.onFallback. */}}
{{- $_ := set $environment "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION" "1" }}
{{- $_ := set $environment "TORCH_NEURONX_FALLBACK_ONLY_FOR_UNIMPLEMENTED_OPS" "1" }}
{{- /* Round to nearest even: a resumed run must not differ (RTD/about-neuron/arch/neuron-features/rounding-modes.html). */}}
{{- $_ := set $environment "NEURON_RT_STOCHASTIC_ROUNDING_EN" "0" }}
{{- /* Seconds that an execution may take, and so that a collective may wait for a node that still compiles or loads its graph.
       600 is the default on trn1. That of trn2, 30, is shorter than the compilation of a layer
       (RTD/neuron-runtime/guides/configuration-guide.html). */}}
{{- $_ := set $environment "NEURON_RT_EXEC_TIMEOUT" "600" }}
{{- /* Runtime and compiler must use the same size, and a node may have another default
       (RTD/about-neuron/arch/neuron-features/logical-neuroncore-config.html). */}}
{{- $_ := set $environment "NEURON_LOGICAL_NC_CONFIG" (int $values.neuron.logicalCoreSize | toString) }}
{{- if gt (int $values.parallelism.nodes) 1 }}
{{- $environment = merge $environment (include "stage.neuronEnvironment.efa" . | fromYaml) }}
{{- end }}
{{- toYaml $environment }}
{{- end }}

{{- /* Only between nodes; within a node the devices have direct links. Source: Neuron docs, How to prepare trn1.32xlarge for
       multi-node execution. FI_EFA_FORK_SAFE is required by kernels before 5.15, as in Amazon Linux 2.
       CCOM_SOCKET_IFNAME: aws-neuron-eks-samples, dp_bert_hf_pretrain/lib/trn1_dist_ddp.py; eth0 is the pod's interface. */}}
{{- define "stage.neuronEnvironment.efa" -}}
FI_PROVIDER: efa
FI_EFA_USE_DEVICE_RDMA: "1"
FI_EFA_FORK_SAFE: "1"
CCOM_SOCKET_IFNAME: eth0
{{- end }}

{{- /*
    Backend xla.

    Not set here:
    - NEURON_RT_VISIBLE_CORES (the local rank; takes precedence over NEURON_RT_NUM_CORES), NEURON_RT_ROOT_COMM_ID
      (torchrun's MASTER_ADDR:62182), NEURON_PJRT_*, PJRT_DEVICE: the libraries set them in each process (torch_xla 2.8
      _internal/neuron.py, optimum-neuron 0.4.5).
    - NEURON_RT_STOCHASTIC_ROUNDING_EN, off by default: the optimizer has fp32 weights, and a resumed run would differ.
    - XLA_USE_BF16, XLA_DOWNCAST_BF16: last supported by Neuron 2.24, and the weights are loaded in bf16 (Neuron docs:
      Migration from XLA_USE_BF16/XLA_DOWNCAST_BF16).
*/}}
{{- define "stage.neuronEnvironment.xla" -}}
{{- $values := .root.Values }}
{{- $environment := dict }}
{{- if or .trains .compiles }}
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
{{- if gt (int $values.parallelism.nodes) 1 }}
{{- $environment = merge $environment (include "stage.neuronEnvironment.efa" . | fromYaml) }}
{{- end }}
{{- else }}
{{- /* The type of the nodes that train, because this node has no device to detect it from (optimum-neuron,
       utils/instance.py; Neuron docs: NKI, Quickstart). Not a compiler flag, because flags are part of the cache key. */}}
{{- $_ := set $environment "NEURON_PLATFORM_TARGET_OVERRIDE" $values.neuron.target }}
{{- end }}
{{- end }}
{{- toYaml $environment }}
{{- end }}
