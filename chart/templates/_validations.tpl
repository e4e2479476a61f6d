{{- /*
    Rules that span several keys, which a schema cannot express. All problems are reported at once, each with its key and
    a fix. genvalues/settings/value_rules.py has the same rules for inputs files.
    (`helm lint` ignores `fail`, so the chart's defaults, which have no model and no dataset, pass it.)
*/}}
{{- define "llama-lora.validations" -}}
{{- $problems := list }}
{{- range $check := list "model" "dataset" "training" "instance" "parallelism" "backend" "devices" "neuron" "guards" "storage" "workspace" "names" "publish" "monitoring" "secrets" "stages" "workload" "deadlines" "accounts" "environment" "capabilities" "grace" "kueue" "reservation" "labels" "jobsLabels" "extraObjects" }}
{{- $found := include (printf "llama-lora.validations.%s" $check) $ | trim }}
{{- if $found }}
{{- $problems = concat $problems (splitList "\n" $found) }}
{{- end }}
{{- end }}
{{- include "llama-lora.refuse" $problems }}
{{- end }}

{{- /* Ends with these problems, if any. */}}
{{- define "llama-lora.refuse" -}}
{{- with compact . }}
{{- fail (printf "invalid values:\n\n  %s\n" (join "\n  " .)) }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.model" -}}
{{- $model := .Values.model }}
{{- if and $model.id $model.path }}
model.id and model.path are both set. Keep one: model.id for the Hugging Face Hub, model.path for files.
{{- else if not (or $model.id $model.path) }}
model.id is required. Set it, e.g. --set model.id=meta-llama/Meta-Llama-3.1-8B, or model.path.
{{- end }}
{{- if and $model.path $model.revision }}
model.revision cannot be combined with model.path. Remove model.revision.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.dataset" -}}
{{- $dataset := .Values.dataset }}
{{- if not $dataset.source }}
dataset.source is required. Set it, e.g. --set dataset.source=databricks/databricks-dolly-15k.
{{- end }}
{{- $sources := dict "dataset.source" $dataset.source "dataset.eval.source" $dataset.eval.source }}
{{- $splits := dict "dataset.split" $dataset.split "dataset.eval.split" $dataset.eval.split }}
{{- $formats := list $dataset.format }}
{{- range $name, $other := $dataset.additional }}
{{- $_ := set $sources (printf "dataset.additional.%s.source" $name) $other.source }}
{{- $_ := set $splits (printf "dataset.additional.%s.split" $name) $other.split }}
{{- $formats = append $formats ($other.format | default $dataset.format) }}
{{- end }}
{{- range $key, $source := $sources }}
{{- if and $source (regexMatch "(?i)\\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\\.(gz|zst))?$|[*?\\[]|/$|^[.~]" $source) (not (regexMatch "^(/|s3://)" $source)) }}
{{ $key }} {{ $source }} is a relative path, which pods cannot read. Copy the file to the volume and set its absolute path there, e.g. {{ $.Values.workspace.mountPath }}/{{ base $source }}.
{{- end }}
{{- end }}
{{- range $key, $split := $splits }}
{{- if include "llama-lora.hasEmptyPart" ($split | default "") }}
{{ $key }} {{ $split }} has a part without rows. Set the first row before the end, such as train[:10%].
{{- end }}
{{- end }}
{{- if not $dataset.format }}
dataset.format is required. Set it to text, instruction, prompt-completion or chat.
{{- end }}
{{- $heldOut := $dataset.eval }}
{{- $apart := or $heldOut.source $heldOut.split }}
{{- if and .Values.evaluation.enabled (not $dataset.evalFraction) (not $apart) }}
evaluation.enabled is true, but dataset.evalFraction 0 leaves no rows to evaluate on. Raise dataset.evalFraction, set dataset.eval, or set evaluation.enabled to false.
{{- end }}
{{- range $key := list "config" "revision" }}
{{- if and (get $heldOut $key) (not $apart) }}
dataset.eval.{{ $key }} has no effect without dataset.eval.source or dataset.eval.split. Set dataset.eval.split, or remove it.
{{- end }}
{{- end }}
{{- $same := and (has ($heldOut.source | default $dataset.source) (list $dataset.source)) (has ($heldOut.config | default $dataset.config) (list $dataset.config)) }}
{{- if and $apart $same (eq ($heldOut.split | default "train") ($dataset.split | default "train")) }}
dataset.eval.split: the held-out rows are those that are trained on. Set it to another split, or a part such as train[90%:] with dataset.split train[:90%].
{{- end }}
{{- if and $dataset.groupColumn $apart }}
dataset.groupColumn has no effect, because dataset.eval says which rows are held out. Remove one of the two.
{{- else if and $dataset.groupColumn (not $dataset.evalFraction) }}
dataset.groupColumn has no effect, because dataset.evalFraction 0 holds out no rows. Raise dataset.evalFraction, or remove dataset.groupColumn.
{{- end }}
{{- if and (eq ($dataset.overlong | default "") "split") (without $formats "text" "") }}
dataset.overlong split applies to format text only. Set it to truncate or drop.
{{- end }}
{{- if and (eq $dataset.trainOn "last-answer") (eq $dataset.format "text") (eq (len (uniq $formats)) 1) }}
dataset.trainOn last-answer: format text has no answers. Remove dataset.trainOn.
{{- end }}
{{- end }}

{{- /* "true" if a part of a split has no row, however many rows there are. What depends on their number, such as [5:-5] and
       [50%:10], may have one. */}}
{{- define "llama-lora.hasEmptyPart" -}}
{{- range $part := regexFindAll "\\[.*?:.*?\\]" . -1 }}
{{- $bounds := splitList ":" (trimAll "[]" $part) }}
{{- $first := first $bounds | default (ternary "0%" "0" (hasSuffix "%" (last $bounds))) }}
{{- $end := last $bounds | default (ternary "100%" "1e16" (hasSuffix "%" $first)) }}
{{- $numbers := list }}
{{- range $bound := list $first $end }}
{{- $number := trimSuffix "%" $bound | float64 }}
{{- $numbers = append $numbers (ternary (addf $number 100) $number (and (hasSuffix "%" $bound) (lt $number 0.0))) }}
{{- end }}
{{- $comparable := and (eq (hasSuffix "%" $first) (hasSuffix "%" $end)) (eq (lt (first $numbers) 0.0) (lt (last $numbers) 0.0)) }}
{{- if or (and $comparable (ge (first $numbers) (last $numbers))) (regexMatch "^-?0+%?$|^-100%$" $end) }}true{{ end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.training" -}}
{{- $training := .Values.training }}
{{- $heldOut := .Values.dataset.eval }}
{{- if and $training.evalSteps (not .Values.dataset.evalFraction) (not (or $heldOut.source $heldOut.split)) }}
training.evalSteps requires held-out rows, and dataset.evalFraction is 0. Raise dataset.evalFraction, set dataset.eval, or remove training.evalSteps.
{{- end }}
{{- range $key := list "loadBestModelAtEnd" "earlyStoppingPatience" }}
{{- if and (get $training $key) (not $training.evalSteps) }}
training.{{ $key }} requires training.evalSteps, which measures the held-out loss. Set training.evalSteps, or remove training.{{ $key }}.
{{- end }}
{{- end }}
{{- if and $training.earlyStoppingThreshold (not $training.earlyStoppingPatience) }}
training.earlyStoppingThreshold has no effect without training.earlyStoppingPatience. Set training.earlyStoppingPatience, or remove training.earlyStoppingThreshold.
{{- end }}
{{- if and (eq .Values.backend "native") (eq $training.attention "isolatedFlash") }}
training.attention isolatedFlash requires backend xla. Set training.attention to isolated.
{{- end }}
{{- if and (eq .Values.backend "xla") (ne $training.attention "isolated") (mod $training.maxSequenceLength 2048) }}
training.maxSequenceLength {{ $training.maxSequenceLength }} is not a multiple of 2048, as training.attention {{ $training.attention }} requires with backend xla. Set it to {{ mul 2048 (add 1 (div $training.maxSequenceLength 2048)) }}, or training.attention to isolated.
{{- else if and (eq .Values.backend "native") (eq (include "llama-lora.device" .) "neuron") (mod $training.maxSequenceLength 512) }}
training.maxSequenceLength {{ $training.maxSequenceLength }} is not a multiple of 512, as backend native requires on Trainium. Set it to {{ mul 512 (add 1 (div $training.maxSequenceLength 512)) }}.
{{- end }}
{{- end }}

{{- /* The types that the chart knows, of the same service (EC2 or HyperPod), with several nodes if asked for.
       Arguments: root, several. */}}
{{- define "llama-lora.instances.others" -}}
{{- $names := list }}
{{- range $name, $row := include "llama-lora.instances" .root | fromJson }}
{{- if and (ne $name "cpu") (eq (hasPrefix "ml." $name) (hasPrefix "ml." $.root.Values.instance)) (or $row.severalNodes (not $.several)) }}
{{- $names = append $names $name }}
{{- end }}
{{- end }}
{{- join ", " (sortAlpha $names) }}
{{- end }}

{{- define "llama-lora.validations.instance" -}}
{{- $instance := .Values.instance }}
{{- $rows := include "llama-lora.instances" . | fromJson }}
{{- $row := get $rows $instance }}
{{- $choices := include "llama-lora.instances.others" (dict "root" . "several" false) }}
{{- if and (not $row) (regexMatch (include "llama-lora.instances.accelerated" . | trim) $instance) }}
{{- if get $rows (trimPrefix "ml." $instance) }}
instance {{ $instance }} is not an instance type of SageMaker HyperPod. Use {{ $choices }}, or {{ trimPrefix "ml." $instance }} on EC2.
{{- else if regexMatch "^(ml\\.)?trn[12]" $instance }}
instance {{ $instance }} is not an instance type of AWS. Use {{ $choices }}.
{{- else }}
instance {{ $instance }} is not supported: {{ include "llama-lora.instances.supported" . | trim }}. Use {{ $choices }}, or cpu.
{{- end }}
{{- end }}
{{- if and $row (not (or $row.severalNodes (eq $instance "cpu"))) (gt (int .Values.parallelism.nodes) 1) }}
parallelism.nodes is {{ .Values.parallelism.nodes }}, but instance {{ $instance }} supports one node only. Set it to 1, or instance to {{ include "llama-lora.instances.others" (dict "root" . "several" true) }}.
{{- end }}
{{- if and .Values.hyperpod.autoResume (not (hasPrefix "ml." $instance)) }}
hyperpod.autoResume requires an instance type of HyperPod, and instance is {{ $instance }}. Set hyperpod.autoResume to false, or instance to {{ if and $row (get $rows (printf "ml.%s" $instance)) }}ml.{{ $instance }}{{ else }}the type of the HyperPod nodes, with ml.{{ end }}.
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
{{- if eq (include "llama-lora.device" .) "neuron" }}
{{- $row := include "llama-lora.instance.row" . | fromJson }}
{{- $cores := include "llama-lora.instance.cores" . | int }}
{{- if and $row.coresPerDevice (ne $cores (int $layout.processesPerNode)) }}
parallelism.processesPerNode is {{ $layout.processesPerNode }}, but the devices of instance {{ .Values.instance }} have {{ $cores }} logical cores, one process each. Set it to {{ $cores }}, or to null.
{{- end }}
{{- range $key := list "tensorParallelSize" "shardSize" }}
{{- $size := get $layout $key | int }}
{{- $possible := list }}
{{- range $row.groups }}{{ $possible = append $possible (int .) }}{{ end }}
{{- if and $row.groups (not (has $size $possible)) }}
parallelism.{{ $key }} is {{ $size }}, but {{ $.Values.instance }} supports process groups of {{ join ", " $possible }}. Set it to one of these.
{{- end }}
{{- end }}
{{- end }}
{{- include "llama-lora.validations.weights" . }}
{{- if and (eq .Values.backend "xla") (gt (int $layout.shardSize) 1) }}
parallelism.shardSize is {{ $layout.shardSize }}, which requires backend native. Set it to 1.
{{- else if mod $layout.dataParallelSize $layout.shardSize }}
parallelism.shardSize {{ $layout.shardSize }} does not divide parallelism.dataParallelSize {{ $layout.dataParallelSize }}. Set it to a divisor.
{{- end }}
{{- end }}

{{- /* A known model whose weights alone do not fit the memory of a core. The planner of genvalues counts all that a step needs. */}}
{{- define "llama-lora.validations.weights" -}}
{{- $layout := .Values.parallelism }}
{{- $row := include "llama-lora.instance.row" . | fromJson }}
{{- $weights := get (include "llama-lora.instances.weights" . | fromJson) .Values.model.id }}
{{- $divisor := mulf $layout.tensorParallelSize $layout.shardSize }}
{{- if and $weights $row.usableGib (gt (divf $weights $divisor) (float64 $row.usableGib)) }}
{{- $native := eq .Values.backend "native" }}
{{- $fitting := "" }}
{{- range $row.groups }}
{{- $parts := ternary (mulf $layout.tensorParallelSize .) (float64 .) $native }}
{{- if and (not $fitting) (le (divf $weights $parts) (float64 $row.usableGib)) (or (not $native) (not (mod $layout.dataParallelSize .))) }}
{{- $fitting = int . }}
{{- end }}
{{- end }}
model.id {{ .Values.model.id }} has {{ divf $weights $divisor | printf "%.1f" }} GiB of weights per core with parallelism.tensorParallelSize {{ $layout.tensorParallelSize }} and shardSize {{ $layout.shardSize }}, and a core of {{ .Values.instance }} has {{ $row.usableGib }} GiB for them. {{ if $fitting }}Set parallelism.{{ ternary "shardSize" "tensorParallelSize" $native }} to {{ $fitting }}.{{ else }}Use a larger instance type or a smaller model.{{ end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.backend" -}}
{{- $values := .Values }}
{{- if and (eq $values.backend "xla") (ne (include "llama-lora.device" .) "neuron") }}
instance is {{ $values.instance }}, but backend is xla. Set instance to the nodes' type, e.g. ml.trn1.32xlarge, or backend to native.
{{- end }}
{{- if eq $values.backend "xla" }}
{{- if ne $values.compile.mode "layers" }}
compile.mode {{ $values.compile.mode }} requires backend native. Set it to layers.
{{- end }}
{{- if ne $values.compile.onFallback "refuse" }}
compile.onFallback {{ $values.compile.onFallback }} requires backend native. Set it to refuse.
{{- end }}
{{- else if and (ne $values.compile.runsOn "accelerator") (eq (include "llama-lora.device" .) "neuron") }}
compile.runsOn {{ $values.compile.runsOn }} requires backend xla. Set it to accelerator, or backend to xla.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.devices" -}}
{{- if and (eq (include "llama-lora.device" .) "neuron") (not (hasKey .Values.devices "aws.amazon.com/neuron")) }}
devices has no aws.amazon.com/neuron, which instance {{ .Values.instance }} requires. Set devices to null for those of one node.
{{- end }}
{{- range $device, $count := (include "llama-lora.instance.row" . | fromJson).devices }}
{{- $wanted := get $.Values.devices $device | default 0 | int }}
{{- if gt $wanted (int $count) }}
devices.{{ $device }} is {{ $wanted }}, but instance {{ $.Values.instance }} has {{ int $count }}. Set it to {{ int $count }}, or devices to null.
{{- end }}
{{- end }}
{{- range $device := list "aws.amazon.com/neurondevice" "aws.amazon.com/neuroncore" }}
{{- if hasKey $.Values.devices $device }}
devices.{{ $device }} is not supported, because it does not count whole devices. Use aws.amazon.com/neuron.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.neuron" -}}
{{- if eq (include "llama-lora.device" .) "neuron" }}
{{- $neuron := .Values.neuron }}
{{- $generation := regexFind "trn[0-9]" .Values.instance }}
{{- if and $generation (ne $generation $neuron.target) }}
neuron.target is {{ $neuron.target }}, but instance is {{ .Values.instance }}. Set neuron.target to {{ $generation }}{{ if eq $generation "trn2" }}, and neuron.logicalCoreSize to 2{{ end }}.
{{- else if and (eq $neuron.target "trn1") (ne (int $neuron.logicalCoreSize) 1) }}
neuron.logicalCoreSize is {{ $neuron.logicalCoreSize }}, but neuron.target trn1 supports only 1. Set it to 1.
{{- end }}
{{- if and (gt (int .Values.parallelism.nodes) 1) (not (hasKey .Values.devices "vpc.amazonaws.com/efa")) }}
devices has no vpc.amazonaws.com/efa, which {{ .Values.parallelism.nodes }} nodes (parallelism.nodes) require. Set it to the number per node, or set parallelism.nodes to 1.
{{- end }}
{{- include "llama-lora.validations.neuron.environment" . }}
{{- end }}
{{- end }}

{{- /* Environment variables that a user must not set, or must set in both stages: if train builds another graph than
       compile, the graph is compiled while the accelerator is idle. */}}
{{- define "llama-lora.validations.neuron.environment" -}}
{{- $environments := dict }}
{{- range $stage := list "compile" "neff" "train" }}
{{- $extra := (include "stage.settings" (dict "root" $ "settings" $stage) | fromJson).extraEnv }}
{{- $_ := set $environments $stage $extra }}
{{- $cache := ternary "NEURON_COMPILE_CACHE_URL" "TORCH_NEURONX_NEFF_CACHE_DIR" (eq $.Values.backend "xla") }}
{{- if hasKey $extra $cache }}
stages.{{ $stage }}: extraEnv.{{ $cache }} is set by the chart. Remove it: the cache is in workspace.mountPath.
{{- end }}
{{- if and (eq $.Values.backend "native") (hasKey $extra "NEURON_RT_VISIBLE_CORES") }}
stages.{{ $stage }}: extraEnv.NEURON_RT_VISIBLE_CORES is set by TorchNeuron in each worker, and not with a value of the pod. Remove it.
{{- end }}
{{- if hasKey $extra "NEURON_LOGICAL_NC_CONFIG" }}
stages.{{ $stage }}: extraEnv.NEURON_LOGICAL_NC_CONFIG is set by the chart. Use neuron.logicalCoreSize.
{{- end }}
{{- if contains "--cache_dir" (get $extra "NEURON_CC_FLAGS" | toString) }}
stages.{{ $stage }}: extraEnv.NEURON_CC_FLAGS contains --cache_dir, which moves the compiler's cache. Remove --cache_dir.
{{- end }}
{{- range $name := list "XLA_USE_BF16" "XLA_DOWNCAST_BF16" }}
{{- if hasKey $extra $name }}
stages.{{ $stage }}: extraEnv.{{ $name }} is not supported since Neuron 2.25; before that it converts fp32 tensors to bf16. Remove it: the weights are loaded in bf16.
{{- end }}
{{- end }}
{{- end }}
{{- range $name := concat (keys $environments.compile) (keys $environments.train) | uniq | sortAlpha }}
{{- if and (regexMatch "^(NEURON|XLA|TORCH_NEURONX|NKI)_" $name) (not (hasPrefix "NEURON_RT_" $name)) }}
{{- if ne (get $environments.compile $name | toString) (get $environments.train $name | toString) }}
stages.compile and stages.train differ in extraEnv.{{ $name }}, so train needs other graphs than compile has compiled. Set it in both.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.guards" -}}
{{- $guards := .Values.guards }}
{{- if and $guards.maxCost (not $guards.pricePerNodeHour) }}
guards.maxCost is {{ $guards.maxCost }}, but guards.pricePerNodeHour is empty. Set it to the price in dollars of one {{ .Values.instance }} node per hour, or set guards.maxCost to null.
{{- end }}
{{- with $guards.stallTimeout }}
{{- if not (regexMatch "^([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?$" .) }}
guards.stallTimeout {{ . }} is not a valid duration. Set it to e.g. 45m or 1h30m, or leave it empty for no limit.
{{- else if not (regexMatch "[1-9]" .) }}
guards.stallTimeout {{ . }} would stop every training at once. Set it to e.g. 30m, or leave it empty for no limit.
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
{{- $creates := and (eq $storage.kind "fsx") $storage.fsx.createStorageClass }}
{{- $type := get (include "llama-lora.settings.storage" . | fromJson).fsx $storage.fsx.deploymentType }}
{{- $unit := ternary (int $type.unit) 2400 (not (not $creates)) }}
{{- if and (eq $storage.kind "fsx") (not (has $storage.size (list "1200Gi" "2400Gi"))) (or (not (hasSuffix "Gi" $storage.size)) (mod $gibibytes $unit)) }}
storage.size {{ $storage.size }} is not a valid size for FSx for Lustre. Use 1200Gi, 2400Gi or a multiple of {{ $unit }}Gi.
{{- end }}
{{- if $creates }}
{{- include "llama-lora.validations.fsx" (dict "fsx" $storage.fsx "type" $type) }}
{{- end }}
{{- if eq $storage.kind "fsx-static" }}
{{- range $key := list "fileSystemId" "dnsName" "mountName" }}
{{- if not (get $storage.static $key) }}
storage.static.{{ $key }} is required for storage.kind fsx-static. Set it to the value shown by `aws fsx describe-file-systems`.
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $storage.kind "fsx") $storage.fsx.createStorageClass }}
{{- if not $storage.fsx.subnetId }}
storage.fsx.subnetId is required for storage.fsx.createStorageClass. Set it to the subnet of the Trainium nodes.
{{- end }}
{{- if not $storage.fsx.securityGroupIds }}
storage.fsx.securityGroupIds is required for storage.fsx.createStorageClass. Set it to security groups that allow ports 988 and 1018-1023.
{{- end }}
{{- else if and (eq $storage.kind "fsx") (not $storage.storageClass) }}
storage.storageClass is required for storage.kind fsx. Name the class of the FSx CSI driver (often fsx-sc), or set storage.fsx.createStorageClass to true.
{{- end }}
{{- if and (gt (int .Values.parallelism.nodes) 1) (not (has "ReadWriteMany" $storage.accessModes)) }}
storage.accessModes lacks ReadWriteMany, which {{ .Values.parallelism.nodes }} nodes (parallelism.nodes) require. Add it, with a storage class that supports it.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Parameters that FSx refuses for the deployment type. Arguments: fsx, type. */}}
{{- define "llama-lora.validations.fsx" -}}
{{- $fsx := .fsx }}
{{- $throughputs := list }}
{{- range .type.throughputs }}{{ $throughputs = append $throughputs (int .) }}{{ end }}
{{- with $fsx.perUnitStorageThroughput | int }}
{{- if not (has . $throughputs) }}
storage.fsx.perUnitStorageThroughput {{ . }} is not offered by deploymentType {{ $fsx.deploymentType }}. Set it to {{ if $throughputs }}one of {{ join ", " $throughputs }}, or to {{ end }}null.
{{- end }}
{{- end }}
{{- if and (eq $fsx.deploymentType "PERSISTENT_2") (eq $fsx.fileSystemTypeVersion "2.10") }}
storage.fsx.fileSystemTypeVersion 2.10 is not offered by deploymentType PERSISTENT_2. Set it to "2.15".
{{- end }}
{{- if and (hasPrefix "SCRATCH" $fsx.deploymentType) $fsx.kmsKeyId }}
storage.fsx.kmsKeyId is not supported by deploymentType {{ $fsx.deploymentType }}. Remove it, or set deploymentType to PERSISTENT_2.
{{- end }}
{{- range $key := list "s3ImportPath" "s3ExportPath" "autoImportPolicy" }}
{{- with get $fsx $key }}
{{- if eq $fsx.deploymentType "PERSISTENT_2" }}
storage.fsx.{{ $key }} is not supported by deploymentType PERSISTENT_2, which requires a data repository association that the FSx CSI driver does not make. Set deploymentType to SCRATCH_2 or PERSISTENT_1, or remove it.
{{- else if not $fsx.s3ImportPath }}
storage.fsx.{{ $key }} has no effect without storage.fsx.s3ImportPath. Set that, or remove it.
{{- else if and (eq $key "s3ExportPath") (ne (index (splitList "/" .) 2) (index (splitList "/" $fsx.s3ImportPath) 2)) }}
storage.fsx.s3ExportPath is in another bucket than storage.fsx.s3ImportPath. Use the same bucket.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.workspace" -}}
{{- $path := .Values.workspace.mountPath }}
{{- if has $path (include "stage.systemPaths" . | fromJsonArray) }}
workspace.mountPath {{ $path }} would hide a directory of the image. Use another path, e.g. /workspace.
{{- end }}
{{- if or (has $path (include "stage.mountPaths" . | fromJsonArray)) (hasPrefix "/etc/llama-lora/" $path) }}
workspace.mountPath {{ $path }} is used by another mount of the chart. Use another path, e.g. /workspace.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.workload" -}}
{{- if and (eq .Values.workload "trainjob") .Values.hyperpod.autoResume }}
hyperpod.autoResume is true, but HyperPod resumes PyTorchJobs only. Set it to false, or workload to pytorchjob.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.names" -}}
{{- if and (not (include "llama-lora.attached" .)) (gt (len .Release.Name) 49) }}
pipeline.mode detached requires a release name of at most 49 characters, because the runner installs {{ include "llama-lora.run.release" . }}. Choose a shorter one, or set pipeline.mode to attached.
{{- end }}
{{- if and (not .Values.rbac.create) (not .Values.rbac.namePrefix) }}
rbac.namePrefix is required when rbac.create is false. Set it to the prefix of the existing service accounts' names.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.publish" -}}
{{- $hub := .Values.publish.hub }}
{{- if and $hub.adapter (eq $hub.adapter $hub.merged) }}
publish.hub.adapter and publish.hub.merged are both {{ $hub.adapter }}. Use a repository for each: a model card describes one model.
{{- end }}
{{- if and (or $hub.adapter $hub.merged) (not (include "llama-lora.publish.token" . | fromYaml).name) }}
publish.hub.tokenSecret is required to write to the Hub. Set it, or huggingFace.tokenSecret, to the name of a Secret with a token that may write.
{{- end }}
{{- if and $hub.tokenSecret (not (or $hub.adapter $hub.merged)) }}
publish.hub.tokenSecret has no effect without publish.hub.adapter or publish.hub.merged. Set one of them, or remove it.
{{- end }}
{{- if .Values.publish.s3.uri }}
{{- if and (has "report" .Values.publish.s3.artifacts) (eq (len .Values.publish.s3.artifacts) 1) (not .Values.evaluation.enabled) }}
publish.s3.artifacts has only the report, which is not written with evaluation.enabled false. Add adapter or merged, or set evaluation.enabled to true.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.monitoring" -}}
{{- $monitoring := .Values.monitoring }}
{{- $environment := (include "stage.settings" (dict "root" . "settings" "train") | fromJson).extraEnv }}
{{- if and $monitoring.mlflow (not (get $environment "MLFLOW_TRACKING_URI")) }}
monitoring.mlflow requires stages.train.extraEnv.MLFLOW_TRACKING_URI. Set it to the URL of the tracking server.
{{- end }}
{{- if and $monitoring.secretName (not (or $monitoring.pushgateway $monitoring.otlpEndpoint $monitoring.wandb $monitoring.mlflow)) }}
monitoring.secretName has no effect: nothing is monitored. Set monitoring.wandb, monitoring.mlflow, monitoring.pushgateway or monitoring.otlpEndpoint, or remove it.
{{- end }}
{{- end }}

