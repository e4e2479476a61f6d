{{- /*
    What the schema cannot say, because it spans keys. All mistakes at once, each with its key and its fix.
    (`helm lint` renders without failing here, so the chart's bare defaults, which lack a model and a dataset, lint.)
*/}}
{{- define "llama-lora.validations" -}}
{{- $mistakes := list }}
{{- range $check := list "model" "dataset" "training" "parallelism" "devices" "neuron" "guards" "storage" "workspace" "names" "secrets" "stages" }}
{{- $found := include (printf "llama-lora.validations.%s" $check) $ | trim }}
{{- if $found }}
{{- $mistakes = concat $mistakes (splitList "\n" $found) }}
{{- end }}
{{- end }}
{{- if $mistakes }}
{{- fail (printf "these values cannot work:\n\n  %s\n" (join "\n  " $mistakes)) }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.model" -}}
{{- $model := .Values.model }}
{{- if and $model.id $model.path }}
model.id and model.path are both set. Keep one: model.id for the Hugging Face Hub, model.path for files.
{{- else if not (or $model.id $model.path) }}
model.id is empty. Set it, e.g. --set model.id=meta-llama/Meta-Llama-3.1-8B, or model.path.
{{- end }}
{{- if and $model.path $model.revision }}
model.revision is set, but a model.path has no revisions. Remove model.revision.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.dataset" -}}
{{- $dataset := .Values.dataset }}
{{- if not $dataset.source }}
dataset.source is empty. Set it, e.g. --set dataset.source=databricks/databricks-dolly-15k.
{{- end }}
{{- if and (regexMatch "\\.(jsonl|json|csv|parquet|txt)$" $dataset.source) (not (regexMatch "^(/|s3://)" $dataset.source)) }}
dataset.source {{ $dataset.source }} is a relative path, and pods cannot see this computer's files. Put the file on the volume and give its absolute path there, e.g. {{ .Values.workspace.mountPath }}/{{ base $dataset.source }}.
{{- end }}
{{- if not $dataset.format }}
dataset.format is empty. Set it to text, instruction, prompt-completion or chat.
{{- end }}
{{- if and .Values.evaluation.enabled (not $dataset.evalFraction) }}
evaluation.enabled is true, but dataset.evalFraction 0 holds no rows out. Raise dataset.evalFraction, or set evaluation.enabled to false.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.training" -}}
{{- $training := .Values.training }}
{{- if eq $training.attention "flash" }}
{{- if eq .Values.backend "cpu" }}
training.attention is flash, which backend cpu does not have. Set it to eager.
{{- else if mod $training.maxSequenceLength 2048 }}
training.maxSequenceLength {{ $training.maxSequenceLength }} is no multiple of 2048, which training.attention flash needs. Set it to {{ mul 2048 (add 1 (div $training.maxSequenceLength 2048)) }}, or training.attention to eager.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.parallelism" -}}
{{- $layout := .Values.parallelism }}
{{- $processes := mul $layout.nodes $layout.processesPerNode }}
{{- $copies := mul $layout.tensorParallelSize $layout.dataParallelSize }}
{{- if ne $processes $copies }}
{{- $fix := printf "Set parallelism.dataParallelSize to %d" (div $processes $layout.tensorParallelSize) }}
{{- if mod $processes $layout.tensorParallelSize }}
{{- $fix = printf "Make parallelism.tensorParallelSize a divisor of %d" $processes }}
{{- end }}
parallelism.nodes * parallelism.processesPerNode = {{ $processes }} processes, but parallelism.tensorParallelSize * parallelism.dataParallelSize = {{ $copies }}. {{ $fix }}.
{{- end }}
{{- if and (eq .Values.backend "cpu") (gt (int $layout.tensorParallelSize) 1) }}
parallelism.tensorParallelSize is {{ $layout.tensorParallelSize }}, but backend cpu is data parallel only. Set it to 1, or backend to neuron.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.devices" -}}
{{- if eq .Values.backend "neuron" }}
{{- if not (hasKey .Values.devices "aws.amazon.com/neuron") }}
devices has no aws.amazon.com/neuron, which backend neuron needs. Set devices to those of one node, for trn1.32xlarge {aws.amazon.com/neuron: 16, vpc.amazonaws.com/efa: 8}.
{{- end }}
{{- if eq .Values.instance "cpu" }}
instance is cpu, but backend is neuron. Set instance to the nodes' type, e.g. ml.trn1.32xlarge, or backend to cpu.
{{- end }}
{{- end }}
{{- range $device := list "aws.amazon.com/neurondevice" "aws.amazon.com/neuroncore" }}
{{- if hasKey $.Values.devices $device }}
devices.{{ $device }} is not what the Neuron device plugin offers whole nodes by. Use aws.amazon.com/neuron.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.neuron" -}}
{{- if eq .Values.backend "neuron" }}
{{- $neuron := .Values.neuron }}
{{- $generation := regexFind "trn[0-9]" .Values.instance }}
{{- if and $generation (ne $generation $neuron.target) }}
neuron.target is {{ $neuron.target }}, but instance is {{ .Values.instance }}. Set neuron.target to {{ $generation }}{{ if eq $generation "trn2" }}, and neuron.logicalCoreSize to 2{{ end }}.
{{- else if and (eq $neuron.target "trn1") (ne (int $neuron.logicalCoreSize) 1) }}
neuron.logicalCoreSize is {{ $neuron.logicalCoreSize }}, but neuron.target trn1 has cores of one only. Set it to 1.
{{- end }}
{{- if and (gt (int .Values.parallelism.nodes) 1) (not (hasKey .Values.devices "vpc.amazonaws.com/efa")) }}
devices has no vpc.amazonaws.com/efa, without which {{ .Values.parallelism.nodes }} nodes (parallelism.nodes) cannot train together. Set it to the number that one node has, or parallelism.nodes to 1.
{{- end }}
{{- include "llama-lora.validations.neuron.environment" . }}
{{- end }}
{{- end }}

{{- /* What a user's environment must not change, or must change in both stages: a graph that train builds otherwise than
       compile did is compiled while the accelerator waits. */}}
{{- define "llama-lora.validations.neuron.environment" -}}
{{- $environments := dict }}
{{- range $stage := list "compile" "neff" "train" }}
{{- $extra := (include "stage.settings" (dict "root" $ "settings" $stage) | fromYaml).extraEnv }}
{{- $_ := set $environments $stage $extra }}
{{- if hasKey $extra "NEURON_COMPILE_CACHE_URL" }}
stages.{{ $stage }}: extraEnv.NEURON_COMPILE_CACHE_URL is set by the chart. Remove it: the cache is below workspace.mountPath.
{{- end }}
{{- if hasKey $extra "NEURON_LOGICAL_NC_CONFIG" }}
stages.{{ $stage }}: extraEnv.NEURON_LOGICAL_NC_CONFIG is set by the chart. Use neuron.logicalCoreSize.
{{- end }}
{{- if contains "--cache_dir" (get $extra "NEURON_CC_FLAGS" | toString) }}
stages.{{ $stage }}: extraEnv.NEURON_CC_FLAGS moves the compiler's cache, by --cache_dir, away from where the stages look for it. Remove --cache_dir.
{{- end }}
{{- range $name := list "XLA_USE_BF16" "XLA_DOWNCAST_BF16" }}
{{- if hasKey $extra $name }}
stages.{{ $stage }}: extraEnv.{{ $name }} has been out of use since Neuron 2.25, and would spoil what is kept in fp32 before. Remove it: the weights are loaded in bf16.
{{- end }}
{{- end }}
{{- end }}
{{- range $name := concat (keys $environments.compile) (keys $environments.train) | uniq | sortAlpha }}
{{- if and (regexMatch "^(NEURON|XLA)_" $name) (not (hasPrefix "NEURON_RT_" $name)) }}
{{- if ne (get $environments.compile $name | toString) (get $environments.train $name | toString) }}
stages.compile and stages.train differ in extraEnv.{{ $name }}, so that train's graphs would not be those that compile made. Set it in both.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.guards" -}}
{{- $guards := .Values.guards }}
{{- if and $guards.maxCost (not $guards.pricePerNodeHour) }}
guards.maxCost is {{ $guards.maxCost }}, but guards.pricePerNodeHour, which the cost is counted by, is empty. Set it to the dollars that one {{ .Values.instance }} node costs an hour, or guards.maxCost to null.
{{- end }}
{{- with $guards.stallTimeout }}
{{- if not (regexMatch "^([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?$" .) }}
guards.stallTimeout {{ . }} is no duration. Set it to one like 45m or 1h30m, or leave it empty for none.
{{- else if not (regexMatch "[1-9]" .) }}
guards.stallTimeout {{ . }} would end every training at once. Set it to e.g. 30m, or leave it empty for none.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.storage" -}}
{{- $storage := .Values.storage }}
{{- if not $storage.existingClaim }}
{{- if not $storage.enabled }}
storage.enabled is false and storage.existingClaim is empty. Name the claim to use in storage.existingClaim, or set storage.enabled to true.
{{- else }}
{{- $gibibytes := trimSuffix "Gi" $storage.size | int }}
{{- if and (eq $storage.kind "fsx") (ne $storage.size "1200Gi") (or (not (hasSuffix "Gi" $storage.size)) (mod $gibibytes 2400)) }}
storage.size {{ $storage.size }} is no size of FSx for Lustre. Use 1200Gi, 2400Gi or a multiple of 2400Gi.
{{- end }}
{{- if eq $storage.kind "fsx-static" }}
{{- range $key := list "fileSystemId" "dnsName" "mountName" }}
{{- if not (get $storage.static $key) }}
storage.static.{{ $key }} is empty, which storage.kind fsx-static needs. `aws fsx describe-file-systems` says it.
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $storage.kind "fsx") $storage.fsx.createStorageClass }}
{{- if not $storage.fsx.subnetId }}
storage.fsx.subnetId is empty, which storage.fsx.createStorageClass needs. Give the subnet of the Trainium nodes.
{{- end }}
{{- if not $storage.fsx.securityGroupIds }}
storage.fsx.securityGroupIds is empty, which storage.fsx.createStorageClass needs. Give security groups that allow ports 988 and 1018-1023.
{{- end }}
{{- else if and (eq $storage.kind "fsx") (not $storage.storageClass) }}
storage.storageClass is empty, which storage.kind fsx needs. Name the class of the FSx CSI driver (often fsx-sc), or set storage.fsx.createStorageClass to true.
{{- end }}
{{- if and (gt (int .Values.parallelism.nodes) 1) (not (has "ReadWriteMany" $storage.accessModes)) }}
storage.accessModes lacks ReadWriteMany, which {{ .Values.parallelism.nodes }} nodes (parallelism.nodes) need. Add it, with a storage class that offers it.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.workspace" -}}
{{- $path := .Values.workspace.mountPath }}
{{- if or (has $path (include "stage.mountPaths" . | fromJsonArray)) (hasPrefix "/etc/llama-lora/" $path) }}
workspace.mountPath {{ $path }} is where the chart mounts something else. Use another path, e.g. /workspace.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.names" -}}
{{- if and (not (include "llama-lora.attached" .)) (gt (len .Release.Name) 49) }}
pipeline.mode detached needs a release name of at most 49 characters, because the runner installs {{ include "llama-lora.run.release" . }}. Choose a shorter one, or set pipeline.mode to attached.
{{- end }}
{{- if and (not .Values.rbac.create) (not .Values.rbac.namePrefix) }}
rbac.namePrefix is empty, which rbac.create false needs. Set it to what the existing service accounts' names begin with.
{{- end }}
{{- end }}

