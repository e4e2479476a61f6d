{{- /*
    One helper for each object name. Templates use only these.

    The longest name is that of a PyTorchJob's worker pod, which is also its host name (at most 63 characters):
        FULLNAME-compile-REVISION-worker-1023      38 + 9 + 4 + 12
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

{{- /* The Jobs, one for each stage. */}}
{{- define "llama-lora.preflight.name" -}}
{{ include "llama-lora.fullname" . }}-preflight
{{- end }}

{{- define "llama-lora.storage-prepare.name" -}}
{{ include "llama-lora.fullname" . }}-storage-prepare
{{- end }}

{{- define "llama-lora.tokenize.name" -}}
{{ include "llama-lora.fullname" . }}-tokenize
{{- end }}

{{- /* Includes the revision, so that a later Helm command creates a new PyTorchJob and never replaces a running one. */}}
{{- define "llama-lora.compile.name" -}}
{{ include "llama-lora.fullname" . }}-compile-{{ .Release.Revision }}
{{- end }}

{{- define "llama-lora.compile-gate.name" -}}
{{ include "llama-lora.fullname" . }}-compile-gate
{{- end }}

{{- define "llama-lora.neff.name" -}}
{{ include "llama-lora.fullname" . }}-neff
{{- end }}

{{- define "llama-lora.train.name" -}}
{{ include "llama-lora.fullname" . }}-train-{{ .Release.Revision }}
{{- end }}

{{- define "llama-lora.train-gate.name" -}}
{{ include "llama-lora.fullname" . }}-train-gate
{{- end }}

{{- define "llama-lora.consolidate.name" -}}
{{ include "llama-lora.fullname" . }}-consolidate
{{- end }}

{{- define "llama-lora.merge.name" -}}
{{ include "llama-lora.fullname" . }}-merge
{{- end }}

{{- define "llama-lora.evaluate.name" -}}
{{ include "llama-lora.fullname" . }}-evaluate
{{- end }}

{{- /* The pod of `helm test`. */}}
{{- define "llama-lora.verify.name" -}}
{{ include "llama-lora.fullname" . }}-verify
{{- end }}

{{- define "llama-lora.cleanup.name" -}}
{{ include "llama-lora.fullname" . }}-cleanup
{{- end }}

{{- define "llama-lora.cleanup-before-install.name" -}}
{{ include "llama-lora.fullname" . }}-cleanup-before-install
{{- end }}

{{- /* Includes the revision: a Job is immutable, so an upgrade creates a new one. */}}
{{- define "llama-lora.runner.name" -}}
{{ include "llama-lora.fullname" . }}-runner-{{ .Release.Revision }}
{{- end }}

{{- /* The release that the runner installs. */}}
{{- define "llama-lora.run.release" -}}
{{ .Release.Name }}-run
{{- end }}

{{- /* Service accounts. Their Roles and RoleBindings have the same names. */}}
{{- define "llama-lora.rbac.prefix" -}}
{{ .Values.rbac.namePrefix | default (include "llama-lora.fullname" .) }}
{{- end }}

{{- define "llama-lora.preflight.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-preflight
{{- end }}

{{- /* Cluster-scoped, so prefixed with the namespace and a dot, which a namespace's name cannot contain. */}}
{{- define "llama-lora.preflight.clusterRole" -}}
{{ .Release.Namespace }}.{{ include "llama-lora.preflight.account" . }}
{{- end }}

{{- define "llama-lora.gate.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-gate
{{- end }}

{{- define "llama-lora.cleanup.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-cleanup
{{- end }}

{{- define "llama-lora.runner.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-runner
{{- end }}

{{- define "llama-lora.tokenize.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-tokenize
{{- end }}

{{- /* The account of all other stages. It has no permissions, and its token is not mounted. */}}
{{- define "llama-lora.stage.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-stage
{{- end }}
