{{- /* Completes .Values in place: restores missing defaults (a null took them away, or `helm upgrade --reuse-values` kept the
       values of a chart that lacks them), replaces other words for values, such as backend neuron, by the present ones, turns
       numbers that `helm --set` passed as text into numbers, and fills what follows from the instance type. */}}
{{- define "llama-lora.settings.complete" -}}
{{- if not (kindIs "map" .Values.storage) }}      {{- /* the subchart's values are another map by now */}}
{{- fail "invalid values:\n\n  storage is missing. Remove storage: null, or upgrade with --reset-then-reuse-values.\n" }}
{{- end }}
{{- include "llama-lora.settings.restore" (dict "values" .Values "defaults" (include "llama-lora.settings.defaults" . | fromJson)) }}
{{- $_ := set .Values "stageDefaults" (include "stage.merge" (dict "base" dict "over" .Values.stageDefaults) | fromJson) }}
{{- range $key, $words := include "llama-lora.settings.words" . | fromJson }}
{{- $path := splitList "." $key }}
{{- $block := $.Values }}
{{- range initial $path }}
{{- $block = get $block . }}
{{- end }}
{{- if not (kindIs "invalid" (get $block (last $path))) }}
{{- $written := get $block (last $path) | toString }}
{{- $_ := set $block (last $path) (get $words $written | default $written) }}
{{- end }}
{{- end }}
{{- $mistakes := list }}
{{- range $key, $limits := include "llama-lora.settings.numbers" . | fromJson }}
{{- $path := splitList "." $key }}
{{- $block := $.Values }}
{{- range initial $path }}
{{- $block = get $block . }}
{{- end }}
{{- $mistakes = append $mistakes (include "llama-lora.settings.number" (dict "key" $key "block" $block "name" (last $path) "limits" $limits)) }}
{{- end }}
{{- $limits := get (include "llama-lora.settings.numbers" . | fromJson) "dataset.weight" }}
{{- range $name, $source := .Values.dataset.additional }}
{{- $key := printf "dataset.additional.%s.weight" $name }}
{{- $mistakes = append $mistakes (include "llama-lora.settings.number" (dict "key" $key "block" $source "name" "weight" "limits" $limits)) }}
{{- end }}
{{- include "llama-lora.refuse" $mistakes }}
{{- include "llama-lora.instance.complete" . }}
{{- include "llama-lora.storage.complete" . }}
{{- end }}

{{- /* Turns a number that is text into a number, and says what is wrong with it. Arguments: key, block, name, limits. */}}
{{- define "llama-lora.settings.number" -}}
{{- $written := get .block .name }}
{{- if and $written (kindIs "string" $written) }}
{{- $number := float64 $written }}
{{- range $word, $limit := .limits }}
{{- if or (and (eq $word "minimum") (lt $number (float64 $limit))) (and (eq $word "exclusiveMinimum") (le $number (float64 $limit))) }}
{{- printf "%s %s is too small. Set it to %s %v." $.key $written (ternary "at least" "more than" (eq $word "minimum")) $limit }}
{{- else if or (and (eq $word "maximum") (gt $number (float64 $limit))) (and (eq $word "exclusiveMaximum") (ge $number (float64 $limit))) }}
{{- printf "%s %s is too large. Set it to %s %v." $.key $written (ternary "at most" "less than" (eq $word "maximum")) $limit }}
{{- end }}
{{- end }}
{{- $_ := set .block .name $number }}
{{- end }}
{{- end }}