{{- /* A value is readable by everybody who can read the release. No message shows it. */}}
{{- define "llama-lora.validations.secrets" -}}
{{- include "llama-lora.validations.tokens" (dict "key" "" "value" (omit .Values "global")) }}
{{- range $stage, $settings := mergeOverwrite (dict "stageDefaults" .Values.stageDefaults) .Values.stages }}
{{- range $name, $value := $settings.extraEnv }}
{{- if regexMatch "(?i)(^|_)(token|secret|passw(or)?d|credentials?|(api|access)?key)(_|$)" $name }}
{{ ternary "stageDefaults" (printf "stages.%s" $stage) (eq $stage "stageDefaults") }}.extraEnv.{{ $name }} looks like a secret, and values are no place for one. Put a Hugging Face token in a Secret and name it in huggingFace.tokenSecret; give access to AWS by serviceAccount.annotations.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Anything, anywhere in the values, that begins like a Hugging Face token, an AWS access key or a private key. */}}
{{- define "llama-lora.validations.tokens" -}}
{{- if kindIs "map" .value }}
{{- range $name, $value := .value }}
{{- include "llama-lora.validations.tokens" (dict "key" (printf "%s.%s" $.key $name) "value" $value) }}
{{- end }}
{{- else if kindIs "slice" .value }}
{{- range $value := .value }}
{{- include "llama-lora.validations.tokens" (dict "key" $.key "value" $value) }}
{{- end }}
{{- else if regexMatch "\\bhf_[A-Za-z0-9]{20,}|\\b(AKIA|ASIA)[0-9A-Z]{16}\\b|-----BEGIN " (toString .value) }}
{{ trimPrefix "." .key }} holds what looks like a token or a key, and values are no place for one. Remove it. Put a Hugging Face token in a Secret and name that in huggingFace.tokenSecret.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.stages" -}}
{{- range $stage, $own := .Values.stages }}
{{- $settings := include "stage.settings" (dict "root" $ "settings" $stage) | fromYaml }}
{{- $taken := append (include "stage.mountPaths" $ | fromJsonArray) $.Values.workspace.mountPath }}
{{- range $name, $mount := $settings.extraVolumeMounts }}
{{- if or (has (clean $mount.mountPath) $taken) (hasPrefix "/etc/llama-lora/" $mount.mountPath) }}
stages.{{ $stage }}: extraVolumeMounts.{{ $name }}.mountPath {{ $mount.mountPath }} is taken by another volume. Choose another path.
{{- end }}
{{- $taken = append $taken (clean $mount.mountPath) }}
{{- if not (hasKey $settings.extraVolumes $name) }}
stages.{{ $stage }}: extraVolumeMounts.{{ $name }} mounts no volume. Add {{ $name }} to extraVolumes.
{{- end }}
{{- end }}
{{- range $name := list "tmp" "config" "workspace" "shm" }}
{{- if hasKey $settings.extraVolumes $name }}
stages.{{ $stage }}: extraVolumes.{{ $name }} has the name of a volume of the chart's own. Choose another.
{{- end }}
{{- end }}
{{- range $resource, $request := $settings.resources.requests }}
{{- $limit := get $settings.resources.limits $resource }}
{{- if and $limit (gt (include "llama-lora.quantity" $request | float64) (include "llama-lora.quantity" $limit | float64)) }}
stages.{{ $stage }}: resources.requests.{{ $resource }} {{ $request }} is more than resources.limits.{{ $resource }} {{ $limit }}. Raise the limit or lower the request.
{{- end }}
{{- end }}
{{- $memory := $settings.resources.limits.memory }}
{{- if and (has $stage (list "compile" "train")) $memory (gt (include "llama-lora.quantity" $.Values.sharedMemory | float64) (include "llama-lora.quantity" $memory | float64)) }}
sharedMemory {{ $.Values.sharedMemory }} is more than stages.{{ $stage }}: resources.limits.memory {{ $memory }}, against which it counts. Set it to less.
{{- end }}
{{- if hasKey $settings.extraEnv "LLAMA_LORA_WORKSPACE" }}
stages.{{ $stage }}: extraEnv.LLAMA_LORA_WORKSPACE is set by the chart. Use workspace.mountPath.
{{- end }}
{{- end }}
{{- end }}

{{- /* A Kubernetes quantity as a plain number: 1.5Gi is 1610612736. */}}
{{- define "llama-lora.quantity" -}}
{{- $factors := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) }}
{{- mulf (trimSuffix $unit (toString .) | float64) (get $factors $unit) }}
{{- end }}
