{{- /* The claim is named after the release alone, so that the parent chart can name it too, and so that a new
       fullnameOverride does not leave the results behind. Cluster-scoped objects carry the namespace, set apart by a
       dot, which no namespace's name contains. */}}
{{- define "storage.claimName" -}}
{{ .Release.Name }}-workspace
{{- end }}

{{- define "storage.clusterScopedName" -}}
{{ .Release.Namespace }}.{{ include "storage.claimName" . }}
{{- end }}

{{- define "storage.metadata" -}}
labels:
  helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
  app.kubernetes.io/name: llama-lora
  app.kubernetes.io/instance: {{ .Release.Name | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  app.kubernetes.io/part-of: llama-lora
  app.kubernetes.io/component: storage
annotations:
  helm.sh/resource-policy: keep
{{- end }}
