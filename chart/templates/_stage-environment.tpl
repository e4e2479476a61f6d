{{- /*
    What backend neuron needs in the environment of a pod: a map, empty for backend cpu. docs/neuron.md has the same as a
    table. Arguments: root, trains (compile and train, on the accelerator), compiles (compiles collected graphs on a CPU).

    Not here, because the libraries set it themselves, for each process (torch_xla 2.8 _internal/neuron.py, optimum-neuron
    0.4.5): NEURON_RT_VISIBLE_CORES (the local rank, which NEURON_RT_NUM_CORES would not overrule), NEURON_RT_ROOT_COMM_ID
    (MASTER_ADDR:62182, of torchrun), NEURON_PJRT_*, PJRT_DEVICE. Nor NEURON_RT_STOCHASTIC_ROUNDING_EN, off by default: the optimizer has fp32
    weights, and a resumed run would not equal another. Nor XLA_USE_BF16 and
    XLA_DOWNCAST_BF16: Neuron 2.24 was the last to know them, and weights are loaded in bf16 (Neuron docs: Migration from
    XLA_USE_BF16/XLA_DOWNCAST_BF16).
*/}}
{{- define "stage.neuronEnvironment" -}}
{{- $values := .root.Values }}
{{- $environment := dict }}
{{- if and (eq $values.backend "neuron") (or .trains .compiles) }}
{{- /* One cache for compile and train, on the volume (Neuron docs: Neuron Persistent Cache). */}}
{{- $_ := set $environment "NEURON_COMPILE_CACHE_URL" (printf "%s/compile-cache" $values.workspace.mountPath) }}
{{- /* Both in optimum-neuron's EKS tutorial for Llama 3 (docs/source/training_tutorials/amazon_eks); what they mean is in
       Neuron docs: Neuron Compiler CLI Reference Guide. */}}
{{- /* By default the compiler multiplies fp32 matrices in bf16 (Neuron docs: Mixed Precision and Performance-accuracy
       Tuning), and the angles of rotary positions are such a product: beyond 256 they would be those of other positions.
       The weights are in bf16 anyway. (optimum-neuron sets it too, in accelerate/utils/dataclasses.py, which we bypass.) */}}
{{- $flags := "--model-type=transformer --distribution-strategy=llm-training --auto-cast=none" }}
{{- if eq $values.neuron.target "trn2" }}
{{- /* Runtime and compiler must agree, and a node may have another default (Neuron docs: Logical NeuronCore configuration). */}}
{{- $_ := set $environment "NEURON_LOGICAL_NC_CONFIG" (int $values.neuron.logicalCoreSize | toString) }}
{{- $flags = printf "%s --logical-nc-config=%d" $flags (int $values.neuron.logicalCoreSize) }}
{{- end }}
{{- $_ := set $environment "NEURON_CC_FLAGS" $flags }}
{{- if .trains }}
{{- /* Another lowering of softmax, so another graph (Neuron docs: PyTorch NeuronX Environment Variables; optimum-neuron's
       tutorial Fine-Tune Llama 3 sets it, and the next one). */}}
{{- $_ := set $environment "NEURON_FUSE_SOFTMAX" "1" }}
{{- /* 3 and not more (Neuron docs: Neuron Runtime configuration). Of no effect from Neuron 2.31 on. */}}
{{- $_ := set $environment "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS" "3" }}
{{- /* glibc reads it when a process starts, before optimum-neuron sets it (Neuron docs, torch-neuronx release notes of
       2.26: Memory leaking in glibc; the number is optimum-neuron's). */}}
{{- $_ := set $environment "MALLOC_ARENA_MAX" "64" }}
{{- /* Between nodes alone: within one, the devices have their own links. (Neuron docs: How to prepare trn1.32xlarge for
       multi-node execution. FI_EFA_FORK_SAFE counts on kernels before 5.15, which Amazon Linux 2 has: without it they
       have no multi-node support. CCOM_SOCKET_IFNAME: aws-neuron-eks-samples, dp_bert_hf_pretrain/lib/trn1_dist_ddp.py;
       eth0 is a pod's own interface.) */}}
{{- if gt (int $values.parallelism.nodes) 1 }}
{{- $_ := mergeOverwrite $environment (dict
      "FI_PROVIDER" "efa"
      "FI_EFA_USE_DEVICE_RDMA" "1"
      "FI_EFA_FORK_SAFE" "1"
      "CCOM_SOCKET_IFNAME" "eth0") }}
{{- end }}
{{- else }}
{{- /* Of the nodes that will train: here is no device to ask (optimum-neuron, utils/instance.py; the same in Neuron docs:
       NKI, Quickstart). No compiler flag, because flags are part of the cache's key. */}}
{{- $_ := set $environment "NEURON_PLATFORM_TARGET_OVERRIDE" $values.neuron.target }}
{{- end }}
{{- end }}
{{- toYaml $environment }}
{{- end }}
