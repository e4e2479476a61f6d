{{- /*
    One helper for each object name. Templates use only these.

    The longest name is that of a worker pod, with at most 63 characters. That of a PyTorchJob is also its host name:
        FULLNAME-compile-REVISION-worker-1023      38 + 9 + 4 + 12
        FULLNAME-compile-REVISION-node-0-1023-abcde      32 + 9 + 4 + 18, so FULLNAME is shortened for a TrainJob
*/}}

{{- /* The release's name. A name that is too long, contains dots or starts with a digit (the training operator creates a
       Service for each worker, whose name must start with a letter) is changed and gets a hash of the original as its
       suffix, so that two releases never share a name. */}}
{{- define "llama-lora.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if regexMatch "^[a-z][-a-z0-9]{0,37}$" .Release.Name }}
{{- .Release.Name }}
{{- else }}
{{- printf "r-%s" .Release.Name | replace "." "-" | trunc 29 | trimSuffix "-" }}-{{ sha256sum .Release.Name | trunc 8 }}
{{- end }}
{{- end }}

{{- /* The value of app.kubernetes.io/name. */}}
{{- define "llama-lora.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* NAME in the run's folder, WORKSPACE/runs/NAME. */}}
{{- define "llama-lora.run.name" -}}
{{ .Values.name | default .Release.Name }}
{{- end }}

{{- /* The label of all objects that use this run's folder, in any release. A label value has at most 63 characters, so
       the name is truncated and followed by a hash of the claim and the full name. */}}
{{- define "llama-lora.run.label" -}}
{{- $run := include "llama-lora.run.name" . }}
{{- $run | trunc 46 }}-{{ printf "%s/%s" (include "llama-lora.claim.name" .) $run | sha256sum | trunc 16 }}
{{- end }}

{{- define "llama-lora.config.name" -}}
{{ include "llama-lora.fullname" . }}-config
{{- end }}

{{- /* The claim that every stage mounts: an existing one, or that of the subchart storage. */}}
{{- define "llama-lora.claim.name" -}}
{{- if .Values.storage.existingClaim }}
{{- .Values.storage.existingClaim }}
{{- else if .Values.storage.enabled }}
{{- include "storage.claimName" . }}
{{- end }}
{{- end }}

{{- /* The Job, PyTorchJob, TrainJob or Pod of a stage: (dict "root" . "stage" "merge"). Includes the revision where an upgrade
       must create a new object: compile and train, so that a running one is never replaced, and the runner's Job, which is
       immutable. */}}
{{- define "llama-lora.stage.name" -}}
{{- $fullname := include "llama-lora.fullname" .root }}
{{- if and (has .stage (list "compile" "train")) (eq .root.Values.workload "trainjob") (gt (len $fullname) 32) }}
{{- $fullname = printf "%s-%s" ($fullname | trunc 23 | trimSuffix "-") (sha256sum $fullname | trunc 8) }}
{{- end }}
{{- $fullname }}-{{ .stage }}
{{- if has .stage (list "compile" "train" "runner") }}-{{ .root.Release.Revision }}{{ end }}
{{- end }}

{{- define "llama-lora.networkPolicy.name" -}}
{{ include "llama-lora.fullname" .root }}-{{ .name }}
{{- end }}

{{- /* The release that the runner installs. */}}
{{- define "llama-lora.run.release" -}}
{{ .Release.Name }}-run
{{- end }}

{{- /* Service accounts. Their Roles and RoleBindings have the same names. */}}
{{- define "llama-lora.rbac.prefix" -}}
{{ .Values.rbac.namePrefix | default (include "llama-lora.fullname" .) }}
{{- end }}

{{- /* Arguments: root, name. The account "stage" is that of most stages: it has no permissions, and its token is not mounted. */}}
{{- define "llama-lora.account" -}}
{{ include "llama-lora.rbac.prefix" .root }}-{{ .name }}
{{- end }}

{{- /* Cluster-scoped, so prefixed with the namespace and a dot, which a namespace's name cannot contain. */}}
{{- define "llama-lora.preflight.clusterRole" -}}
{{ .Release.Namespace }}.{{ include "llama-lora.account" (dict "root" . "name" "preflight") }}
{{- end }}

{{- /* The names of the chart's objects by kind, which no object of extraObjects may have. */}}
{{- define "llama-lora.ownNames" -}}
{{- $jobs := list }}
{{- range list "preflight" "storage-prepare" "tokenize" "rehearse" "compile-gate" "neff" "train-gate" "consolidate" "merge" "evaluate" "publish" "runner" "cleanup" "cleanup-before-install" }}
{{- $jobs = append $jobs (include "llama-lora.stage.name" (dict "root" $ "stage" .)) }}
{{- end }}
{{- $nodes := list }}
{{- range list "compile" "train" }}
{{- $nodes = append $nodes (include "llama-lora.stage.name" (dict "root" $ "stage" .)) }}
{{- end }}
{{- $policies := list }}
{{- range list "run" "workers" "outside" "api-server" "monitoring" "trackers" }}
{{- $policies = append $policies (include "llama-lora.networkPolicy.name" (dict "root" $ "name" .)) }}
{{- end }}
{{- $names := dict
      "ConfigMap" (list (include "llama-lora.config.name" .))
      "Job" $jobs
      "NetworkPolicy" (ternary $policies list .Values.networkPolicy.enabled)
      "Pod" (list (include "llama-lora.stage.name" (dict "root" . "stage" "verify")))
      "PyTorchJob" $nodes "TrainJob" $nodes "TrainingRuntime" $nodes }}
{{- if .Values.rbac.create }}
{{- $accounts := list }}
{{- range list "stage" "gate" "preflight" "tokenize" "publish" "cleanup" "runner" }}
{{- $accounts = append $accounts (include "llama-lora.account" (dict "root" $ "name" .)) }}
{{- end }}
{{- $reads := list (include "llama-lora.preflight.clusterRole" .) }}
{{- $names = merge $names (dict "ServiceAccount" $accounts "Role" $accounts "RoleBinding" $accounts "ClusterRole" $reads "ClusterRoleBinding" $reads) }}
{{- end }}
{{- if and .Values.storage.enabled (not .Values.storage.existingClaim) }}      {{- /* else the subchart is not there */}}
{{- $scoped := list (include "storage.clusterScopedName" .) }}
{{- $names = merge $names (dict "PersistentVolumeClaim" (list (include "storage.claimName" .)) "PersistentVolume" $scoped "StorageClass" $scoped) }}
{{- end }}
{{- toJson $names }}
{{- end }}