{{- /* Values are stored in the release, where others can read them. The messages do not show them. */}}
{{- define "llama-lora.validations.secrets" -}}
{{- $hub := .Values.publish.hub }}
{{- range $key, $name := dict "huggingFace.tokenSecret" .Values.huggingFace.tokenSecret "publish.hub.tokenSecret" $hub.tokenSecret "monitoring.secretName" .Values.monitoring.secretName }}
{{- if not (regexMatch "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?$" $name) }}
{{ $key }} is not a valid name of a Secret. Set it to the name of a Secret, never to the token itself.
{{- end }}
{{- end }}
{{- range $key, $name := dict "huggingFace.tokenKey" .Values.huggingFace.tokenKey "publish.hub.tokenKey" $hub.tokenKey }}
{{- if not (regexMatch "^[-._a-zA-Z0-9]+$" $name) }}
{{ $key }} is not a valid key in a Secret. Set it to the key of the token, never to the token itself.
{{- end }}
{{- end }}
{{- range $stage, $settings := mergeOverwrite (dict "stageDefaults" .Values.stageDefaults) .Values.stages }}
{{- range $name, $value := $settings.extraEnv }}
{{- $switch := regexMatch "(?i)^(0|1|true|false|yes|no|on|off)?$" (toString $value) }}      {{- /* HF_HUB_DISABLE_IMPLICIT_TOKEN */}}
{{- if and (not $switch) (regexMatch "(?i)(^|_)(token|secret|passw(or)?d|credentials?|(api|access)?key)(_|$)" $name) }}
{{ ternary "stageDefaults" (printf "stages.%s" $stage) (eq $stage "stageDefaults") }}.extraEnv.{{ $name }} looks like a secret. Values can be read by anyone who can read the release. Put it in a Secret and name that in extraEnvSecrets, a Hugging Face token in huggingFace.tokenSecret; grant access to AWS by serviceAccount.annotations.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Any value that contains a Hugging Face token, an AWS access key or a private key, or a character that Helm cannot
       render. Checked before all else, because other messages show values. */}}
{{- define "llama-lora.validations.texts" -}}
{{- if kindIs "map" .value }}
{{- include "llama-lora.validations.characters" (dict "key" .key "text" (keys .value | sortAlpha | join " ")) }}
{{- range $name, $value := .value }}
{{- include "llama-lora.validations.texts" (dict "key" (printf "%s.%s" $.key $name) "value" $value) }}
{{- end }}
{{- else if kindIs "slice" .value }}
{{- range $value := .value }}
{{- include "llama-lora.validations.texts" (dict "key" $.key "value" $value) }}
{{- end }}
{{- else if regexMatch "\\bhf_[A-Za-z0-9]{20,}|\\b(AKIA|ASIA)[0-9A-Z]{16}\\b|-----BEGIN " (toString .value) }}
{{ trimPrefix "." .key }} contains a token or a key. Values can be read by anyone who can read the release. Remove it. Put a Hugging Face token in a Secret and name it in huggingFace.tokenSecret.
{{- else }}
{{- include "llama-lora.validations.characters" (dict "key" .key "text" (toString .value)) }}
{{- end }}
{{- end }}