{{- /* Fills storage keys that are null or missing: an upgrade keeps what the claim and the storage class have, because they cannot
       change; else by kind. (`helm template` and Argo CD see no cluster.) */}}
{{- define "llama-lora.storage.complete" -}}
{{- $storage := .Values.storage }}
{{- $usual := include "llama-lora.settings.storage" . | fromJson }}
{{- $name := include "llama-lora.claim.name" . }}
{{- $claim := dict }}
{{- $class := dict }}
{{- if and $storage.enabled (not $storage.existingClaim) }}
{{- $claim = (lookup "v1" "PersistentVolumeClaim" .Release.Namespace $name).spec | default dict }}
{{- if and (eq $storage.kind "fsx") $storage.fsx.createStorageClass }}
{{- $class = lookup "storage.k8s.io/v1" "StorageClass" "" (printf "%s.%s" .Release.Namespace $name) }}
{{- end }}
{{- end }}
{{- $kind := get $usual.kinds $storage.kind }}
{{- $oneNode := and (eq $storage.kind "generic") (eq (include "llama-lora.device" .) "cpu") (eq (int .Values.parallelism.nodes) 1) }}
{{- $defaults := dict
      "size" (dig "resources" "requests" "storage" $kind.size $claim)
      "storageClass" ($claim.storageClassName | default $kind.storageClass)
      "accessModes" ($claim.accessModes | default (list (ternary "ReadWriteOnce" "ReadWriteMany" $oneNode))) }}
{{- range $key, $default := $defaults }}
{{- if or (not (hasKey $storage $key)) (kindIs "invalid" (get $storage $key)) }}
{{- $_ := set $storage $key $default }}
{{- end }}
{{- end }}
{{- $version := "2.15" }}
{{- if $class }}{{ $version = dig "parameters" "fileSystemTypeVersion" "" $class }}{{ end }}
{{- if or (not (hasKey $storage.fsx "fileSystemTypeVersion")) (kindIs "invalid" $storage.fsx.fileSystemTypeVersion) }}
{{- $_ := set $storage.fsx "fileSystemTypeVersion" $version }}
{{- end }}
{{- if not $storage.fsx.perUnitStorageThroughput }}
{{- $written := dig "parameters" "perUnitStorageThroughput" 0 ($class | default dict) | int64 }}
{{- $_ := set $storage.fsx "perUnitStorageThroughput" ($written | default (int64 (get $usual.fsx $storage.fsx.deploymentType).usual)) }}
{{- end }}
{{- /* A gate and its workers mount the volume at the same time. The scheduler does not know that only one node can. */}}
{{- if and $storage.enabled (not $storage.existingClaim) (not (has "ReadWriteMany" $storage.accessModes)) (not .Values.stageDefaults.affinity) }}
{{- $elsewhere := list "preflight" "cleanup" "runner" }}      {{- /* do not mount it */}}
{{- $mounts := list (dict "key" "app.kubernetes.io/component" "operator" "NotIn" "values" $elsewhere) }}
{{- $run := dict "matchLabels" (dict "llama-lora/run" (include "llama-lora.run.label" .)) "matchExpressions" $mounts }}
{{- $same := list (dict "labelSelector" $run "topologyKey" "kubernetes.io/hostname") }}
{{- range $stage, $settings := .Values.stages }}
{{- if not (or $settings.affinity (has $stage $elsewhere)) }}
{{- $_ := set $settings "affinity" (dict "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $same)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Fills what is null, missing or (devices) empty with what the instance type says. genvalues/settings/by_instance.py does the
       same for genvalues. A devices map that is written stays as it is: it may leave out EFA. */}}
{{- define "llama-lora.instance.complete" -}}
{{- $values := .Values }}
{{- $rows := include "llama-lora.instances" . | fromJson }}
{{- if not $values.backend }}
{{- $_ := set $values "backend" (get $rows $values.instance | default $rows.cpu).backend }}
{{- end }}
{{- $row := include "llama-lora.instance.row" . | fromJson }}
{{- if not $values.devices }}
{{- $_ := set $values "devices" $row.devices }}
{{- end }}
{{- range $key, $usual := dict "target" $row.neuron.target "logicalCoreSize" (int64 $row.neuron.logicalCoreSize) }}
{{- $_ := set $values.neuron $key (get $values.neuron $key | default $usual) }}
{{- end }}
{{- $_ := set $values "sharedMemory" ($values.sharedMemory | default $row.sharedMemory) }}
{{- $layout := $values.parallelism }}
{{- $perNode := int64 ($layout.processesPerNode | default (include "llama-lora.instance.cores" .)) }}
{{- $processes := mul $layout.nodes $perNode }}
{{- $size := min $row.tensorParallelSize $perNode }}
{{- with $layout.dataParallelSize }}
{{- if not (mod $processes .) }}{{ $size = div $processes . }}{{ end }}
{{- end }}
{{- $size = int64 ($layout.tensorParallelSize | default $size) }}
{{- $_ := set $layout "processesPerNode" $perNode }}
{{- $_ := set $layout "tensorParallelSize" $size }}
{{- $_ := set $layout "dataParallelSize" (int64 ($layout.dataParallelSize | default (max 1 (div $processes $size)))) }}
{{- range $stage := list "compile" "train" }}
{{- $settings := get $values.stages $stage }}
{{- $_ := set $settings "resources" (include "llama-lora.instance.resources" (dict "usual" $row.resources "written" ($settings.resources | default dict)) | fromJson) }}
{{- end }}
{{- end }}

{{- /* The row of the instance type; that of cpu where compile and train have no Neuron device. */}}
{{- define "llama-lora.instance.row" -}}
{{- $rows := include "llama-lora.instances" . | fromJson }}
{{- ternary (get $rows .Values.instance | default $rows.cpu) $rows.cpu (eq (include "llama-lora.device" .) "neuron") | toJson }}
{{- end }}

{{- /* The logical cores of the devices that a node's pod requests, one process each; on CPUs the usual processes. */}}
{{- define "llama-lora.instance.cores" -}}
{{- $row := include "llama-lora.instance.row" . | fromJson }}
{{- $devices := get .Values.devices "aws.amazon.com/neuron" }}
{{- if and $row.coresPerDevice $devices }}
{{- max 1 (div (mul $devices $row.coresPerDevice) .Values.neuron.logicalCoreSize) }}
{{- else }}
{{- $row.processesPerNode }}
{{- end }}
{{- end }}

{{- /* The resources of a pod: those that are written over the usual ones. Where only the request or only the limit is written, the
       other one follows it if its usual amount would contradict it. A null that is written is no amount. Arguments: usual, written. */}}
{{- define "llama-lora.instance.resources" -}}
{{- $result := deepCopy .usual }}
{{- $written := .written }}
{{- range $bound, $amounts := $written }}
{{- range $resource, $amount := $amounts }}
{{- $of := get $result $bound | default dict }}
{{- $_ := set $result $bound $of }}
{{- if kindIs "invalid" $amount }}
{{- $_ := unset $of $resource }}
{{- else }}
{{- $_ := set $of $resource $amount }}
{{- $other := ternary "limits" "requests" (eq $bound "requests") }}
{{- $usual := get (get $.usual $other | default dict) $resource }}
{{- if and $usual (not (hasKey (get $written $other | default dict) $resource)) }}
{{- $more := gt (include "llama-lora.quantity" $amount | float64) (include "llama-lora.quantity" $usual | float64) }}
{{- if or (and $more (eq $bound "requests")) (and (not $more) (eq $bound "limits")) }}
{{- $_ := set (get $result $other) $resource $amount }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $result | toJson }}
{{- end }}

{{- define "llama-lora.settings.restore" -}}
{{- range $key, $default := .defaults }}
{{- if not (hasKey $.values $key) }}
{{- $_ := set $.values $key $default }}
{{- else if and (kindIs "map" $default) (kindIs "map" (get $.values $key)) }}
{{- include "llama-lora.settings.restore" (dict "values" (get $.values $key) "defaults" $default) }}
{{- end }}
{{- end }}
{{- end }}
