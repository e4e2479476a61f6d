{{- /* The claim's name depends only on the release, so that the parent chart can compute it, and so that a changed
       fullnameOverride does not lose the results. Names of cluster-scoped objects are prefixed with the namespace and a
       dot, which a namespace's name cannot contain. */}}
{{- define "storage.claimName" -}}
{{ .Release.Name }}-workspace
{{- end }}

{{- define "storage.clusterScopedName" -}}
{{ .Release.Namespace }}.{{ include "storage.claimName" . }}
{{- end }}

{{- define "storage.metadata" -}}
{{- $labels := dict
      "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_")
      "app.kubernetes.io/name" "llama-lora"
      "app.kubernetes.io/instance" .Release.Name
      "app.kubernetes.io/managed-by" .Release.Service
      "app.kubernetes.io/part-of" "llama-lora"
      "app.kubernetes.io/component" "storage" -}}
labels:
  {{- include "stage.override" (dict "base" (.Values.commonLabels | default dict) "over" $labels) | nindent 2 }}
annotations:
  helm.sh/resource-policy: keep
{{- end }}