{{- /* YAML does not allow these characters, and toYaml does not escape them: it returns "" for a value with one of them, and
       makes U+0085, a line break, a space. */}}
{{- define "llama-lora.validations.characters" -}}
{{- with regexFind "[\\x{7f}-\\x{9f}\\x{fffe}\\x{ffff}]" .text }}
{{ trimPrefix "." $.key }} contains the character {{ printf "%+q" . | trimAll "\"" | replace "\\x" "\\u00" | upper | replace "\\U" "U+" }}, with which Helm cannot render YAML. Remove it.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.stages" -}}
{{- range $stage, $own := .Values.stages }}
{{- $settings := include "stage.settings" (dict "root" $ "settings" $stage) | fromJson }}
{{- $taken := append (include "stage.mountPaths" $ | fromJsonArray) $.Values.workspace.mountPath }}
{{- range $name, $mount := $settings.extraVolumeMounts }}
{{- if or (has (clean $mount.mountPath) $taken) (hasPrefix "/etc/llama-lora/" $mount.mountPath) }}
stages.{{ $stage }}: extraVolumeMounts.{{ $name }}.mountPath {{ $mount.mountPath }} is already used by another mount. Choose another path.
{{- end }}
{{- if has (clean $mount.mountPath) (include "stage.systemPaths" $ | fromJsonArray) }}
stages.{{ $stage }}: extraVolumeMounts.{{ $name }}.mountPath {{ $mount.mountPath }} would hide a directory of the image. Choose a path below it.
{{- end }}
{{- $taken = append $taken (clean $mount.mountPath) }}
{{- if not (hasKey $settings.extraVolumes $name) }}
stages.{{ $stage }}: extraVolumeMounts.{{ $name }} refers to an unknown volume. Add {{ $name }} to extraVolumes.
{{- end }}
{{- end }}
{{- range $name := list "tmp" "config" "workspace" "shm" }}
{{- if hasKey $settings.extraVolumes $name }}
stages.{{ $stage }}: extraVolumes.{{ $name }} has the name of one of the chart's volumes. Choose another.
{{- end }}
{{- end }}
{{- $requests := $settings.resources.requests | default dict }}
{{- $limits := $settings.resources.limits | default dict }}
{{- range $resource, $request := $requests }}
{{- $limit := get $limits $resource }}
{{- if and (hasKey $limits $resource) (gt (include "llama-lora.quantity" $request | float64) (include "llama-lora.quantity" $limit | float64)) }}
stages.{{ $stage }}: resources.requests.{{ $resource }} {{ $request }} is more than resources.limits.{{ $resource }} {{ $limit }}. Raise the limit or lower the request.
{{- end }}
{{- end }}
{{- range $resource, $page := dict "hugepages-2Mi" "2Mi" "hugepages-1Gi" "1Gi" }}
{{- $request := get $requests $resource }}
{{- $limit := get $limits $resource }}
{{- if and $request (ne (include "llama-lora.quantity" $request) (include "llama-lora.quantity" ($limit | default 0))) }}
stages.{{ $stage }}: resources.requests.{{ $resource }} {{ $request }} requires the same limit. Set resources.limits.{{ $resource }} to {{ $request }}.
{{- end }}
{{- $pages := divf (include "llama-lora.quantity" ($limit | default 0)) (include "llama-lora.quantity" $page) }}
{{- if ne $pages (floor $pages) }}
stages.{{ $stage }}: resources.limits.{{ $resource }} {{ $limit }} is not a multiple of {{ $page }}, the size of a page. Set it, and the request, to whole pages.
{{- end }}
{{- end }}
{{- $memory := $limits.memory }}
{{- if and (has $stage (list "compile" "train")) $memory (gt (include "llama-lora.quantity" $.Values.sharedMemory | float64) (include "llama-lora.quantity" $memory | float64)) }}
sharedMemory {{ $.Values.sharedMemory }} is more than stages.{{ $stage }}: resources.limits.memory {{ $memory }}, which includes it. Set it to less.
{{- end }}
{{- range $name, $value := $settings.extraEnv }}
{{- if and (kindIs "float64" $value) (or (ge $value 9007199254740992.0) (le $value -9007199254740992.0)) }}      {{- /* 2^53 */}}
stages.{{ $stage }}: extraEnv.{{ $name }} is a number of which Helm does not keep every digit. Put it in quotes (with --set: use --set-string).
{{- end }}
{{- end }}
{{- if hasKey $settings.extraEnv "LLAMA_LORA_IMAGE" }}
stages.{{ $stage }}: extraEnv.LLAMA_LORA_IMAGE is set by the chart. Use image.
{{- end }}
{{- if hasKey $settings.extraEnv "LLAMA_LORA_GRACE_SECONDS" }}
stages.{{ $stage }}: extraEnv.LLAMA_LORA_GRACE_SECONDS is set by the chart. Use terminationGracePeriodSeconds.
{{- end }}
{{- if hasKey $settings.extraEnv "LLAMA_LORA_WORKSPACE" }}
stages.{{ $stage }}: extraEnv.LLAMA_LORA_WORKSPACE is set by the chart. Use workspace.mountPath.
{{- end }}
{{- end }}
{{- end }}

