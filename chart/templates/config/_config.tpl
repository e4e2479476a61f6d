{{- /* The run config, which the stages read: whole sections of the values. */}}
{{- define "llama-lora.config.run" -}}
{{- $config := dict "name" (include "llama-lora.run.name" .) }}
{{- range $section := include "llama-lora.settings.sections" . | fromJsonArray }}
{{- $_ := set $config $section (deepCopy (get $.Values $section)) }}
{{- end }}
{{- $_ := set $config "device" (include "llama-lora.device" .) }}
{{- range $key := list "maxSteps" "evalSteps" "earlyStoppingPatience" }}      {{- /* Helm 4 drops nulls */}}
{{- $_ := set $config.training $key (get $config.training $key | default nil) }}
{{- end }}
{{- $_ := set $config.dataset "overlong" ($config.dataset.overlong | default nil) }}
{{- include "llama-lora.config.yaml" $config }}
{{- end }}

{{- /* The device of compile and train, by the instance type: neuron on Trainium. Backend native has no device on Trn1: there it
       trains on the node's CPUs. */}}
{{- define "llama-lora.device" -}}
{{- $trainium := ternary "^(ml\\.)?trn" "^(ml\\.)?trn[2-9]" (eq .Values.backend "xla") }}
{{- ternary "neuron" "cpu" (regexMatch $trainium .Values.instance) }}
{{- end }}

{{- /* The config of genvalues cluster. */}}
{{- define "llama-lora.config.cluster" -}}
{{- $values := .Values }}
{{- $secret := $values.huggingFace.tokenSecret }}
{{- include "llama-lora.config.yaml" (dict
      "release" .Release.Name
      "namespace" .Release.Namespace
      "fullname" (include "llama-lora.fullname" .)
      "revision" .Release.Revision
      "run" (include "llama-lora.run.label" .)
      "workload" $values.workload
      "chart" (dict "version" .Chart.Version "appVersion" .Chart.AppVersion)
      "claim" (dict
          "name" (include "llama-lora.claim.name" .)
          "managed" (and $values.storage.enabled (not $values.storage.existingClaim)))
      "storagePrepare" $values.storage.prepare.enabled
      "secret" (ternary (dict "name" $secret "key" $values.huggingFace.tokenKey) nil (ne $secret ""))
      "otherSecrets" (include "llama-lora.secrets" . | fromJsonArray)
      "job" (dict
          "nodes" $values.parallelism.nodes
          "instance" $values.instance
          "devices" $values.devices
          "queueName" $values.kueue.queueName
          "cpuQueueName" $values.kueue.cpuQueueName
          "priorityClass" $values.kueue.priorityClass)
      "clusterScopedReads" $values.rbac.clusterScopedReads
      "train" (dict "unschedulableTimeoutSeconds" $values.pipeline.unschedulableTimeoutSeconds)
      "guards" (dict
          "maxCost" ($values.guards.maxCost | default nil)
          "pricePerNodeHour" ($values.guards.pricePerNodeHour | default nil)
          "stallTimeoutSeconds" (include "llama-lora.seconds" $values.guards.stallTimeout | int))) }}
{{- end }}

{{- /* The seconds of a duration such as 1h30m, 45m or 90s. */}}
{{- define "llama-lora.seconds" -}}
{{- $seconds := 0 }}
{{- range $unit, $factor := dict "h" 3600 "m" 60 "s" 1 }}
{{- $seconds = add $seconds (mul $factor (regexFind (printf "[0-9]+%s" $unit) $ | trimSuffix $unit | int)) }}
{{- end }}
{{- $seconds }}
{{- end }}

{{- /* The values of the release that the runner installs: these, attached, with the volume, the service accounts and
       the roles of this release (so that the runner needs no right to make any). */}}
{{- define "llama-lora.config.values" -}}
{{- $values := omit (deepCopy .Values) "global" }}
{{- $_ := set $values "name" (include "llama-lora.run.name" .) }}
{{- $_ := set $values "fullnameOverride" "" }}
{{- $_ := set $values.pipeline "mode" "attached" }}
{{- $_ := set $values "storage" (omit $values.storage "global" "commonLabels") }}
{{- $_ := set $values.storage "enabled" false }}
{{- $_ := set $values.storage "existingClaim" (include "llama-lora.claim.name" .) }}
{{- $_ := set $values.rbac "create" false }}
{{- $_ := set $values.rbac "namePrefix" (include "llama-lora.rbac.prefix" .) }}
{{- $_ := set $values.cleanup "enabled" false }}
{{- $_ := set $values.networkPolicy "enabled" false }}      {{- /* this release's select the pods of the run, too */}}
{{- $_ := set $values "extraObjects" dict }}
{{- toYaml $values }}      {{- /* Helm reads it, and text of several lines must stay as it is */}}
{{- end }}

{{- /* Readers of YAML 1.1 (PyYAML) take 5e-05 for text, and 5.0e-05 for a number. */}}
{{- define "llama-lora.config.yaml" -}}
{{- regexReplaceAll "(?m)(: -?[0-9]+)(e[-+][0-9]+)$" (toYaml .) "${1}.0${2}" }}
{{- end }}
