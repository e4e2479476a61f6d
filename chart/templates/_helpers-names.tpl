{{- /*
    Every name, one helper. Nothing else spells a name.

    The longest name is that of a PyTorchJob's worker pod, which is also its host name (at most 63 characters):
        FULLNAME-compile-REVISION-worker-1023      38 + 9 + 4 + 12
*/}}

{{- /* The release's name. A name that is too long, has dots, or begins with a digit (the training operator makes a
       Service per worker, whose name begins with a letter) is changed, and then ends with a hash of the whole:
       two releases never share a name. */}}
{{- define "llama-lora.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if regexMatch "^[a-z][-a-z0-9]{0,37}$" .Release.Name }}
{{- .Release.Name }}
{{- else }}
{{- printf "r-%s" .Release.Name | replace "." "-" | trunc 29 | trimSuffix "-" }}-{{ sha256sum .Release.Name | trunc 8 }}
{{- end }}
{{- end }}

{{- /* What app.kubernetes.io/name says. */}}
{{- define "llama-lora.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* The run's folder: WORKSPACE/runs/NAME. */}}
{{- define "llama-lora.run.name" -}}
{{ .Values.name | default .Release.Name }}
{{- end }}

{{- /* The label of everything that works in this run's folder, in whatever release. A label's value has at most 63
       characters, so the hash stands for what is cut off, and for the volume. */}}
{{- define "llama-lora.run.label" -}}
{{- $run := include "llama-lora.run.name" . }}
{{- $run | trunc 46 }}-{{ printf "%s/%s" (include "llama-lora.claim.name" .) $run | sha256sum | trunc 16 }}
{{- end }}

{{- define "llama-lora.config.name" -}}
{{ include "llama-lora.fullname" . }}-config
{{- end }}

{{- /* The claim that every stage mounts: an existing one, or the storage subchart's. */}}
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

{{- /* With the revision: a later Helm command adds its own PyTorchJob beside a healthy one, and never replaces it. */}}
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

{{- /* With the revision: a Job cannot be changed, so an upgrade makes a new one. */}}
{{- define "llama-lora.runner.name" -}}
{{ include "llama-lora.fullname" . }}-runner-{{ .Release.Revision }}
{{- end }}

{{- /* The release that the runner installs. */}}
{{- define "llama-lora.run.release" -}}
{{ .Release.Name }}-run
{{- end }}

{{- /* Service accounts; their roles and bindings have the same names. */}}
{{- define "llama-lora.rbac.prefix" -}}
{{ .Values.rbac.namePrefix | default (include "llama-lora.fullname" .) }}
{{- end }}

{{- define "llama-lora.preflight.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-preflight
{{- end }}

{{- /* Cluster-scoped: the namespace in front, set apart by a dot, which no namespace's name contains. */}}
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

{{- /* Of every other stage: without rights, and never mounted. */}}
{{- define "llama-lora.stage.account" -}}
{{ include "llama-lora.rbac.prefix" . }}-stage
{{- end }}