{{- /* A deadline that ends what watches over a job, but not the job. */}}
{{- define "llama-lora.validations.deadlines" -}}
{{- if .Values.stages.gate.activeDeadlineSeconds }}
stages.gate.activeDeadlineSeconds would end the gate and with it guards.maxCost and guards.stallTimeout, while the nodes go on. Remove it. To limit a training, set stages.train.activeDeadlineSeconds.
{{- end }}
{{- if .Values.stages.runner.activeDeadlineSeconds }}
stages.runner.activeDeadlineSeconds would end the runner in the middle of a stage, which goes on. Remove it. Set the deadlines of the stages instead, e.g. stages.train.activeDeadlineSeconds.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.accounts" -}}
{{- if .Values.stageDefaults.serviceAccountName }}
stageDefaults.serviceAccountName would give all stages the permissions of one. Set it for a stage, e.g. stages.tokenize.serviceAccountName.
{{- end }}
{{- end }}

{{- /* Variables from Secrets and ConfigMaps. */}}
{{- define "llama-lora.validations.environment" -}}
{{- range $stage, $own := .Values.stages }}
{{- if not (has $stage (include "stage.ofTrainer" $ | fromJsonArray)) }}
{{- range $key := list "extraEnvSecrets" "extraEnvFrom" }}
{{- if get $own $key }}
stages.{{ $stage }}.{{ $key }} is not allowed: this stage has permissions in the cluster or runs as root, and a variable can run code. Remove it.
{{- end }}
{{- end }}
{{- end }}
{{- $settings := include "stage.settings" (dict "root" $ "settings" $stage) | fromJson }}
{{- range $name, $from := $settings.extraEnvSecrets }}
{{- if eq $name "HF_TOKEN" }}
stages.{{ $stage }}: extraEnvSecrets.HF_TOKEN is set by the chart where it is needed. Use huggingFace.tokenSecret or publish.hub.tokenSecret.
{{- else if hasPrefix "LLAMA_LORA_" $name }}
stages.{{ $stage }}: extraEnvSecrets.{{ $name }} has a name of the chart's variables. Remove it.
{{- else if regexMatch "^(NEURON|XLA|TORCH_NEURONX|NKI|LD|PYTHON.*)_|^PYTHON|^PATH$" $name }}
stages.{{ $stage }}: extraEnvSecrets.{{ $name }} decides which code runs, and is no secret. Use extraEnv.
{{- end }}
{{- if hasKey $settings.extraEnv $name }}
stages.{{ $stage }}: {{ $name }} is in extraEnv and in extraEnvSecrets. Remove one of them.
{{- end }}
{{- end }}
{{- range $name, $source := $settings.extraEnvFrom }}
{{- if eq (empty $source.secretRef) (empty $source.configMapRef) }}
stages.{{ $stage }}: extraEnvFrom.{{ $name }} requires exactly one of secretRef and configMapRef. Set one, e.g. {secretRef: {name: wandb}}.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.capabilities" -}}
{{- range $stage, $own := .Values.stages }}
{{- $settings := include "stage.settings" (dict "root" $ "settings" $stage) | fromJson }}
{{- $refused := list "ALL" "SYS_ADMIN" "CAP_SYS_ADMIN" }}
{{- range $name := $refused }}
{{- if get $settings.capabilities $name }}
stages.{{ $stage }}.capabilities.{{ $name }} is refused by Kubernetes, because the pods forbid privilege escalation. Remove it.
{{- end }}
{{- end }}
{{- range $name, $added := $settings.capabilities }}
{{- if and $added (hasPrefix "CAP_" $name) (not (has $name $refused)) }}
stages.{{ $stage }}.capabilities.{{ $name }} has the prefix CAP_, which Kubernetes adds itself. Use {{ trimPrefix "CAP_" $name }}.
{{- end }}
{{- end }}
{{- with $settings.seccompProfile }}
{{- if ne (eq .type "Localhost") (not (empty .localhostProfile)) }}
stages.{{ $stage }}: seccompProfile.localhostProfile is the path of a profile of type Localhost. Set both, or remove it.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.grace" -}}
{{- range $stage := list "compile" "train" }}
{{- $grace := int (include "stage.settings" (dict "root" $ "settings" $stage) | fromJson).terminationGracePeriodSeconds }}
{{- if lt $grace 30 }}
stages.{{ $stage }}.terminationGracePeriodSeconds is {{ $grace }}, too short to save a checkpoint. Set it to at least 30.
{{- else if gt $grace 300 }}
stages.{{ $stage }}.terminationGracePeriodSeconds is {{ $grace }}, and gates wait 10 minutes for the pods of a stopped job, 5 of them for a lost node. Set it to at most 300.
{{- else if and $.Values.cleanup.enabled (gt (add $grace 20) (int $.Values.cleanup.timeoutSeconds)) }}
cleanup.timeoutSeconds is {{ $.Values.cleanup.timeoutSeconds }}, which is too short for stages.{{ $stage }}.terminationGracePeriodSeconds {{ $grace }}. Set it to at least {{ add $grace 20 }}.
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.kueue" -}}
{{- if and .Values.kueue.priorityClass (not .Values.kueue.queueName) }}
kueue.priorityClass has no effect without kueue.queueName. Set kueue.queueName to a LocalQueue, or remove kueue.priorityClass.
{{- end }}
{{- end }}

{{- define "llama-lora.validations.reservation" -}}
{{- $wanted := .Values.capacityReservation }}
{{- $grouped := has $wanted.provisioner (list "node-group" "hyperpod") }}
{{- if not $wanted.provisioner }}
{{- if or $wanted.type $wanted.id $wanted.group }}
capacityReservation has no effect without capacityReservation.provisioner. Set it to karpenter, auto-mode, node-group or hyperpod.
{{- end }}
{{- else if and $grouped $wanted.id }}
capacityReservation.id is not a label of the nodes of provisioner {{ $wanted.provisioner }}. Use capacityReservation.group.
{{- else if and $grouped (not $wanted.group) (or (eq $wanted.provisioner "hyperpod") (ne $wanted.type "capacity-block")) }}
capacityReservation.group is required for provisioner {{ $wanted.provisioner }}. Set it to the name of the group whose nodes are reserved.
{{- else if and (not $grouped) $wanted.group }}
capacityReservation.group applies to provisioner node-group and hyperpod. Use capacityReservation.id.
{{- end }}
{{- end }}

{{- /* Kueue admits a job as soon as it has the label of a queue, and the chart writes these labels itself. */}}
{{- define "llama-lora.validations.labels" -}}
{{- range $label := list "queue-name" "priority-class" }}
{{- $label = printf "kueue.x-k8s.io/%s" $label }}
{{- if hasKey $.Values.commonLabels $label }}
commonLabels.{{ $label }} would be on every object. Use kueue.queueName, kueue.cpuQueueName or kueue.priorityClass.
{{- end }}
{{- range $stage, $own := $.Values.stages }}
{{- if hasKey (include "stage.settings" (dict "root" $ "settings" $stage) | fromJson).jobLabels $label }}
stages.{{ $stage }}: jobLabels.{{ $label }} could start a job before its gate releases it. Use kueue.queueName, kueue.cpuQueueName or kueue.priorityClass.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Labels by which a Job finds its pods: the API server refuses a Job with other values of them. */}}
{{- define "llama-lora.validations.jobsLabels" -}}
{{- $blocks := dict "commonLabels" .Values.commonLabels }}
{{- range $stage, $own := .Values.stages }}
{{- $_ := set $blocks (printf "stages.%s.podLabels" $stage) (include "stage.settings" (dict "root" $ "settings" $stage) | fromJson).podLabels }}
{{- end }}
{{- range $key, $labels := $blocks }}
{{- range $label, $value := $labels }}
{{- if or (has $label (list "controller-uid" "job-name")) (hasPrefix "batch.kubernetes.io/" $label) }}
{{ $key }}.{{ $label }} is a label that Jobs give their pods themselves. Remove it.
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "llama-lora.validations.extraObjects" -}}
{{- $own := include "llama-lora.ownNames" . | fromJson }}
{{- $taken := dict }}
{{- range $name, $object := .Values.extraObjects }}
{{- $rendered := include "llama-lora.extraObject" (dict "root" $ "name" $name) | fromYaml }}
{{- $kind := toString $rendered.kind }}
{{- $namespace := $rendered.metadata.namespace | default $.Release.Namespace }}
{{- $same := printf "%s%s %s/%s" (regexFind "^.*/" (toString $rendered.apiVersion)) $kind $namespace $rendered.metadata.name }}
{{- if and $rendered.Error (not $rendered.kind) }}
extraObjects.{{ $name }} is not valid YAML once its templates are replaced ({{ $rendered.Error | replace "\n" " " }}). Use the function quote in the template whose output breaks it.
{{- else if not (and $rendered.apiVersion $rendered.kind) }}
extraObjects.{{ $name }} has no apiVersion or kind. Set both, e.g. {apiVersion: v1, kind: ConfigMap, data: {}}.
{{- else if eq $kind "Secret" }}
extraObjects.{{ $name }} is a Secret, whose content anyone could read who can read the release. Use kubectl create secret, or an operator such as External Secrets.
{{- else if hasSuffix "List" $kind }}
extraObjects.{{ $name }} is a {{ $kind }}, whose items the chart does not check. Set each item as an object of its own, without Secrets.
{{- else if and (has $rendered.metadata.name (get $own $kind | default list)) (eq $namespace $.Release.Namespace) }}
extraObjects.{{ $name }} is {{ $kind }} {{ $rendered.metadata.name }}, which is an object of the chart. Set metadata.name to another name.
{{- else if hasKey $taken $same }}
extraObjects.{{ $name }} is {{ $kind }} {{ $rendered.metadata.name }}, as is extraObjects.{{ get $taken $same }}. Remove one of them, or set metadata.name to another name.
{{- end }}
{{- $_ := set $taken $same $name }}
{{- end }}
{{- end }}

{{- /* A Kubernetes quantity as a number: 1.5Gi is 1610612736. */}}
{{- define "llama-lora.quantity" -}}
{{- $factors := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) }}
{{- mulf (trimSuffix $unit (toString .) | float64) (get $factors $unit) }}
{{- end }}
